# SPDX-License-Identifier: GPL-2.0-or-later
"""The first change with which a check fails: the search itself, pure.

State ``n`` is all that the first ``n`` changes make. Who judges a state is given; what it says is
what a program says to ``git bisect run``: good, bad, or skip where nothing can be said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.errors import MeasurementError

Outcome = Literal["good", "bad", "skip"]

STATUS: Mapping[Outcome, int] = {"good": 0, "bad": 1, "skip": 125}
"""Exit statuses that git-bisect(1) takes from a program, under "Bisect run"."""
ABORT = 128
"""The least that ends its search."""


@dataclass(frozen=True)
class Change:
    """A patch or a commit."""

    kind: Literal["patch", "commit"]
    name: str
    """A patch's number in its series, ``0006``, or a commit's hash."""
    subject: str
    where: str = ""
    """A patch's series, such as ``linux/pci-ecam``."""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{self.kind} {self.name} {self.subject}{where}"


@dataclass(frozen=True)
class Judged:
    """What is said of a state, why, and how long that took in seconds."""

    outcome: Outcome
    why: str
    seconds: float = 0.0


Judge = Callable[[int], Judged]


@dataclass(frozen=True)
class Found:
    """How a search ended. ``first`` has one change, or all that it may be one of."""

    first: tuple[Change, ...]
    judged: Mapping[int, Judged]

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if len(self.first) == 1:
            return f"first bad: {self.first[0]}"
        return (
            f"first bad: one of {len(self.first)}, from {self.first[0]} to {self.first[-1]};"
            " the states between could not be judged"
        )


def first_bad(
    changes: Sequence[Change],
    judge: Judge,
    *,
    good: int = 0,
    known: Mapping[int, Judged] | None = None,
) -> Found:
    """Search for the first change with which a state is bad.

    ``good`` is a state that is good, and all changes together must be bad; both are judged. A good
    one that cannot be judged is believed. ``known`` is what was judged before. Raises
    MeasurementError where there is nothing to search for.
    """
    judged = dict(known or {})

    def ask(state: int) -> Judged:
        if state not in judged:
            judged[state] = judge(state)
        return judged[state]

    low, high = good, len(changes)
    with_all = ask(high)
    if with_all.outcome != "bad":
        said = "passes" if with_all.outcome == "good" else "cannot be judged"
        raise MeasurementError(
            f"the check {said} with all {high} changes: {with_all.why}",
            hint="there is nothing to search for: choose others, or look at that run",
        )
    if ask(low).outcome == "bad":
        raise MeasurementError(
            f"the check fails without any of the changes: {judged[low].why}",
            hint="what broke it is older: begin with a state that is good",
        )
    while (state := next(_middle_first(low, high, judged), None)) is not None:
        outcome = ask(state).outcome
        if outcome == "good":
            low = state
        elif outcome == "bad":
            high = state
    return Found(tuple(changes[low:high]), judged)


def _middle_first(low: int, high: int, judged: Mapping[int, Judged]) -> Iterator[int]:
    """The states between two that may still tell something, the nearest to the middle first."""
    middle = (low + high) // 2
    for state in sorted(range(low + 1, high), key=lambda one: (abs(one - middle), one)):
        if state not in judged or judged[state].outcome != "skip":
            yield state
