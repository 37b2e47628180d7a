# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody else's test and series: found everywhere, with no file of the package touched.

The toy is a distribution with an entry point, as ``pip install`` would leave it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes

from nearmetal.core.cache import Cache
from nearmetal.core.errors import Exit, UsageError
from nearmetal.core.model import Subject
from nearmetal.core.settings import Settings
from nearmetal.judging.load import load_checks
from nearmetal.measure import registry
from nearmetal.patches.series import load_series
from nearmetal.patches.variants import configs
from nearmetal.report import document
from nearmetal.runs import execute, plan

TOY = """
from pathlib import Path

from nearmetal.machines.equipment import ARRANGED
from nearmetal.measure.api import Metric, Setup, Test


def measure(bench):
    out = bench.guest.shell.run("echo 42").stdout
    return [bench.row("toy.answer", [int(out), int(out)], kind="plain")]


TEST = Test(
    "toy",
    "A toy (toy)",
    measure,
    (Metric("toy.answer", "answers", "what a shell says", keys={"kind": ("plain", "fancy")}),),
    order=99,
    setups=(Setup("toyed", variants=("vanilla",), needs=(ARRANGED,), iommufd=True),
            Setup("asked-for", control=True)),
    functions=("toy-function",),
    checks=Path(__file__).with_name("toy.yaml"),
)
"""
CHECKS = """
schema: 1
checks:
  - name: toy.is-42
    expression: minimum("toy.answer", kind="plain") == 42
    expected: "42"
    why: It says so.
"""
SERIES = """
series:
  - name: toy-series
    tree: qemu
    order: 1
    base: "11.1"
    purpose: Does nothing.
    about: Answers by a shell, none of them wrong.
    headlines:
      - {metric: toy.answer, label: what a shell is asked for, after: {setup: asked-for}}
    tests: [toy]
    checks: [toy.is-42]
    enable:
      qemu: {toy.on: true}
      setups: [asked-for]
      functions: {toy-function: toy-driver}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the toy, which is on Python's path."""
    (tmp_path / "nm_toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(CHECKS)
    info = tmp_path / "nm_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nm-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nearmetal.tests]\ntoy = nm_toy:TEST\n")
    patches = tmp_path / "patches" / "qemu" / "toy-series"
    patches.mkdir(parents=True)
    (patches / "0001-toy.patch").touch()
    (tmp_path / "patches" / "series.yaml").write_text(SERIES)
    monkeypatch.syspath_prepend(tmp_path)
    registry.forget()
    yield tmp_path
    sys.modules.pop("nm_toy", None)
    monkeypatch.undo()
    registry.forget()


def test_plan_schema_and_checks_have_it(toy: Path) -> None:
    every = load_series(toy / "patches", known=plan.known(["toy.is-42"]))
    assert registry.functions()[-1] == "toy-function"
    wanted = configs(every, ("vanilla", "on"))
    work = plan.work(wanted, ("toy",), plan.equipment_of("amd"))
    labels = [one.subject.label for one in work]
    assert labels == ["vanilla", "vanilla-toyed", "on-asked-for-toy-series"]
    assert "toy.is-42" in [check.name for check in load_checks()]


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("tests: [toy]", "tests: [toyy]", "'toy'"),
        ("metric: toy.answer", "metric: toy.answr", "'toy.answer'"),
        ("after: {setup: asked-for}", "after: {setup: askd-for}", "'asked-for'"),
        ("after: {setup: asked-for}", "rows: {kin: plain}", "'kind'"),
        ("after: {setup: asked-for}", "rows: {kind: plane}", "'plain'"),
        ("setups: [asked-for]", "setups: [toyed]", "asked-for"),
        ("toy-function:", "toy-functio:", "'toy-function'"),
        ("checks: [toy.is-42]", "checks: [toy.is-43]", "'toy.is-42'"),
    ],
)
def test_names_are_held_to_what_it_declares(toy: Path, old: str, new: str, hint: str) -> None:
    (toy / "patches" / "series.yaml").write_text(SERIES.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_series(toy / "patches", known=plan.known(["toy.is-42"]))
    assert hint in str(caught.value.hint)


def test_a_whole_run_of_it(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan to report.json and the page, on a lab that is this machine's shell."""
    settings = Settings(toy, toy / "cache", toy / "results")
    equipment = plan.equipment_of("amd")
    lab = fakes.FakeLab(settings, Cache(toy / "cache"), equipment=equipment)
    fakes.install(monkeypatch, lab)
    status, folder = execute.execute(settings, execute.Options(tests=("toy",)))
    found = document.read(folder)
    assert status == Exit.OK, [one for one in found.checks if one.status != "pass"]
    assert {row.subject for row in found.measurements} == {
        Subject("vanilla", testbed="amd"),
        Subject("vanilla", setup="toyed", testbed="amd"),
        Subject("off", testbed="amd"),
        Subject("on", "toy-series", "asked-for", "amd"),
    }
    assert {check.name: check.status for check in found.checks}["toy.is-42"] == "pass"
    page = (folder / document.HTML_NAME).read_text()
    assert "A toy (toy)" in page
    assert "Answers by a shell, none of them wrong." in page
    assert "what a shell is asked for" in page
    assert lab.booted == [
        *("vanilla", "vanilla", "vanilla-toyed"),
        *("off", "on-asked-for-toy-series"),
    ]


def test_a_guest_that_breaks_is_an_error_of_its_subject_alone(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearmetal.core.errors import MeasurementError

    settings = Settings(toy, toy / "cache", toy / "results")
    lab = fakes.FakeLab(settings, Cache(toy / "cache"), equipment=plan.equipment_of("amd"))
    lab.broken["off"] = MeasurementError("QEMU did not start", detail="its last words")
    fakes.install(monkeypatch, lab)
    status, folder = execute.execute(settings, execute.Options(tests=("toy",)))
    found = document.read(folder)
    assert status == Exit.FAILED
    bad = {one.name: one for one in found.checks if one.status in ("fail", "error")}
    assert set(bad) == {"toy.is-42", "measured:toy:off"}
    assert "its last words" in bad["measured:toy:off"].reason
    assert len(found.measurements) == 3


def test_a_test_with_a_fault_of_its_own_takes_no_other_unit_along(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's test must not cost the hours that were measured before it."""
    faulty = TOY.replace("    out =", "    if bench.variant == 'off':\n        1 / 0\n    out =")
    (toy / "nm_toy.py").write_text(faulty)
    settings = Settings(toy, toy / "cache", toy / "results")
    lab = fakes.FakeLab(settings, Cache(toy / "cache"), equipment=plan.equipment_of("amd"))
    fakes.install(monkeypatch, lab)
    status, folder = execute.execute(settings, execute.Options(tests=("toy",)))
    found = document.read(folder)
    assert status == Exit.FAILED
    bad = {one.name: one.reason for one in found.checks if one.status == "error"}
    assert "the test toy has a fault: ZeroDivisionError" in bad["measured:toy:off"]
    assert len(found.measurements) == 3
    (log,) = (folder / "logs").rglob("*-fault.log")
    assert "Traceback" in log.read_text()


def test_what_a_set_up_leaves_behind_fails_what_was_measured_in_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = TOY.replace("control=True", "control=True, after=broken").replace(
        "TEST = Test(",
        "def broken(host):\n    from nearmetal.core.errors import MeasurementError\n"
        "    raise MeasurementError('ports no longer redirect')\n\n\nTEST = Test(",
    )
    (toy / "nm_toy.py").write_text(left)
    settings = Settings(toy, toy / "cache", toy / "results")
    lab = fakes.FakeLab(settings, Cache(toy / "cache"), equipment=plan.equipment_of("amd"))
    fakes.install(monkeypatch, lab)
    _, folder = execute.execute(settings, execute.Options(tests=("toy",)))
    bad = [one for one in document.read(folder).checks if one.name.startswith("measured:")]
    assert [one.name for one in bad] == ["measured:toy:on-asked-for-toy-series"]
    assert "ports no longer redirect" in bad[0].reason


def test_a_host_that_does_not_boot_fails_all_that_is_planned_on_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearmetal.core.errors import MeasurementError

    settings = Settings(toy, toy / "cache", toy / "results")
    lab = fakes.FakeLab(settings, Cache(toy / "cache"), equipment=plan.equipment_of("amd"))
    lab.hosts_broken.append(MeasurementError("the host did not come up"))
    fakes.install(monkeypatch, lab)
    status, folder = execute.execute(settings, execute.Options(tests=("toy",)))
    assert status == Exit.FAILED
    names = {one.name for one in document.read(folder).checks if one.status == "error"}
    assert {
        *("measured:toy:vanilla", "measured:toy:vanilla-toyed"),
        *("measured:toy:off", "measured:toy:on-asked-for-toy-series"),
    } <= names


def test_help_and_lists_have_it(toy: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{toy}:{os.environ['PYTHONPATH']}"}

    def said(*words: str) -> str:
        line = [sys.executable, "-m", "nearmetal", *words]
        return subprocess.run(
            line, capture_output=True, text=True, check=True, env=environment
        ).stdout

    assert "imc, toy)" in " ".join(said("run", "--help").split())
    tests = json.loads(said("list", "tests", "--json"))
    assert tests[-1] == {"test": "toy", "set-ups": "toyed, asked-for", "about": "A toy (toy)"}
    metrics = json.loads(said("list", "metrics", "--json"))
    assert cast(dict[str, Any], metrics[-1])["metric"] == "toy.answer"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"toy.answer", "answers"', '"lspci.exits", "answers"', "both have a metric"),
        ('    "toy",\n', '    "lspci",\n', "two tests 'lspci'"),
        ('keys={"kind"', 'keys={"setup"', "uses the reserved context key 'setup'"),
        ('Setup("toyed"', 'Setup("bare"', "the set-up 'bare' differently"),
        ("TEST = Test(", "TEST = dict(", "cannot be loaded"),
        ("from pathlib import Path", "import no_such_module", "cannot be loaded"),
    ],
)
def test_a_test_that_cannot_be_taken_is_refused_in_one_line(
    toy: Path, old: str, new: str, says: str
) -> None:
    assert old in TOY
    (toy / "nm_toy.py").write_text(TOY.replace(old, new))
    registry.forget()
    with pytest.raises(UsageError) as caught:
        registry.tests()
    assert says in caught.value.message
    assert "\n" not in caught.value.message
