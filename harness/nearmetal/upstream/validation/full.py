# SPDX-License-Identifier: GPL-2.0-or-later
"""``validate --full``: every stage for every patch, told as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...core import ui
from ...patches.series import TreeName
from ..results import Times
from ..validate import Base, Candidate, Finding, WorkTree, trees_needed
from . import plan
from .linux import own_symbols
from .series_checks import QTEST_RULE, UAPI_RULE, Abidiff, check_uapi, has_uapi, run_qtests
from .stage import Stage, not_run, run_patch


def full(
    candidates: Sequence[Candidate],
    bases: Mapping[TreeName, Base],
    scratch: Path,
    known: Sequence[Finding] = (),
    *,
    abidiff: Abidiff,
) -> list[Finding]:
    """What the stages find in the candidates and ``known`` does not say already.

    ``abidiff`` is asked only if a series touches the uapi. ``scratch`` is that of
    validate.validate(), and so is what is raised.
    """
    findings: list[Finding] = []
    for tree in trees_needed(candidates):
        base = bases[tree]
        times = Times(scratch / f"times-{tree}.json")
        work = WorkTree.open(base, scratch.resolve() / tree)
        chosen = [one for one in candidates if one.series.tree == tree]
        for candidate in sorted(chosen, key=lambda one: one.series.order):
            findings += _series(candidate, base, work, times, abidiff)
    return _news(findings, known)


def _news(findings: Sequence[Finding], known: Sequence[Finding]) -> list[Finding]:
    """Findings without those that an earlier stage has told of the same patch."""
    told = {(one.series, one.patch, one.text) for one in known}
    found = []
    for one in findings:
        key = (one.series, one.patch, one.text)
        if key not in told:
            told.add(key)
            found.append(one)
    return found


def _series(
    candidate: Candidate, base: Base, work: WorkTree, times: Times, abidiff: Abidiff
) -> list[Finding]:
    label = candidate.series.label
    patches = candidate.series.patches()
    commits = work.apply(candidate, [])
    if len(commits) != len(patches) + 1:
        text = "not run: the series does not apply"
        return [Finding(label, "", "full", "error", text)]
    stages = plan.stages(candidate, base)
    if stages:
        ui.say(f"    {label}: {expectation(stages, candidate, times)}")
    elif base.tree not in ("linux", "qemu", "testbed-qemu"):
        text = f"no stages are defined for {base.tree}"
        return [Finding(label, "", "full", "note", text)]
    findings: list[Finding] = []
    for stage in stages:
        missing = stage.missing()
        if missing:
            findings += not_run(label, stage.name, missing)
            continue
        findings += _stage(stage, candidate, work, commits, times)
    findings += _options(stages, candidate, work, commits[-1])
    before, after = commits[0], commits[-1]
    if has_uapi(candidate):
        findings += _timed(
            label, UAPI_RULE, times, lambda: check_uapi(work, label, before, after, abidiff)
        )
    if candidate.series.tree in ("qemu", "testbed-qemu"):
        findings += _timed(
            label,
            QTEST_RULE,
            times,
            lambda: run_qtests(candidate, base, work, before, after),
        )
    return findings


def expectation(stages: Sequence[Stage], candidate: Candidate, times: Times) -> str:
    """The stages with the time that they took before, for as many patches as there are now."""
    words = []
    for stage in stages:
        seconds = times.expected(stage.name)
        count = len(stage.work(candidate))
        known = "time unknown" if seconds is None else _in_words(seconds * count)
        words.append(f"{stage.name} ({count} of its patches, {known})")
    return "; ".join(words)


def _in_words(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


def _timed(label: str, name: str, times: Times, run: Callable[[], list[Finding]]) -> list[Finding]:
    started = time.monotonic()
    with ui.step(f"validate {label}: {name}"):
        found = run()
    times.note(name, time.monotonic() - started)
    return found


def _stage(
    stage: Stage,
    candidate: Candidate,
    work: WorkTree,
    commits: Sequence[str],
    times: Times,
) -> list[Finding]:
    label = candidate.series.label
    patches = candidate.series.patches()
    findings: list[Finding] = []
    todo = stage.work(candidate)
    started = time.monotonic()
    with ui.step(f"validate {label}: {stage.name}") as step:
        for number, (patch, touched) in enumerate(todo, 1):
            step.status = f"patch {number} of {len(todo)}: {patch.name}"
            place = patches.index(patch)
            sides = (commits[place], commits[place + 1])
            findings += run_patch(stage, work, label, patch, touched, sides)
    seconds = (time.monotonic() - started) / len(todo)
    if seconds > 1:  # less means that all of it was kept from an earlier run
        times.note(stage.name, seconds)
    return findings


def _options(
    stages: Sequence[Stage], candidate: Candidate, work: WorkTree, tip: str
) -> list[Finding]:
    """The series' own options that no build with them on has: nothing was built of them."""
    if not own_symbols(candidate):
        return []
    lost: set[str] | None = None
    for stage in stages:
        if stage.name.startswith("option on"):
            here = work.in_folder(stage.folder)
            here.go(stage.setup, tip)
            names = {line.partition("=")[0] for line in stage.setup.lost_options(here.build)}
            lost = names if lost is None else lost & names
    label = candidate.series.label
    return [
        Finding(
            label, "", "option", "error", f"{name} is never enabled in a build: a dependency is off"
        )
        for name in sorted(lost or ())
    ]
