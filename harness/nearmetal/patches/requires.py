# SPDX-License-Identifier: GPL-2.0-or-later
"""What a series needs of others: the first patches of series that stand before it in its tree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import UsageError
from ..core.text import nearest

if TYPE_CHECKING:
    from .series import Series

Wanted = int | Literal["all"]
"""How many of a series' patches are required, from its first one."""


def check(path: Path, every: Sequence[Series]) -> None:
    """Refuse ``requires:`` that cannot be met; ``path`` is the file to name.

    Raises UsageError for a series that does not exist, is of another tree, requires back,
    comes later in the order, is a draft that a series in use needs, or has too few patches.
    """
    for one in every:
        for name, wanted in one.requires.items():
            other = _other(path, one, name, every)
            _check_place(path, one, other, every)
            _check_count(path, one, other, wanted)


def _other(path: Path, one: Series, name: str, every: Sequence[Series]) -> Series:
    here = {other.name: other for other in every if other.tree == one.tree}
    if name == one.name:
        raise UsageError(f"{path}: {one.name}: it requires itself", hint="leave that out")
    if name in here:
        return here[name]
    there = [other.tree for other in every if other.name == name]
    if there:
        raise UsageError(
            f"{path}: {one.name}: it is for {one.tree} and requires '{name}', which is for"
            f" {there[0]}",
            hint="a series can require series of its own tree only",
        )
    raise UsageError(
        f"{path}: {one.name}: it requires '{name}', and there is no such series",
        hint=nearest(name, sorted(here)),
    )


def _check_place(path: Path, one: Series, other: Series, every: Sequence[Series]) -> None:
    if one.name in _reached(other, every):
        raise UsageError(
            f"{path}: {one.name} and {other.name} require each other",
            hint="move the patches that both need into a series of their own",
        )
    if other.order > one.order:
        raise UsageError(
            f"{path}: {one.name}: it requires '{other.name}', which comes after it"
            f" (order {other.order}, {one.order})",
            hint="give it a higher order than all series that it requires",
        )
    if other.draft and not one.draft:
        raise UsageError(
            f"{path}: {one.name}: it requires '{other.name}', which is a draft and built into"
            " nothing",
            hint="make both drafts, or neither",
        )


def _check_count(path: Path, one: Series, other: Series, wanted: Wanted) -> None:
    count = len(other.patches())
    if count == 0 or (wanted != "all" and wanted > count):
        words = "patches" if wanted == "all" else f"the first {wanted} patches"
        raise UsageError(
            f"{path}: {one.name}: it requires {words} of '{other.name}', which has {count}",
            hint="write how many of its patches are needed, from the first, or 'all'",
        )


def _reached(one: Series, every: Sequence[Series]) -> set[str]:
    """The names of what a series requires, and what these require, and so on."""
    here = {other.name: other for other in every if other.tree == one.tree}
    found: set[str] = set()
    left = [*one.requires]
    while left:
        name = left.pop()
        if name not in found and name in here:
            found.add(name)
            left += here[name].requires
    return found


def counts(one: Series, every: Sequence[Series]) -> tuple[tuple[Series, int], ...]:
    """The series that one needs, in the order of application, and how many patches of each.

    What a required series requires is needed, too; of two wishes the larger one counts.
    """
    wanted: dict[str, int] = {}
    here = {other.name: other for other in every if other.tree == one.tree}

    def visit(series: Series) -> None:
        for name, number in series.requires.items():
            most = len(here[name].patches())
            wanted[name] = max(wanted.get(name, 0), most if number == "all" else number)
            visit(here[name])

    visit(one)
    ordered = sorted(here.values(), key=lambda other: other.order)
    return tuple((other, wanted[other.name]) for other in ordered if other.name in wanted)


def patches_before(one: Series, every: Sequence[Series]) -> tuple[Path, ...]:
    """The patches to apply before those of a series, which none of them is."""
    return tuple(path for other, count in counts(one, every) for path in other.patches()[:count])


def in_words(one: Series, every: Sequence[Series]) -> str:
    """What a series requires for a reader, or nothing: ``the first 2 patches of pci-ecam``."""
    words = []
    for other, count in counts(one, every):
        if count == len(other.patches()):
            words.append(f"all patches of {other.name}")
        elif count == 1:
            words.append(f"the first patch of {other.name}")
        else:
            words.append(f"the first {count} patches of {other.name}")
    return ", ".join(words)
