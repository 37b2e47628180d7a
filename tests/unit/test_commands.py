# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that look at runs, and what is made from the command line itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lib import results as made

from nearmetal.cli import completion, runcmd
from nearmetal.cli.main import main, parser
from nearmetal.core import settings, ui
from nearmetal.core.errors import NearmetalError, UsageError
from nearmetal.core.model import CheckResult, Feature, Headline, Measurement, Report, RunInfo
from nearmetal.judging.again import judge_again
from nearmetal.judging.load import load_checks
from nearmetal.report import document
from nearmetal.report.text import WIDTH, render_text

RUN = RunInfo("run-1", "2026-11-30T20:07:26Z", "2026-11-30T20:08:26Z", "testbed", "x", 60, False, 0)
NAME = "vmexit.agent.userspace_exits_per_sample"
CACHE = Feature(
    "pci-config-cache",
    "Serves reads.",
    (Headline(NAME, "exits to QEMU for one sample of a monitoring agent that reads a lot"),),
    ("a.check",),
)


def rows(testbed: str, *values: float) -> tuple[Measurement, ...]:
    subjects: list[dict[str, Any]] = [
        {"variant": "vanilla"},
        {"variant": "off"},
        {"variant": "on", "series": "pci-config-cache"},
    ]
    return tuple(
        made.row(value, name=NAME, testbed=testbed, **subject, functions="13")
        for value, subject in zip(values, subjects, strict=True)
    )


REPORT = Report(
    RUN,
    (),
    (*rows("amd", 416, 416, 17), *rows("intel", 288, 288, 11)),
    (
        CheckResult("a.check", "pass", "median x = 17", "few", "because"),
        CheckResult("a.check (intel)", "pass", "median x = 11", "few", "because"),
        CheckResult("b.check", "fail", "median x = 1", "2", "because"),
    ),
    (CACHE,),
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one run that failed."""
    folder = tmp_path / "results" / "run-1"
    folder.mkdir(parents=True)
    document.write(REPORT, folder)
    document.publish(folder.parent, "run-1")
    return folder.parent


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- report ------------------------------------------------------------------------------------


def test_showing_a_failed_run_is_success_and_goes_to_stdout(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said(capsys, "report", "--results-dir", str(results))
    assert (status, err) == (0, "")
    assert "fail: 2 passed, 1 failed" in out


def test_the_text_for_a_cover_letter_is_plain_and_narrow(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = said(capsys, "report", "--text", "--results-dir", str(results))
    assert status == 0
    assert out.isascii()
    assert max(map(len, out.splitlines())) <= WIDTH
    squeezed = re.sub(r"\s+", " ", out)
    assert "pci-config-cache: vanilla off on on the amd testbed:" in squeezed
    assert "reads a lot 416 416 17 on the intel testbed:" in squeezed
    assert "reads a lot 288 288 11 Medians on an emulated host" in squeezed
    assert "Checks of the series: 2 passed. Run run-1 of nearmetal." in squeezed


def test_a_metric_may_be_chosen_instead_of_the_headlines() -> None:
    extra = [
        made.row(value, name="lspci.exits", variant=variant, series=series, path=path)  # type: ignore[arg-type]
        for path in ("cf8", "ecam")
        for variant, series, value in (("vanilla", None, 9), ("on", "pci-config-cache", 3))
    ]
    report = dataclasses.replace(REPORT, measurements=(*REPORT.measurements, *extra))
    text = re.sub(r"\s+", " ", render_text(report, (), ["lspci.exits"]))
    assert "(path=cf8) 9 3" in text
    assert "(path=ecam) 9 3" in text
    assert "monitoring agent" not in text


@pytest.mark.parametrize(
    ("series", "metrics", "says", "hint"),
    [
        (["pci-config-cach"], [], "'pci-config-cach'", "'pci-config-cache'"),
        ([], ["lspci.exit"], "'lspci.exit'", "'lspci.exits'"),
    ],
)
def test_unknown_names_get_the_nearest(
    series: list[str], metrics: list[str], says: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        render_text(REPORT, series, metrics)
    assert says in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_run_without_series_has_no_text() -> None:
    vanilla = dataclasses.replace(REPORT, measurements=REPORT.measurements[:1])
    with pytest.raises(UsageError, match="switched on no series"):
        render_text(vanilla)


CHECKS = """
schema: 1
checks:
  - name: own.few
    expression: maximum("{name}", variant="on") {limit}
    expected: few
    why: because
"""


@pytest.mark.parametrize(("limit", "status"), [("< 20", 0), ("< 5", 1)])
def test_a_run_is_judged_again_and_stays_as_it_is(
    limit: str, status: int, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (results / "run-1" / "report.json").read_bytes()
    own = results.parent / "own.yaml"
    own.write_text(CHECKS.format(name=NAME, limit=limit))
    words = ("report", "--checks", str(own), "--results-dir", str(results))
    code, out, _ = said(capsys, *words)
    assert code == status
    assert "own.few" in out
    assert "own.few (intel)" in out
    assert "b.check" not in out
    assert (results / "run-1" / "report.json").read_bytes() == before


def test_what_was_not_measured_is_an_error_again(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(CHECKS.format(name="p2p.corrupt_bytes", limit="== 0"))
    checks = load_checks(own)
    (skipped,) = judge_again(REPORT, checks)
    assert skipped.status == "skip"
    lost = CheckResult(
        *("measured:p2p:on-direct-direct-p2p", "error", ""),
        *("measured: p2p.read_mib_s, p2p.corrupt_bytes", "the guest died\nits last words"),
    )
    found = judge_again(dataclasses.replace(REPORT, checks=(lost,)), checks)
    assert [(one.name, one.status) for one in found] == [("own.few", "error"), (lost.name, "error")]
    assert "p2p.corrupt_bytes was not measured: the guest died" in found[0].reason
    assert found[1].reason == lost.reason
    assert found[1].expected == lost.expected
    # of another variant or series it says nothing
    own.write_text(CHECKS.format(name="p2p.corrupt_bytes", limit="== 0").replace('"on"', '"off"'))
    assert (
        judge_again(dataclasses.replace(REPORT, checks=(lost,)), load_checks(own))[0].status
        == "skip"
    )


def test_a_page_written_again_leaves_the_report_alone(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = results / "run-1"
    document.write(dataclasses.replace(REPORT, series=()), run)
    before = (run / "report.json").read_bytes()
    (run / "report.html").unlink()
    assert said(capsys, "report", "--html", "--results-dir", str(results))[0] == 0
    assert (run / "report.json").read_bytes() == before
    # an old report gets its cards from the series at hand
    assert "lspci and monitoring agents" in (run / "report.html").read_text()


def test_skips_for_one_reason_share_a_line(
    capsys: pytest.CaptureFixture[str], results: Path
) -> None:
    skips = tuple(
        CheckResult(f"off.{number}", "skip", "", "x", "the variant 'off' is not part of this run")
        for number in range(53)
    )
    document.write(dataclasses.replace(REPORT, checks=skips), results / "run-1")
    _, out, _ = said(capsys, "report", "--results-dir", str(results))
    assert "53 checks" in out
    assert out.count("is not part of this run") == 1


# --- compare and list --------------------------------------------------------------------------


def test_compare_fails_on_worse_only_where_asked(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "run-2").mkdir()
    worse = tuple(
        made.changed(row, values=[value * 2 for value in row.values]) for row in REPORT.measurements
    )
    document.write(dataclasses.replace(REPORT, measurements=worse), results / "run-2")
    words = ("compare", "run-1", "run-2", "--results-dir", str(results))
    assert said(capsys, *words)[0] == 0
    assert said(capsys, *words, "--fail-on-worse")[0] == 1
    back = ("compare", "run-2", "run-1", "--results-dir", str(results), "--fail-on-worse")
    assert said(capsys, *back)[0] == 0
    _, out, _ = said(capsys, *words, "--json")
    assert len(json.loads(out)["rows"]) == 6


def test_runs_are_listed_the_newest_first_with_their_verdicts(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "run-2").mkdir()
    passed = dataclasses.replace(REPORT, checks=REPORT.checks[:1])
    document.write(passed, results / "run-2")
    (results / "run-0").mkdir()
    (results / "run-0" / "report.json").write_text("{")
    _, out, _ = said(capsys, "list", "runs", "--json", "--results-dir", str(results))
    found = json.loads(out)
    assert [(one["run"], one["verdict"]) for one in found] == [
        *(("run-2", "pass"), ("run-1", "fail"), ("run-0", "-")),
    ]
    assert "not JSON" in found[2]["checks"]
    status, out, err = said(capsys, "list", "runs", "--results-dir", str(results / "none"))
    assert (status, out, err) == (0, "", "no runs\n")


# --- verbosity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "seen", "unseen"),
    [
        (ui.QUIET, ["warning: w", "nearmetal: e", "  hint: h"], ["progress", "==> work", "+ true"]),
        (ui.NORMAL, ["warning: w", "nearmetal: e", "progress", "==> work"], ["+ true"]),
        (ui.VERBOSE, ["warning: w", "nearmetal: e", "progress", "==> work", "+ true 'a b'"], []),
    ],
)
def test_what_is_told_at_each_level(
    level: int, seen: list[str], unseen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ui.set_level(level)
    try:
        ui.say("progress")
        ui.warn("w")
        ui.tell_error(NearmetalError("e", hint="h"))
        ui.trace(["true", "a b"])
        with ui.step("work"):
            pass
        ui.out.print("result")
    finally:
        ui.set_level(ui.NORMAL)
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    for text in seen:
        assert text in captured.err
    for text in unseen:
        assert text not in captured.err
    assert "\x1b" not in captured.err  # no terminal, so no line that changes


def test_on_a_terminal_the_line_that_changes_is_erased(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(ui.console), "is_terminal", property(lambda self: True))
    monkeypatch.setattr(ui, "_LIVE_S", 0.01)
    with ui.step("work") as step, ui.step("other"):
        step.status = "for the kernel"
        while "work: 0 s for the kernel" not in (told := capsys.readouterr().err):
            assert told is not None
    assert "\r\x1b[K" in capsys.readouterr().err


# --- the user's configuration ------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("NEARMETAL_CACHE", raising=False)
    path = tmp_path / "nearmetal" / "config.yaml"
    path.parent.mkdir()
    return path


def test_the_configuration_gives_defaults_that_options_and_environment_override(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.write_text("cache_dir: /c\nresults_dir: ~/r\njobs: 3\ninventory: hosts.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert settings.default_cache_dir() == Path("/c")
    assert settings.default_results_dir(Path("/repo")) == Path("~/r").expanduser()
    options = parser().parse_args(["run"])
    assert options.jobs == 3
    assert options.inventory == config.parent / "hosts.yaml"
    assert parser().parse_args(["run", "-j", "1"]).jobs == 1
    (tmp_path / "inventory.yaml").touch()
    assert parser().parse_args(["run"]).inventory == Path("inventory.yaml")
    monkeypatch.setenv("NEARMETAL_CACHE", "/other")
    assert settings.default_cache_dir() == Path("/other")


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("cache: /c", "unknown key 'cache'", "'cache_dir'"),
        ("jobs: many", "jobs is not a number", "commands.md"),
        ("jobs: 0", "jobs is not a number", "commands.md"),
        ("jobs: true", "jobs is not a number", "commands.md"),
        ("cache_dir: 3", "cache_dir is not a path", "commands.md"),
        ("- a", "not a mapping", "jobs: 4"),
        ("a: [", "not YAML", "jobs: 4"),
        ("jobs: 1\njobs: 2", "'jobs' comes twice", "jobs: 4"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_line(
    config: Path, text: str, says: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    status, _, err = said(capsys, "list", "tests")
    assert status == 2
    assert says in err
    assert hint in err
    assert str(config) in err


def test_an_empty_configuration_is_none(config: Path) -> None:
    config.write_text("# nothing\n")
    assert settings.user_config() == {}


# --- one default for what is measured ----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "testbed"),
    [
        ([], "both"),
        (["-j", "2", "--cache-dir", "/c", "--results-dir", "/r", "-v"], "both"),
        (["--only", "lspci"], None),
        (["--variant", "vanilla"], None),
        (["--linux-tree", "/l"], None),
        (["--keep"], None),
        (["--testbed", "intel"], "intel"),
        (["--host", "gpu1"], None),
    ],
)
def test_both_hosts_are_measured_unless_something_is_chosen(
    words: list[str], testbed: str | None
) -> None:
    assert runcmd.testbed_of(parser().parse_args(["run", *words])) == testbed


# --- what is made from the parser --------------------------------------------------------------


def every_level() -> list[completion.Level]:
    return list(
        completion.levels(parser(), {"/run only": ("lspci", "vmexit"), "series": ("pci-ecam",)})
    )


def test_no_command_offers_an_option_of_another() -> None:
    found = {
        level.at: {name for one in level.options for name in one.names} for level in every_level()
    }
    for at in ("/report", "/compare", "/list", "/cache", "/ssh", "/tree/status", "/completion"):
        assert not found[at] & {"-j", "--jobs", "--qemu-tree", "--linux-tree", "--testbed"}, at
    for at, options in found.items():
        if at not in ("", "/tree", "/history"):
            assert {"--quiet", "--verbose"} <= options, at
    assert "-v" in found["/export"]


def test_help_of_each_command_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for level in every_level():
        for line in level.parser.format_help().splitlines():
            assert len(line) <= 80, (level.at, line)


COMPLETED = [
    ("nearmetal ", {"run", "tree", "report", "--help"}, {"--only"}),
    ("nearmetal ru", {"run"}, set()),
    ("nearmetal run --only ", {"lspci", "vmexit"}, {"--only", "run"}),
    ("nearmetal run --", {"--only", "--variant"}, {"--tolerance"}),
    ("nearmetal tree ", {"checkout", "new-series"}, {"run"}),
    ("nearmetal tree checkout ", {"linux", "testbed"}, {"checkout"}),
    ("nearmetal list ", {"runs", "hosts"}, set()),
    ("nearmetal boot --series ", {"pci-ecam"}, {"--series"}),
    ("nearmetal suite --only ", set(), {"lspci"}),  # tests of a suite are not ours
]


def held(found: set[str], line: str, wanted: set[str], unwanted: set[str]) -> None:
    assert wanted <= found, (line, found)
    assert not unwanted & found, (line, found)


def test_bash_completes(tmp_path: Path) -> None:
    script = tmp_path / "nearmetal.bash"
    script.write_text(completion.bash(every_level()))
    for line, wanted, unwanted in COMPLETED:
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        done = subprocess.run(
            [
                *("bash", "-c"),
                f". {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _nearmetal;"
                ' printf "%s\\n" "${COMPREPLY[@]}"',
            ],
            *(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        held(set(done.stdout.split()), line, wanted, unwanted)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path: Path) -> None:
    script = tmp_path / "nearmetal.fish"
    script.write_text(completion.fish(every_level()))
    for line, wanted, unwanted in COMPLETED:
        if line.endswith(" ") and "--help" in wanted:
            wanted = wanted - {"--help"}  # fish shows options behind a dash alone
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        held({word.split("\t")[0] for word in done.stdout.splitlines()}, line, wanted, unwanted)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(tmp_path: Path) -> None:
    """The function alone: what it hands to compadd is looked at in place of the line editor."""
    script = tmp_path / "nearmetal.zsh"
    script.write_text(completion.zsh(every_level()))
    for line, wanted, unwanted in COMPLETED:
        if line == "nearmetal ru":
            continue  # zsh itself picks what fits
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        done = subprocess.run(
            [
                *("zsh", "-f", "-c"),
                "compdef() { :; }; _files() { :; }; compadd() { shift; print -l -- $@; };"
                f" . {script}; words=({quoted}); CURRENT={len(words)}; _nearmetal",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        held(set(done.stdout.split()), line, wanted, unwanted)


def test_the_man_page_has_each_command_and_option() -> None:
    every = every_level()
    page = completion.manual(every)
    for level in every[1:]:
        assert ".SS " + ("nearmetal" + level.at.replace("/", " ")).replace("-", "\\-") in page
        for word in level.options:
            for name in word.names:
                assert name.replace("-", "\\-") in page
    for line in page.splitlines():
        if line.startswith("."):
            assert re.match(r"\.(TH|SH|SS|TP|PP|B|I|\\\")", line), line


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_man_page_is_troff_without_warnings() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-ww", "-z"],
        input=completion.manual(every_level()),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["completion", "bash"], ["completion", "fish"], ["man"]])
def test_they_are_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, *words)
    assert (status, err) == (0, "")
    assert "pmu-passthrough" in out or words == ["man"]
    assert "lspci" in out


def test_a_closed_pipe_is_no_error() -> None:
    program = "import sys; from nearmetal.cli.main import main; sys.exit(main(['man']))"
    line = f'{sys.executable} -c "{program}" | head -n 1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


def test_known_is_what_parsers_take() -> None:
    """No option has both its choices and a list of values that are not its choices."""
    for level in every_level():
        for action in level.parser._actions:
            if action.choices and not isinstance(action, argparse._SubParsersAction):
                assert action.dest not in ("only", "variant", "series", "metric")
