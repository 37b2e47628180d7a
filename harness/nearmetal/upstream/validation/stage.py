# SPDX-License-Identifier: GPL-2.0-or-later
"""A stage of ``validate --full``: one checker or one configuration, patch by patch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..validate import BuildSetup, Candidate, Finding, Touched, WorkTree, touched_files
from ..validate import build_finding as finding_of


@dataclass(frozen=True)
class Need:
    """Something that a stage cannot do without, and the package of Debian that has it.

    ``found`` says whether it is there, for what is more than a program's being installed.
    """

    what: str
    package: str
    found: Callable[[], bool] | None = None

    def is_met(self) -> bool:
        """Whether the stage can run, as far as this goes."""
        return self.found() if self.found is not None else shutil.which(self.what) is not None


@dataclass(frozen=True)
class Stage:
    """One checker or configuration; its ``name`` is the rule of what it finds.

    ``folder`` is the build's, beside the sources: stages of one configuration share it.
    ``wants`` says which files a stage looks at; a patch that touches none is left out.
    """

    name: str
    setup: BuildSetup
    folder: str
    wants: Callable[[Touched], bool]
    needs: tuple[Need, ...] = ()
    with_options: bool = True
    """Whether the options that series add to the kernel's configuration are laid over its own."""

    def for_series(self, candidate: Candidate) -> Stage:
        """The stage with the options of a series."""
        if not self.with_options:
            return self
        return replace(self, setup=self.setup.with_options(candidate.options))

    def work(self, candidate: Candidate) -> tuple[tuple[Path, tuple[Touched, ...]], ...]:
        """The patches that the stage has to look at, and their files that it wants."""
        found = []
        for patch in candidate.series.patches():
            text = patch.read_text(encoding="utf-8", errors="replace")
            wanted = tuple(file for file in touched_files(text) if self.wants(file))
            if wanted:
                found.append((patch, wanted))
        return tuple(found)

    def missing(self) -> tuple[Need, ...]:
        """What the machine lacks for it."""
        return tuple(need for need in self.needs if not need.is_met())


def not_run(label: str, stage: str, missing: Sequence[Need]) -> list[Finding]:
    """An error for each thing that is missing: a check that could not run never passes."""
    return [
        Finding(label, "", stage, "error", f"not run: there is no {need.what} ({need.package})")
        for need in missing
    ]


def run_patch(
    stage: Stage,
    work: WorkTree,
    label: str,
    patch: Path,
    touched: Sequence[Touched],
    sides: tuple[str, str],
) -> list[Finding]:
    """What the stage says of a patch's commit and not of its parent (``sides``: both)."""
    before, after = sides
    here = work.in_folder(stage.folder)
    return [
        finding_of(label, patch.name, one, stage.name)
        for one in here.new_of(stage.setup, touched, before, after)
    ]
