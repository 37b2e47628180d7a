# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of the project with some of its patches, or of one of its commits: what a search runs."""

from __future__ import annotations

import email.header
import email.parser
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core import proc
from ..core.errors import UsageError
from ..patches.series import Series, TreeName, find_series
from .bisect import Change

PARTS = ("harness", "guest-images", "patches", "pyproject.toml")
"""What a run needs of the project."""


def copy(repo: Path, target: Path) -> None:
    """Copy to ``target``, which is made anew, what a run needs of the project."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in PARTS:
        one = repo / name
        if one.is_dir():
            shutil.copytree(one, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif one.exists():
            shutil.copy2(one, target / name)


@dataclass(frozen=True)
class PatchStates:
    """The states of a series: its patches for Linux and then those for QEMU, one more in each."""

    repo: Path
    patches: Path
    """The folder of series.yaml."""
    series: tuple[Series, ...]
    """Its parts, in order."""
    every: tuple[Series, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All patches in order."""
        return tuple(path for one in self.series for path in one.patches())

    @property
    def changes(self) -> tuple[Change, ...]:
        """The patches as changes."""
        return tuple(
            Change("patch", f"{number:04}", subject_of(path), one.label)
            for one in self.series
            for number, path in enumerate(one.patches(), 1)
        )

    def make(self, state: int, target: Path) -> None:
        """Copy the project with the first patches of the series, and no series that follows it.

        Those that follow may need what is not there.
        """
        copy(self.repo, target)
        there = target / "patches"
        if self.patches != self.repo / "patches":
            shutil.rmtree(there)
            shutil.copytree(self.patches, there)
        path = there / "series.yaml"
        document = yaml.safe_load(path.read_text())
        name = self.series[0].name
        last = {part.tree: part.order for part in self.every if part.name == name}
        document["series"] = [one for one in document["series"] if not _follows(one, name, last)]
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        for patch in self.files[state:]:
            (there / patch.relative_to(self.patches)).unlink()


def _follows(entry: dict[str, Any], name: str, last: dict[TreeName, int]) -> bool:
    """Whether an entry of series.yaml comes after a series in one of its trees."""
    if entry["name"] == name:
        return False
    parts = entry.get("parts") or {entry.get("tree"): entry}
    return any(tree in last and part["order"] > last[tree] for tree, part in parts.items())


def patch_states(
    repo: Path, patches: Path, every: Sequence[Series], name: str, *, tree: str | None = None
) -> PatchStates:
    """The states of a series, of its part for ``tree`` alone if that is given. Raises UsageError.

    Patches of the part for another tree are then all there in each state.
    """
    find_series(every, name)
    found = tuple(one for one in every if one.name == name and tree in (None, one.tree))
    if not found:
        trees = ", ".join(one.tree for one in every if one.name == name)
        raise UsageError(f"the series '{name}' has no patches for {tree}", hint=f"it has: {trees}")
    if found[0].draft or found[0].is_testbed:
        raise UsageError(
            f"the series '{name}' is in nothing whose checks are run",
            hint="choose one for users that is no draft: 'nearmetal list series'",
        )
    return PatchStates(repo, patches, found, tuple(every))


def subject_of(patch: Path) -> str:
    """A patch's subject, without what stands in brackets before it."""
    head = email.parser.HeaderParser().parsestr(patch.read_text(errors="replace"))
    words = "".join(
        part if isinstance(part, str) else part.decode(charset or "utf-8", "replace")
        for part, charset in email.header.decode_header(head["Subject"] or patch.stem)
    )
    text = " ".join(words.split())
    while text.startswith("[") and "]" in text:
        text = text.split("]", 1)[1].lstrip()
    return text


@dataclass(frozen=True)
class CommitStates:
    """The states of the project from a commit to another: state 0 is the first."""

    repo: Path
    commits: tuple[str, ...]
    changes: tuple[Change, ...]

    def make(self, state: int, target: Path) -> None:
        """Write what a run needs of the commit to ``target``, which is made anew."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        archive = target.with_suffix(".tar")
        words = ["git", "-C", str(self.repo), "archive", "-o", str(archive), self.commits[state]]
        proc.run([*words, *self._there(state)], deadline_s=120)
        proc.run(["tar", "-xf", archive, "-C", target], deadline_s=120)
        archive.unlink()

    def _there(self, state: int) -> list[str]:
        words = ["git", "-C", str(self.repo), "ls-tree", "--name-only", self.commits[state]]
        names = proc.run(words, deadline_s=60).stdout.split()
        return [name for name in PARTS if name in names]


def commit_states(repo: Path, words: str) -> CommitStates:
    """The project's commits of ``GOOD..BAD``, along first parents. Raises UsageError."""
    good, dots, bad = words.partition("..")
    if not dots or not good or bad.startswith("."):
        raise UsageError(
            f"'{words}' are no commits to search", hint="as in --commits v1..HEAD, GOOD..BAD"
        )

    def git(*more: str) -> str:
        done = proc.run(["git", "-C", repo, *more], deadline_s=60, check=False)
        if done.status != 0:
            raise UsageError(
                f"git does not know the commits {words}: {done.stderr.strip().splitlines()[-1]}",
                hint="as in --commits v1..HEAD, GOOD..BAD",
            )
        return done.stdout

    bad = bad or "HEAD"
    first = git("rev-parse", "--verify", f"{good}^{{commit}}").strip()
    format_ = "--format=%H%x09%s"
    lines = git("log", "--reverse", "--first-parent", format_, f"{first}..{bad}").splitlines()
    if not lines:
        raise UsageError(f"there is no commit in {words}", hint="the good one comes first")
    pairs = [line.split("\t", 1) for line in lines]
    return CommitStates(
        repo,
        (first, *(commit for commit, _ in pairs)),
        tuple(Change("commit", commit[:12], subject) for commit, subject in pairs),
    )
