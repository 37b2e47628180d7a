# SPDX-License-Identifier: GPL-2.0-or-later
"""The search for the first bad change, without a testbed: what judges a state is given here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nearmetal.cli import bisectcmd
from nearmetal.cli.main import main
from nearmetal.core import settings
from nearmetal.core.errors import EnvironmentBroken, MeasurementError, UsageError
from nearmetal.nights import states
from nearmetal.nights.bisect import Change, Judged, first_bad
from nearmetal.patches.series import load_series
from nearmetal.patches.variants import configs
from nearmetal.report import document

REPO = settings.repository()
CHECK = "pci-config-cache.other-reads-miss-exactly"
OFF = "off.cf8-exits-equal-vanilla"
Capture = pytest.CaptureFixture[str]


def changes(count: int) -> list[Change]:
    return [Change("patch", f"{number:04}", f"change {number}") for number in range(1, count + 1)]


def judge(first: int, skipped: tuple[int, ...] = ()) -> tuple[Callable[[int], Judged], list[int]]:
    """A judge to whom all states from ``first`` are bad, and what it was asked."""
    asked: list[int] = []

    def one(state: int) -> Judged:
        asked.append(state)
        if state in skipped:
            return Judged("skip", "it does not build")
        return Judged("bad" if state >= first else "good", f"{state}")

    return one, asked


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_each_change_is_found_in_few_steps(count: int) -> None:
    for first in range(1, count + 1):
        ask, asked = judge(first)
        found = first_bad(changes(count), ask)
        assert [one.name for one in found.first] == [f"{first:04}"]
        assert found.line == f"first bad: patch {first:04} change {first}"
        assert len(asked) == len(set(asked)) <= 2 + (count - 1).bit_length()


def test_what_cannot_be_judged_is_skipped() -> None:
    ask, asked = judge(4, skipped=(6, 7))
    assert [one.name for one in first_bad(changes(12), ask).first] == ["0004"]
    assert asked.count(6) == 1


def test_a_gap_is_told_as_one() -> None:
    ask, asked = judge(6, skipped=(4, 5, 6))
    found = first_bad(changes(8), ask)
    assert [one.name for one in found.first] == ["0004", "0005", "0006", "0007"]
    assert "one of 4, from patch 0004 change 4 to patch 0007 change 7" in found.line
    assert sorted(asked) == sorted(set(asked))


def test_a_good_state_that_cannot_be_judged_is_believed() -> None:
    ask, _ = judge(3, skipped=(0,))
    assert [one.name for one in first_bad(changes(5), ask).first] == ["0003"]


def test_nothing_is_searched_where_both_ends_are_the_same() -> None:
    with pytest.raises(MeasurementError, match="passes with all 4 changes"):
        first_bad(changes(4), judge(9)[0])
    with pytest.raises(MeasurementError, match="cannot be judged with all 4 changes"):
        first_bad(changes(4), judge(2, skipped=(4,))[0])
    with pytest.raises(MeasurementError, match="fails without any"):
        first_bad(changes(4), judge(0)[0])
    with pytest.raises(MeasurementError, match="fails without any"):
        first_bad(changes(4), judge(2)[0], good=2)


def test_what_is_known_is_not_asked_again() -> None:
    ask, asked = judge(3)
    known = {8: Judged("bad", "8"), 0: Judged("good", "0"), 4: Judged("bad", "4")}
    assert [one.name for one in first_bad(changes(8), ask, known=known).first] == ["0003"]
    assert not set(asked) & set(known)


# --- states -----------------------------------------------------------------------------------


def patches_of(name: str, tree: str | None = None) -> states.PatchStates:
    every = load_series(REPO / "patches")
    return states.patch_states(REPO, REPO / "patches", every, name, tree=tree)


def test_a_state_has_the_first_patches_and_no_series_behind(tmp_path: Path) -> None:
    found = patches_of("pci-ecam")
    kinds = [(one.where, one.name) for one in found.changes]
    linux = [path.name[:4] for path in (REPO / "patches/linux/pci-ecam").glob("0*.patch")]
    assert kinds[: len(linux)] == [("linux/pci-ecam", name) for name in sorted(linux)]
    assert kinds[len(linux)] == ("qemu/pci-ecam", "0001")
    assert str(found.changes[0]) == (
        "patch 0001 x86/PCI: Find out which devices are better read by ECAM (linux/pci-ecam)"
    )
    for state in (0, 1, len(linux) + 1, len(kinds)):
        found.make(state, tmp_path / "state")
        every = load_series(tmp_path / "state" / "patches")
        assert {one.name for one in every if one.is_product} == {"pci-config-cache", "pci-ecam"}
        there = [path for one in every if one.name == "pci-ecam" for path in one.patches()]
        assert [path.name for path in there] == [path.name for path in found.files[:state]]
        off = configs(every, ("off",))[0]
        below = [one for one in every if one.name == "pci-config-cache" and one.tree == "linux"]
        assert off.linux_patches[: len(below[0].patches())] == below[0].patches()
    assert (tmp_path / "state/harness/nearmetal/__main__.py").is_file()


def test_with_a_tree_the_other_part_is_whole(tmp_path: Path) -> None:
    found = patches_of("pci-config-cache", "linux")
    found.make(1, tmp_path / "state")
    assert len(list((tmp_path / "state/patches/linux/pci-config-cache").glob("*.patch"))) == 1
    qemu = "patches/qemu/pci-config-cache"
    names = {path.name for path in (tmp_path / "state" / qemu).glob("*.patch")}
    assert names == {path.name for path in (REPO / qemu).glob("*.patch")}


@pytest.mark.parametrize(
    ("name", "tree", "said"),
    [
        ("pci-ekam", None, "there is no series"),
        ("pmu-fastpath", "qemu", "has no patches for qemu"),
        ("tcg-svm", None, "is in nothing whose checks are run"),
    ],
)
def test_series_that_cannot_be_searched(name: str, tree: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        patches_of(name, tree)


def test_commits_are_states_of_the_project(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "patches").mkdir(parents=True)

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(repo), *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    for number in range(4):
        (repo / "patches" / "series.yaml").write_text(f"{number}")
        git("add", ".")
        git("commit", "-qm", f"subject {number}\n\nbody")
    found = states.commit_states(repo, "HEAD~3..HEAD")
    assert [one.subject for one in found.changes] == ["subject 1", "subject 2", "subject 3"]
    assert found.changes[2].name == git("rev-parse", "HEAD")[:12]
    for state in range(4):
        found.make(state, tmp_path / "state")
        assert (tmp_path / "state/patches/series.yaml").read_text() == f"{state}"
    for words, said in (
        ("HEAD", "are no commits"),
        ("nowhere..HEAD", "git does not know"),
        ("HEAD..HEAD~1", "there is no commit"),
    ):
        with pytest.raises(UsageError, match=said):
            states.commit_states(repo, words)


# --- judging by a run -------------------------------------------------------------------------

NIGHT = Path(__file__).parent / "data" / "night.json"
PROGRAM = f"""
import json, pathlib, sys
words = sys.argv[1:]
state = pathlib.Path("state.txt").read_text()
results = pathlib.Path(words[words.index("--results-dir") + 1])
ends = {{"breaks": (3, "nearmetal: Linux 7.3 does not build: 'make' ended with status 2"),
        "full": (3, "nearmetal: the disk is full: 'cp' could not go on"),
        "old": (2, "nearmetal: unknown option"),
        "conflict": (3, "nearmetal: 'patch' ended\\n  hint: 1.patch does not apply; see validate")}}
if state in ends:
    print(ends[state][1], file=sys.stderr)
    sys.exit(ends[state][0])
report = json.loads(pathlib.Path({str(NIGHT)!r}).read_text())
report["checks"] = [one for one in report["checks"] if one["name"] != {CHECK!r}]
if state != "gone":
    report["checks"].append({{"name": {CHECK!r}, "status": state, "observed": "570 exits",
                             "expected": "x", "reason": "it says so"}})
folder = results / "run-1"
folder.mkdir()
(folder / "report.json").write_text(json.dumps(report))
sys.exit(state == "fail")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose runs end as its state.txt says."""
    (tmp_path / "harness" / "nearmetal").mkdir(parents=True)
    (tmp_path / "harness" / "nearmetal" / "__init__.py").touch()
    (tmp_path / "harness" / "nearmetal" / "__main__.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize(
    ("state", "outcome", "why"),
    [
        ("pass", "good", "570 exits"),
        ("fail", "bad", "570 exits"),
        ("error", "skip", "it says so"),
        ("skip", "skip", "it says so"),
        ("gone", "skip", "has no check"),
        ("breaks", "skip", "does not build"),
        ("conflict", "skip", "'patch' ended"),
        ("old", "skip", "unknown option"),
    ],
)
def test_a_run_judges_its_state(project: Path, state: str, outcome: str, why: str) -> None:
    (project / "state.txt").write_text(state)
    question = bisectcmd.Question(CHECK, ("--only", "lspci"))
    found = bisectcmd.judged(question, project, project / "results")
    assert found.outcome == outcome
    assert why in found.why


def test_a_broken_environment_says_nothing_of_a_state(project: Path) -> None:
    (project / "state.txt").write_text("full")
    with pytest.raises(EnvironmentBroken, match="the disk is full"):
        bisectcmd.judged(bisectcmd.Question(CHECK, ()), project, project / "results")


def words_of(*words: str) -> list[str]:
    from nearmetal.cli.common import settings_of
    from nearmetal.cli.main import parser

    options = parser().parse_args(["bisect", *words])
    return list(bisectcmd.question_of(options, settings_of(options)).words)


def test_only_what_the_check_needs_is_run(tmp_path: Path) -> None:
    words = words_of(CHECK, "--series", "pci-config-cache")
    assert words[:8] == [
        *("--only", "lspci", "--testbed", "amd", "--variant", "on"),
        *("--series", "pci-config-cache"),
    ]
    words = words_of(OFF, "--series", "pci-ecam", "--testbed", "intel")
    assert words[2:6] == ["--testbed", "intel", "--variant", "vanilla,off"]
    assert "--series" not in words
    ratio = "pci-config-cache.dword-costs-a-third"
    words = words_of(ratio, "--series", "pci-config-cache")
    assert words[4:6] == ["--variant", "vanilla,on"]
    words = words_of(CHECK, "--step", "--linux-tree", str(tmp_path))
    assert "--variant" not in words
    assert words[words.index("--linux-tree") + 1] == str(tmp_path)


# --- the command ------------------------------------------------------------------------------


class Stopped(Exception):
    """The power went."""


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], dict[str, int]]:
    """Runs in whose place something counts patches: what it was asked, and what is bad."""
    asked: list[int] = []
    knobs = {"first": 4, "stop": 99}

    def judged(question: bisectcmd.Question, repo: Path, results: Path) -> Judged:
        if len(asked) >= knobs["stop"]:
            raise Stopped
        folder = repo / "patches" / "linux" / "pci-config-cache"
        count = len(list(folder.glob("*.patch")))
        asked.append(count)
        return Judged("bad" if count >= knobs["first"] else "good", f"{count} patches")

    monkeypatch.setattr(bisectcmd, "judged", judged)
    return asked, knobs


def search(tmp_path: Path, *more: str) -> int:
    words = ["bisect", CHECK, "--series", "pci-config-cache", "--tree", "linux", "-q"]
    return main([*words, "--results-dir", str(tmp_path), *more])


def test_the_verdict_is_one_line(
    tmp_path: Path, judges: tuple[list[int], dict[str, int]], capsys: Capture
) -> None:
    assert search(tmp_path) == 0
    subject = patches_of("pci-config-cache", "linux").changes[3].subject
    line = f"first bad: patch 0004 {subject} (linux/pci-config-cache)"
    assert capsys.readouterr().out == line + "\n"
    asked = list(judges[0])
    assert search(tmp_path, "--json") == 0
    assert judges[0] == asked, "what is known was judged again"
    found = json.loads(capsys.readouterr().out)
    assert found["line"] == line
    assert found["first_bad"]["name"] == "0004"
    assert {one["changes"]: one["outcome"] for one in found["judged"]}[4] == "bad"
    assert search(tmp_path, "--anew") == 0
    assert judges[0] == asked * 2


def test_a_search_goes_on_where_it_was_ended(
    tmp_path: Path, judges: tuple[list[int], dict[str, int]], capsys: Capture
) -> None:
    asked, knobs = judges
    knobs["stop"] = 2
    with pytest.raises(Stopped):
        search(tmp_path)
    assert len(asked) == 2
    knobs["stop"] = 99
    assert search(tmp_path) == 0
    assert len(asked) == len(set(asked))
    assert "patch 0004" in capsys.readouterr().out


def test_nothing_is_wrong(
    tmp_path: Path, judges: tuple[list[int], dict[str, int]], capsys: Capture
) -> None:
    judges[1]["first"] = 9
    assert search(tmp_path) == 1
    assert "passes with all 5 changes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pci-config-cache.other", "--series", "pci-ecam"], "there is no check"),
        ([CHECK, "--series", "pci-ecam", "--good", "99"], "leaves nothing to search"),
        ([CHECK, "--commits", "HEAD"], "are no commits"),
        ([CHECK, "--commits", "HEAD~1..HEAD", "--tree", "qemu"], "is for --series"),
        ([CHECK], "is required"),
    ],
)
def test_wrong_use(tmp_path: Path, capsys: Capture, words: list[str], said: str) -> None:
    assert main(["bisect", *words, "--results-dir", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("state", "status"), [("good", 0), ("bad", 1), ("skip", 125)])
def test_a_step_ends_as_git_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, state: str, status: int
) -> None:
    monkeypatch.setattr(bisectcmd, "judged", lambda *_: Judged(state, "because"))  # type: ignore[arg-type]
    assert main(["bisect", OFF, "--step", "-q", "--results-dir", str(tmp_path)]) == status
    assert capsys.readouterr().out == f"{state}: because\n"


def test_no_error_of_ours_is_a_bad_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def judged(*_: object) -> Judged:
        raise EnvironmentBroken("the disk is full")

    monkeypatch.setattr(bisectcmd, "judged", judged)
    assert main(["bisect", OFF, "--step", "-q", "--results-dir", str(tmp_path)]) == 128
    assert main(["bisect", "none", "--step", "-q", "--results-dir", str(tmp_path)]) == 128


def test_the_recorded_report_is_one() -> None:
    assert document.read(NIGHT).checks
