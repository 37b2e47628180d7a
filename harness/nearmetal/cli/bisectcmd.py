# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``bisect``."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core import proc, ui
from ..core.errors import EnvironmentBroken, Exit, NearmetalError, UsageError
from ..core.model import VARIANTS
from ..core.settings import Settings
from ..core.text import first_line, nearest
from ..judging.load import Check, load_checks
from ..measure import registry
from ..nights.bisect import ABORT, STATUS, Found, Judged, first_bad
from ..nights.states import CommitStates, PatchStates, commit_states, patch_states
from ..patches.series import TREES, load_series
from ..report import document
from ..runs import plan
from .common import Commands, common_options

RUN_DEADLINE_S = 4 * 3600.0
"""For a state: it may have a kernel and a QEMU to build."""
FORMAT = 1


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "bisect",
        "find the patch or commit with which a check fails",
        command,
        common_options(
            only=("cache_dir", "results_dir", "source_dir", "linux_tree", "qemu_tree", "testbed")
        ),
    )
    one.description = (
        "Find the first patch of a series, or the first commit of this project, with which a check"
        " fails: a run for each state that has to be judged, of the check's tests and variants"
        " alone. A state that does not build or cannot be judged is skipped. The same command goes"
        " on where an earlier one was ended. Exit status 1: it was not found, or not to one."
    )
    one.add_argument("check", metavar="CHECK", help="a check's name (nearmetal list checks)")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--series", metavar="NAME", help="search its patches: those for Linux, then for QEMU"
    )
    what.add_argument("--commits", metavar="GOOD..BAD", help="search these commits of the project")
    what.add_argument(
        "--step",
        action="store_true",
        help="search nothing: judge what is there once, and end as 'git bisect run' wants it (0"
        f" good, 1 bad, {STATUS['skip']} skip, {ABORT} stop); of --linux-tree or --qemu-tree"
        " vanilla is judged",
    )
    one.add_argument(
        "--tree", choices=TREES[:2], help="with --series: only its patches for this tree"
    )
    one.add_argument(
        "--good",
        type=int,
        default=0,
        metavar="N",
        help="with --series: with its first N patches the check passes (default: 0)",
    )
    one.add_argument(
        "--patches",
        type=Path,
        metavar="DIR",
        help="with --series: a folder of patches (default: patches/ in the repository)",
    )
    one.add_argument(
        "--checks",
        type=Path,
        action="append",
        metavar="FILE",
        help="where the check is, if it is not one of the default ones; may be repeated",
    )
    one.add_argument("--anew", action="store_true", help="forget what was judged before")
    one.add_argument("--json", action="store_true", help="print JSON, for programs")


@dataclass(frozen=True)
class Question:
    """A check, and what is run to judge it."""

    check: str
    words: tuple[str, ...]
    """Of ``nearmetal run``."""


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    if options.step:
        return _step(options, conf)
    question = question_of(options, conf)
    if options.linux_tree or options.qemu_tree:
        raise UsageError(
            "a tree of yours is searched by git itself",
            hint=f"in the tree: git bisect run nearmetal bisect {options.check} --step ...",
        )
    states: PatchStates | CommitStates
    if options.series is not None:
        patches = (options.patches or conf.repo / "patches").absolute()
        every = load_series(patches, known=plan.known())
        states = patch_states(conf.repo, patches, every, options.series, tree=options.tree)
        good = options.good
    else:
        for name in ("tree", "patches"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} is for --series", hint="leave it out")
        states, good = commit_states(conf.repo, options.commits), 0
    changes = states.changes
    if not 0 <= good < len(changes):
        raise UsageError(
            f"--good {good} leaves nothing to search: there are {len(changes)} patches",
            hint=f"give a number from 0 to {len(changes) - 1}",
        )
    memory = Memory(conf.results_dir / "bisect", _key(question, states))
    if options.anew:
        shutil.rmtree(memory.folder, ignore_errors=True)
    known = memory.known()

    def judge(state: int) -> Judged:
        label = f"the first {state} of {len(changes)}" if state else "none"
        with ui.step(f"judging {question.check} with {label}"):
            target = memory.folder / "state"
            states.make(state, target)
            found = judged(question, target, memory.folder / f"run-{state:04}")
        ui.say(f"    {found.outcome}: {found.why}")
        memory.keep(state, found)
        return found

    found = first_bad(changes, judge, good=good, known=known)
    shutil.rmtree(memory.folder / "state", ignore_errors=True)
    print(json.dumps(as_json(question, found), indent=1) if options.json else found.line)
    ui.say(f"the runs: {memory.folder}")
    return Exit.OK if len(found.first) == 1 else Exit.FAILED


def as_json(question: Question, found: Found) -> dict[str, Any]:
    """A verdict for programs."""
    return {
        "check": question.check,
        "line": found.line,
        "first_bad": asdict(found.first[0]) if len(found.first) == 1 else None,
        "candidates": [asdict(one) for one in found.first],
        "judged": [
            {"changes": state, **asdict(one)} for state, one in sorted(found.judged.items())
        ],
    }


# --- what is asked ----------------------------------------------------------------------------


def question_of(options: argparse.Namespace, conf: Settings) -> Question:
    """The check that is meant, and the words of the run that judges it. Raises UsageError."""
    files = tuple(path.absolute() for path in options.checks or ())
    checks = {one.name: one for one in load_checks(files or None)}
    if options.check not in checks:
        raise UsageError(
            f"there is no check '{options.check}'", hint=nearest(options.check, checks)
        )
    check = checks[options.check]
    testbed = options.testbed or next(iter(_testbeds(check)), None) or conf.testbed
    words = [
        "--only",
        ",".join(dict.fromkeys(registry.test_of(name).name for name in sorted(check.needs))),
    ]
    words += ["--testbed", testbed]
    series = _series(check)
    wanted = _variants(check)
    if not (options.step and conf.has_own):
        words += ["--variant", ",".join(wanted)]
        if series and "on" in wanted:
            words += ["--series", ",".join(series)]
    for name, path in (
        ("checks", files),
        ("linux-tree", [conf.linux_tree]),
        ("qemu-tree", [conf.qemu_tree]),
    ):
        for one in path:
            if one is not None:
                words += [f"--{name}", str(one.absolute())]
    if conf.source_dir is not None:
        words += ["--source-dir", str(conf.source_dir)]
    return Question(check.name, (*words, "--cache-dir", str(conf.cache_dir)))


def _testbeds(check: Check) -> tuple[str, ...]:
    asked = (one.selector("testbed") for one in check.selections)
    return tuple(dict.fromkeys([*(one for one in asked if one), *check.applies_to.testbeds]))


def _series(check: Check) -> tuple[str, ...]:
    asked = (one.selector("series") for one in check.selections)
    return tuple(dict.fromkeys([*(one for one in asked if one), *check.applies_to.series]))


def _variants(check: Check) -> tuple[str, ...]:
    """The variants that a check is about; a figure on none in particular may be of any.

    Figures that are derived, as ratios to vanilla, are measured beside it alone.
    """
    asked = {one.selector("variant") for one in check.selections}
    if None in asked:
        return VARIANTS
    if any(registry.metrics()[name].derived is not None for name in check.needs):
        asked.add("vanilla")
    return tuple(one for one in VARIANTS if one in asked)


# --- a state ----------------------------------------------------------------------------------


def judged(question: Question, repo: Path, results: Path) -> Judged:
    """Run a state of the project in ``repo``, with ``results`` made anew, and judge it.

    Raises EnvironmentBroken where the run broke off for a reason that is none of the state's.
    """
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    begun = time.monotonic()
    words = [sys.executable, "-m", "nearmetal", "run", "-q", *question.words]
    log = results / "run.log"
    done = proc.run(
        [*words, "--results-dir", str(results)],
        deadline_s=RUN_DEADLINE_S,
        cwd=repo,
        env={"PYTHONPATH": str(repo / "harness")},
        log=log,
        check=False,
    )
    seconds = round(time.monotonic() - begun, 1)
    reports = [one for one in results.glob("*/report.json") if one.parent.name != document.LATEST]
    if not reports:
        return Judged("skip", _no_report(done.status, done.stdout, log), seconds)
    found = {one.name: one for one in document.read(reports[0]).checks}
    check = found.get(question.check)
    if check is None:
        return Judged("skip", f"the run has no check {question.check}", seconds)
    if check.status == "fail":
        return Judged("bad", check.observed or first_line(check.reason), seconds)
    if check.status == "pass":
        return Judged("good", check.observed or "it passes", seconds)
    return Judged("skip", f"{check.status}: {first_line(check.reason)}", seconds)


def _no_report(status: int, said: str, log: Path) -> str:
    """Why a run has no report, where that is the state's; else EnvironmentBroken."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line.removeprefix("nearmetal: ") for line in lines if line.startswith("nearmetal: ")]
    why = told[-1] if told else (lines or ["it said nothing"])[-1]
    if status == Exit.USAGE or (status == Exit.ENVIRONMENT and " does not build" in why):
        return why
    if status == Exit.ENVIRONMENT and any("does not apply" in line for line in lines):
        return why
    raise EnvironmentBroken(
        f"a run broke off with status {status}: {why}",
        hint=f"mend it and give the same command again, which goes on from here; the log: {log}",
    )


def _step(options: argparse.Namespace, conf: Settings) -> int:
    """Judge what is there, and end as git-bisect(1) wants it: no error of ours is a bad state."""
    results = conf.results_dir / "bisect" / f"step-{os.getpid()}"
    try:
        found = judged(question_of(options, conf), conf.repo, results)
    except NearmetalError as error:
        ui.tell_error(error)
        return ABORT
    print(f"{found.outcome}: {found.why}")
    return STATUS[found.outcome]


# --- what was judged before -------------------------------------------------------------------


def _key(question: Question, states: PatchStates | CommitStates) -> dict[str, Any]:
    """What makes two searches the same."""
    if isinstance(states, CommitStates):
        return {**asdict(question), "states": list(states.commits)}
    folder = hashlib.sha256()
    for path in sorted(states.patches.rglob("*")):
        if path.is_file():
            folder.update(f"{path.relative_to(states.patches)}\0".encode() + path.read_bytes())
    names = [str(path.relative_to(states.patches)) for path in states.files]
    return {**asdict(question), "states": names, "patches": folder.hexdigest()}


class Memory:
    """What was judged, in a folder for each question; a search that was ended goes on with it."""

    def __init__(self, base: Path, question: Mapping[str, Any]) -> None:
        self._question = {"format": FORMAT, **question}
        text = json.dumps(self._question, sort_keys=True)
        self.folder = base / hashlib.sha256(text.encode()).hexdigest()[:12]
        self._path = self.folder / "judged.json"

    def known(self) -> dict[int, Judged]:
        """What was judged, by state."""
        try:
            note = json.loads(self._path.read_text())
            return {int(state): Judged(**one) for state, one in note["judged"].items()}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def keep(self, state: int, found: Judged) -> None:
        """Add what was judged."""
        every = {**self.known(), state: found}
        note = {
            "question": self._question,
            "judged": {number: asdict(one) for number, one in sorted(every.items())},
        }
        document.write_atomically(self._path, json.dumps(note, indent=1) + "\n")
