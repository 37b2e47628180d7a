# SPDX-License-Identifier: GPL-2.0-or-later
"""The nightly's avocado job with a program in place of ``nearmetal``, and the morning page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.nights import changes, page
from nearmetal.nights.history import Key, Night, Value, of_report, together
from nearmetal.report import document

REPO = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "data" / "night.json"
EXITS = "lspci.userspace_exits"
SWITCHES = "vmexit.agent.pmu_switches_per_sample"

PROGRAM = """
import json, pathlib, sys, time
from nearmetal.cli.main import parser
words = sys.argv[1:]
parser().parse_args(words)
test = words[words.index("--only") + 1]
if "--guest-cpus" in words:
    test = "guest-" + words[words.index("--guest-cpus") + 1]
results = pathlib.Path(words[words.index("--results-dir") + 1])
if test == "hang":
    time.sleep(600)
if test == "broken":
    print("error: the disk is full: free some", file=sys.stderr)
    sys.exit(3)
report = json.loads(pathlib.Path(sys.argv[0]).with_name("night.json").read_text())
report["measurements"] = [r for r in report["measurements"] if r["name"].split(".")[0] == test]
report["run"]["id"] = "run-" + test
report["run"]["command"] = "nearmetal run --only " + test
if test == "red":
    report["checks"][0] |= {"status": "fail", "observed": "1665 exits"}
folder = results / ("run-" + test)
folder.mkdir()
(folder / "report.json").write_text(json.dumps(report))
(folder / "report.html").write_text("page")
sys.exit(test == "red")
"""


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """tests/avocado/job.py."""
    spec = importlib.util.spec_from_file_location("nm_job", REPO / "tests/avocado/job.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nm_job"] = module
    spec.loader.exec_module(module)
    return module


def test_suites_are_tests_by_hosts_and_stages(job: ModuleType) -> None:
    every = {one.name: one for one in job.planned(quick=False)}
    assert {"amd-lspci", "amd-vmexit", "intel-vmexit", "unit", "mutants", "validate"} <= set(every)
    assert every["amd-lspci"].tags == ("measure", "testbed", "amd", "lspci")
    assert "PCI Express" in every["intel-lspci"].parameters["skip"]
    assert "skip" not in every["amd-p2p"].parameters
    assert "server" in every["amd-tools"].parameters["skip"]
    quick = {one.name for one in job.planned(quick=True)}
    assert "unit" in quick
    assert not quick & {"mutants", "validate", "kasan"}


def test_tags_choose(job: ModuleType) -> None:
    every = job.planned(quick=False)
    assert [one.name for one in job.chosen(every, "amd,lspci unit")] == ["amd-lspci", "unit"]


def test_guests_of_the_varianter_are_suites(job: ModuleType, tmp_path: Path) -> None:
    every = {one.name: one for one in job.planned(quick=True, guests=job.GUESTS)}
    one = every["amd-lspci-two-vcpus-two-gib"]
    assert one.tags == ("measure", "testbed", "amd", "lspci", "guest", "two-vcpus-two-gib")
    assert one.parameters == {
        "test": "lspci",
        "testbed": "amd",
        "guest_cpus": "2",
        "guest_memory": "2048",
    }
    for written, said in (("guest_cpu5: 2", "guest_cpu5"), ("tests: lspcy", "no test 'lspcy'")):
        file = tmp_path / "guests.yaml"
        file.write_text(f"guest: !mux\n  odd:\n    {written}\n")
        with pytest.raises(UsageError, match=said):
            job.planned(quick=True, guests=file)


def test_only_some_series_are_on(job: ModuleType) -> None:
    every = {one.name: one for one in job.planned(quick=True, series=("pci-ecam",))}
    assert every["amd-lspci"].parameters["series"] == "pci-ecam"
    assert "series" not in every["unit"].parameters


@pytest.fixture(scope="module")
def ran(job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Path]:
    """A job of tests that pass, fail, break, hang and cannot run."""
    base = tmp_path_factory.mktemp("night")
    program = base / "program.py"
    program.write_text(PROGRAM)
    (base / "night.json").write_text(RECORDED.read_text())
    words = {"program": f"{sys.executable} {program}"}
    mark = f"sleep 61{base.name[-1]}.25"

    def one(test: str, timeout: int = 60, name: str = "", **more: str) -> object:
        parameters = {"test": test, "testbed": "amd", **words, **more}
        return job.Planned(
            name or f"amd-{test}", "measure.py", parameters, ("measure", test), timeout
        )

    def stage(name: str, command: str, timeout: int = 60) -> object:
        return job.Planned(name, "stage.py", {"command": command}, ("stage",), timeout)

    every = [
        one("broken"),
        one("hang", timeout=3),
        one("lspci"),
        one("p2p", skip="amd cannot run p2p: it has no switch"),
        one("red"),
        stage("killed", f"sh -c '{mark} & wait'", timeout=3),
        stage("wrong", "sh -c 'echo so it is; exit 4'"),
        one("vmexit"),
        one("lspci", name="amd-guest", guest_cpus="3"),
    ]
    status, folder = job.run_job(every, base / "testbed")
    return status, folder, base


def test_everything_runs_then_comes_the_verdict(ran: tuple[int, Path, Path]) -> None:
    status, folder, base = ran
    assert status != 0
    found = {one.name: one for one in page.ran(folder, base)}
    states = {name: one.status for name, one in found.items()}
    names = [name for name in states if "lspci" in name or "vmexit" in name]
    assert [states[name] for name in names] == ["PASS", "PASS"]

    def of(word: str) -> page.Ran:
        return next(one for name, one in found.items() if word in name)

    assert of("red").status == "FAIL"
    assert "1665 exits" in of("red").reason
    assert of("broken").status == "ERROR"
    assert "the disk is full" in of("broken").reason
    assert of("p2p").status == "CANCEL"
    assert "it has no switch" in of("p2p").reason
    assert "did not end within 3 s" in of("hang").reason
    assert of("hang").seconds >= 3
    assert "did not end within 3 s" in of("killed").reason
    assert of("wrong").status == "FAIL"
    assert "so it is" in of("wrong").reason
    assert "guest-3" in "".join(of("amd-guest").links)
    assert any(link.endswith("report.html") for link in of("lspci").links)


def test_a_killed_test_leaves_nothing(ran: tuple[int, Path, Path]) -> None:
    base = ran[2]
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(base / "program.py") not in done.stdout
    assert f"sleep 61{base.name[-1]}.25" not in done.stdout


def test_results_are_as_users_of_avocado_expect(ran: tuple[int, Path, Path]) -> None:
    folder = ran[1]
    assert {"results.json", "results.xml", "results.tap", "job.log"} <= {
        one.name for one in folder.iterdir()
    }


def test_reports_of_a_host_are_one_night(job: ModuleType, ran: tuple[int, Path, Path]) -> None:
    (night,) = job.gathered(ran[1], "20261201", "abc")
    names = {key.name for key in night.figures}
    assert {EXITS, SWITCHES} <= names
    assert night.id == "20261201-testbed"
    assert night.verdict == "fail"  # of the run that was red


def test_a_night_with_broken_tests_is_red_and_says_so(
    job: ModuleType, ran: tuple[int, Path, Path]
) -> None:
    verdicts = tuple(changes.judge(one, []) for one in job.gathered(ran[1], "n", ""))
    whole = page.Morning("n", verdicts, (), tuple(page.ran(ran[1], ran[2])), ())
    assert not whole.good
    text = page.render(whole)
    assert "the disk is full" in text
    assert "it has no switch" in text
    assert "http" not in text.replace("http://www.w3.org", "")


# --- alarms -----------------------------------------------------------------------------------


def recorded(day: int) -> Night:
    found = of_report(document.read(RECORDED), revision=f"rev{day}")
    return dataclasses.replace(
        found, id=f"n{day}", started=f"2026-12-{day:02}T02:00:00Z", folder=""
    )


def planted(night: Night, name: str, series: str, more: float) -> Night:
    figures = dict(night.figures)
    for key, was in night.figures.items():
        if key.name == name and key.series == series:
            assert was.median is not None
            values = tuple(one + more for one in was.values)
            figures[key] = Value(was.unit, was.provenance, values, was.median + more)
    return dataclasses.replace(night, figures=figures)


@pytest.mark.parametrize(
    ("name", "series"), [(EXITS, "pci-config-cache"), (SWITCHES, "pmu-passthrough")]
)
def test_a_planted_regression_rings(name: str, series: str) -> None:
    past = [recorded(day) for day in (1, 2, 3)]
    night = planted(recorded(4), name, series, 1)
    verdict = changes.judge(night, past)
    ok = page.Ran("amd-lspci", "PASS", 240.0, "", ())
    whole = page.Morning("n4", (verdict,), (*past, night), (ok,), ())
    assert not whole.good
    assert f"RED, {name}[on, {series}" in whole.line()
    assert {key.name for change in verdict.red if (key := change.key)} == {name}
    text = page.render(whole)
    assert f"{name}[on, {series}" in text
    assert "changed since n3: commits rev3 .. rev4" in text
    assert '<svg class="trend"' in text
    green = page.Morning("n4", (changes.judge(recorded(4), past),), (), (ok,), ())
    assert green.good
    assert "Nothing new is red" in page.render(green)


def test_a_night_in_which_nothing_ran_is_not_green() -> None:
    assert not page.Morning("n", (), (), (), ()).good
    skipped = page.Ran("amd-p2p", "CANCEL", 0.0, "no switch", ())
    assert not page.Morning("n", (), (), (skipped,), ()).good


def test_a_check_is_told_once() -> None:
    one = recorded(4)
    name = next(name for name, found in one.checks.items() if found.status == "pass")
    checks = {**one.checks, name: dataclasses.replace(one.checks[name], status="fail")}
    verdict = changes.judge(dataclasses.replace(one, checks=checks, verdict="fail"), [recorded(3)])
    plain = name.split(" (")[0]
    red = page.Ran("amd-lspci", "FAIL", 240.0, f"{plain}: 7 exits", ())
    whole = page.Morning("n4", (verdict,), (), (red,), ())
    assert f"RED, {name} failed" in whole.line()
    assert " more)" not in whole.line()
    other = dataclasses.replace(red, name="unit", reason="status 1: 2 failed")
    whole = dataclasses.replace(whole, ran=(red, other))
    assert "(and 1 more); 0 of 2 tests passed" in whole.line()


def test_a_job_that_ended_early_is_red() -> None:
    ok = page.Ran("amd-lspci", "PASS", 240.0, "", ())
    whole = page.Morning("n", (), (), (ok,), ("the job of b ended before its time",))
    assert not whole.good
    assert "the job of b ended" in whole.line()


def test_what_was_skipped_in_one_run_and_judged_in_another_counts_as_judged() -> None:
    one = recorded(1)
    name = next(name for name, found in one.checks.items() if found.status == "pass")
    checks = dict(one.checks)
    checks[name] = dataclasses.replace(checks[name], status="skip")
    other = dataclasses.replace(one, checks=checks)
    for pair in ((one, other), (other, one)):
        assert together("n", pair).checks[name].status == "pass"


def test_keys_are_as_people_read_them() -> None:
    key = Key("a.b", "on", "s", (("path", "cf8"),))
    assert str(key) == "a.b[on, s, path=cf8]"
    assert json.loads(RECORDED.read_text())["schema"] == 1
