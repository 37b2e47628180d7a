# SPDX-License-Identifier: GPL-2.0-or-later
"""What changed from night to night, since when, and what else changed then: pure functions.

Exact counts are compared by equality with the last good night. Other figures change where the
median leaves the range of all values of the last good nights, and a margin around it. Times and
speeds of emulated machines are not judged: they say nothing of hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.text import number
from ..measure import registry
from .history import Key, Made, Night, Value

EXACT = frozenset({"exits", "dwords", "functions", "faults", "bytes"})
"""Units of what is counted, and is the same in each run of the same code."""
SPEEDS = frozenset({"ns", "us", "ms", "s", "MiB/s", "GB/s", "Gb/s", "samples/s"})
BASELINE = 7
"""How many of the last good nights say how far a figure strays."""
SHARE = 0.02
"""The margin around their range, as a share of the median of the last good night."""
YOUNG, YOUNG_SHARE = 3, 0.1
"""With fewer good nights than this their range says little, and the margin is wider."""
FLOOR = 0.01
"""Its least, in the figure's unit: the noise of timers in figures per sample."""

Kind = Literal["failed", "worse", "differs", "gone", "better", "new", "mended"]
RED = frozenset({"failed", "worse", "differs", "gone"})


@dataclass(frozen=True)
class Change:
    """Something that is otherwise than in the last good night."""

    kind: Kind
    what: str
    """A check's name or a figure's."""
    text: str
    """One line for people."""
    key: Key | None = None
    """Of a figure."""

    @property
    def red(self) -> bool:
        """Whether it makes a night red."""
        return self.kind in RED


@dataclass(frozen=True)
class Since:
    """When a change was first seen, and what was changed before that run."""

    run: str
    date: str
    between: tuple[str, ...]
    """What differs from the run before; empty: nothing that is recorded."""
    before: str
    """The last run without the change; empty: there is none."""


@dataclass(frozen=True)
class Verdict:
    """A night against those before it."""

    night: Night
    base: Night | None
    """The last good night of the same host, if there is one."""
    changes: tuple[Change, ...]
    since: dict[str, Since]
    """For each red change, by ``what``."""

    @property
    def red(self) -> tuple[Change, ...]:
        """The changes that make it red."""
        return tuple(one for one in self.changes if one.red)

    @property
    def good(self) -> bool:
        """Whether nothing failed and nothing got worse."""
        return not self.red and self.night.verdict == "pass"

    def line(self) -> str:
        """A line for a mail's subject or a chat."""
        night = self.night
        checks = [one.status for one in night.checks.values()]
        counts = f"{checks.count('pass')} of {len(checks)} checks passed"
        if skipped := checks.count("skip"):
            counts += f", {skipped} skipped"
        if self.good:
            return f"nearmetal {night.date} on {night.host}: GREEN, {counts}"
        if not self.red:
            return f"nearmetal {night.date} on {night.host}: RED, {counts}"
        first = self.red[0]
        more = f" (and {len(self.red) - 1} more)" if len(self.red) > 1 else ""
        return f"nearmetal {night.date} on {night.host}: RED, {first.text}{more}; {counts}"


def judge(night: Night, before: Sequence[Night]) -> Verdict:
    """A night against the runs before it, the oldest first; those of other hosts are left out."""
    past = [one for one in before if one.host == night.host and one.id != night.id]
    good = [night] if night.accepted else good_nights(past)
    base = good[-1] if good else None
    changes = _changes(night, good)
    since = {one.what: _since(one, night, past) for one in changes if one.red}
    return Verdict(night, base, tuple(changes), since)


def good_nights(past: Sequence[Night]) -> list[Night]:
    """Those whose figures later ones are held to: accepted ones, and green ones."""
    good: list[Night] = []
    for one in past:
        if one.accepted:
            good = [one]  # what was before is no longer what is wanted
        elif one.verdict == "pass" and not any(c.red for c in _changes(one, good)):
            good.append(one)
    return good[-BASELINE:]


def _changes(night: Night, good: Sequence[Night]) -> list[Change]:
    found: list[Change] = []
    base = good[-1] if good else None
    for name, one in night.checks.items():
        was = base.checks.get(name) if base else None
        if one.status in ("fail", "error"):
            word = "failed" if one.status == "fail" else "could not be judged"
            observed = (one.observed or one.reason).splitlines()
            said = f": {observed[0]}" if observed else ""
            found.append(Change("failed", name, f"{name} {word}{said}"))
        elif was is not None and was.status == "pass" and one.status == "skip":
            found.append(Change("gone", name, f"{name} is skipped, and passed before"))
    if base is None:
        return found
    for name, was in base.checks.items():
        if name not in night.checks and was.status == "pass" and _comparable(night, base):
            found.append(Change("gone", name, f"{name} is no longer checked, and passed before"))
    for key, value in night.figures.items():
        if change := _figure(key, value, good):
            found.append(change)
    if _comparable(night, base):
        for key in base.figures:
            if key not in night.figures:
                found.append(Change("gone", str(key), f"{key} is no longer measured", key))
    order: tuple[Kind, ...] = ("failed", "worse", "differs", "gone", "better", "mended", "new")
    return sorted(found, key=lambda one: order.index(one.kind))


def _comparable(night: Night, base: Night) -> bool:
    """Whether two runs were asked for the same: else what the one lacks says nothing."""
    return night.command == base.command


def _figure(key: Key, value: Value, good: Sequence[Night]) -> Change | None:
    past = [one.figures[key] for one in good if key in one.figures]
    if not past:
        return Change("new", str(key), f"{key} is new", key)
    last = past[-1]
    if value.unit in SPEEDS and "emulated" in (value.provenance, last.provenance):
        return None
    if value.median is None or last.median is None:
        if value.median == last.median:
            return None
        return Change("differs", str(key), f"{key} is no finite number in one of the nights", key)
    low = high = last.median
    if value.unit in EXACT:
        moved = value.median != last.median
        told = number(last.median)
    else:
        spread = [figure for one in past for figure in one.values]
        low, high = min(spread), max(spread)
        share = SHARE if len(past) >= YOUNG else YOUNG_SHARE
        margin = max(share * abs(last.median), FLOOR)
        moved = not low - margin <= value.median <= high + margin
        told = number(low) if low == high else f"{number(low)} .. {number(high)}"
    if not moved:
        return None
    entry = registry.metrics().get(key.name)
    better = entry.better if entry else "equal"
    rose = value.median > high
    kind: Kind = "differs"
    if better != "equal":
        kind = "better" if rose == (better == "higher") else "worse"
    by = f", {value.median - last.median:+g}" if value.unit in EXACT else ""
    return Change(
        kind, str(key), f"{key} is {number(value.median)} {value.unit}, was {told}{by}", key
    )


# --- since when, and what changed then --------------------------------------------------------


def _since(change: Change, night: Night, past: Sequence[Night]) -> Since:
    """The first run of the last row of runs with the change, and what changed before it."""
    first = night
    before: Night | None = None
    for number_, one in reversed(list(enumerate(past))):
        if not _could_show(change, one):
            continue
        found = _changes(one, good_nights(past[:number_]))
        if any(other.what == change.what and other.red for other in found):
            first = one
            continue
        before = one
        break
    if before is None:
        return Since(first.id, first.date, (), "")
    return Since(first.id, first.date, tuple(between(before, first)), before.id)


def _could_show(change: Change, night: Night) -> bool:
    """Whether a run measured what changed."""
    if change.key is not None:
        return change.kind == "gone" or change.key in night.figures
    return change.kind == "gone" or change.what in night.checks


def between(a: Night, b: Night) -> list[str]:
    """What was changed from one run to the next: commits, series, bases, and builds without a
    reason among these."""
    found: list[str] = []
    if a.revision != b.revision:
        found.append(f"commits {a.revision or 'unknown'} .. {b.revision or 'unknown'}")
    if a.command != b.command:
        found.append(f"asked for: {a.command} -> {b.command}")
    before, after = ({one.place: one for one in night.builds} for night in (a, b))
    told: set[str] = set()
    for place in before.keys() & after.keys():
        for line in _of_build(before[place], after[place]):
            told.add(line)
    return [*found, *sorted(told)]


def _of_build(a: Made, b: Made) -> list[str]:
    role = b.role.replace("-", " ")
    lines = []
    if a.source != b.source:
        lines.append(f"base of the {role}: {a.source} -> {b.source}")
    lines += [f"series {name} added to the {role}" for name in b.series if name not in a.series]
    lines += [f"series {name} taken from the {role}" for name in a.series if name not in b.series]
    if not lines and a.sha256 != b.sha256:
        of = f" with {', '.join(b.series)}" if b.series else ""
        lines.append(f"{role}{of} was built from other sources or by other tools")
    return lines
