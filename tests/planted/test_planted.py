# SPDX-License-Identifier: GPL-2.0-or-later
"""A night with a planted regression is red, and everything that tells of it names exactly that.

Nights are those of tests/avocado/job.py, cut down to the test and series that the patch is about.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearmetal.core import settings
from nearmetal.nights import states

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

REPO = settings.repository()
FOLDER = Path(__file__).parent
NIGHT_DEADLINE_S = 2 * 3600.0


@dataclass(frozen=True)
class Planted:
    """A regression: what it must turn red, and what follows from that."""

    series: str
    test: str
    check: str
    """The check that says it best."""
    checks: frozenset[str]
    """All that fail of those that need no vanilla: the night has none, and the history tells."""
    figure: str
    """The figure it is about."""
    more: float
    """How much is added to one of its rows at least; exactly where it is counted."""
    follow: frozenset[str]
    """Figures that may change with it."""


PLANTED = {
    "linux-pci-config-cache": Planted(
        series="pci-config-cache",
        test="lspci",
        check="pci-config-cache.other-reads-miss-exactly",
        checks=frozenset({"pci-config-cache.other-reads-miss-exactly"}),
        figure="lspci.userspace_exits",
        more=1,
        follow=frozenset({"lspci.userspace_exits_cacheable"}),
    ),
    "linux-pmu-fastpath": Planted(
        series="pmu-fastpath",
        test="vmexit",
        check="pmu-fastpath.selector-writes-do-not-switch",
        checks=frozenset(),
        figure="vmexit.agent.pmu_switches_per_sample",
        more=0.9,
        follow=frozenset(
            {
                "pmu.selector_write_instructions",
                "vmexit.agent.pmu_switches_by_cause",
            }
        ),
    ),
}


def test_every_planted_patch_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.patch")} == set(PLANTED)


@dataclass(frozen=True)
class Morning:
    """What a night left."""

    status: int
    line: str
    page: str
    said: str


def night(repo: Path, results: Path, one: Planted) -> Morning:
    """A night of one test on one series, with the project that lies in ``repo``."""
    job = [sys.executable, str(REPO / "tests" / "avocado" / "job.py"), "--quick"]
    words = [*job, "--tags", f"amd,{one.test}", "--series", one.series]
    words += ["--variant", "on"]
    done = subprocess.run(
        [*words, "--results-dir", str(results)],
        cwd=repo,
        env=environment(repo),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=NIGHT_DEADLINE_S,
        check=False,
    )
    newest = sorted((results / "nights").iterdir())[-1]
    summary = (newest / "summary.txt").read_text().strip()
    return Morning(
        done.returncode, summary, html.unescape((newest / "page.html").read_text()), done.stdout
    )


def environment(repo: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repo / "harness")}


def nearmetal(repo: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nearmetal", *words],
        cwd=repo,
        env=environment(repo),
        capture_output=True,
        text=True,
        timeout=NIGHT_DEADLINE_S,
        check=False,
    )


def plant(name: str, target: Path) -> None:
    """Put a patch into a copy of the project, as the last one of its series."""
    tree, series = name.split("-", 1)
    folder = target / "patches" / tree / series
    number = len(list(folder.glob("0*.patch"))) + 1
    shutil.copy2(FOLDER / f"{name}.patch", folder / f"{number:04}-planted.patch")


def figure(folder: Path, name: str, series: str) -> dict[str, float]:
    """The medians of a figure with a series on, by context, of the one run below a folder."""
    (file,) = [one for one in folder.rglob("report.json") if one.parent.name != "latest"]
    return {
        json.dumps(row["context"], sort_keys=True): row["median"]
        for row in json.loads(file.read_text())["measurements"]
        if (row["name"], row["variant"], row.get("series")) == (name, "on", series)
    }


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_night_with_it_names_it(tmp_path: Path, name: str) -> None:
    one = PLANTED[name]
    clean, planted, results = tmp_path / "clean", tmp_path / "planted", tmp_path / "results"
    states.copy(REPO, clean)
    states.copy(REPO, planted)
    plant(name, planted)

    before = night(clean, results, one)
    assert before.status == 0, before.said
    assert "GREEN" in before.line

    after = night(planted, results, one)
    print(after.line)
    assert after.status == 1, after.said
    assert "RED" in after.line

    shown = nearmetal(planted, "history", "show", "--json", "--results-dir", str(results))
    assert shown.returncode == 1
    found = json.loads(shown.stdout)
    red = [
        change for change in found["changes"] if change["kind"] in ("failed", "worse", "differs")
    ]
    failed = {change["what"].split(" (")[0] for change in red if change["kind"] == "failed"}
    assert failed == one.checks
    figures = {change["what"].split("[")[0] for change in red if change["kind"] != "failed"}
    assert one.figure in figures <= {one.figure, *one.follow}
    for change in red:
        assert change["kind"] == "failed" or f"[on, {one.series}" in change["what"], change
        assert change["text"] in after.page, "the page does not tell it"
        assert any("host kernel" in what for what in change["since"]["between"]), change
    more = f" (and {len(red) - 1} more)" if len(red) > 1 else ""
    assert f"RED, {red[0]['text']}{more}; " in after.line
    line = nearmetal(planted, "history", "show", "--line", "--results-dir", str(results))
    assert (line.returncode, red[0]["text"] in line.stdout) == (1, True)

    nights = sorted((results / "nights").iterdir())
    was, now = (figure(folder, one.figure, one.series) for folder in nights)
    added = {key: now[key] - was[key] for key in was if now[key] != was[key]}
    print(f"{one.figure}: {added}")
    assert max(added.values()) >= one.more
    if one.figure.endswith("exits"):
        assert set(added.values()) == {one.more}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_bisect_names_the_patch(tmp_path: Path, name: str) -> None:
    one = PLANTED[name]
    planted = tmp_path / "planted"
    states.copy(REPO, planted)
    good = len(list((planted / "patches/linux" / one.series).glob("0*.patch")))
    plant(name, planted)
    words = ["bisect", one.check, "--series", one.series, "--tree", "linux", "--good", str(good)]
    done = nearmetal(planted, *words, "--json", "--results-dir", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    subject = states.subject_of(FOLDER / f"{name}.patch")
    number = f"{good + 1:04}"
    assert found["line"] == f"first bad: patch {number} {subject} (linux/{one.series})"
    outcomes = {judged["changes"]: judged["outcome"] for judged in found["judged"]}
    assert outcomes == {good: "good", good + 1: "bad"}
