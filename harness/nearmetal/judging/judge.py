# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts: each check's, and an error for all that was to be measured and was not.

- ``pass``, ``fail``: everything was measured; the expression is true, or false;
- ``error``: something should have been measured and was not, or cannot be judged;
- ``skip``: declared not to apply to this run, with the reason.

All is pure: rows, reasons and a plan in, verdicts out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import Exit
from ..core.model import (
    VARIANTS,
    CheckResult,
    Measurement,
    Missing,
    Skipped,
    Status,
    Subject,
    Variant,
)
from ..core.text import first_line, number
from ..measure import registry
from .expression import ONE_ROW, ROWS, Selection, evaluate
from .load import AppliesTo, Check

_SHOWN = 6
"""How many rows of another context a verdict names."""


@dataclass(frozen=True)
class Plan:
    """What a run set out to measure, so that what is not there can be told from what failed.

    ``tests`` are those selected; ``names`` are the measurements to be made of each subject by
    each test; ``testbed`` is None on a server.
    """

    tests: tuple[str, ...]
    names: Mapping[tuple[Subject, str], frozenset[str]]
    host: str = "testbed"
    testbed: str | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of its subjects."""
        found = {subject.variant for subject, _ in self.names}
        return tuple(variant for variant in VARIANTS if variant in found)

    @property
    def series(self) -> tuple[str, ...]:
        """The series that are on in one of its subjects."""
        return tuple(dict.fromkeys(one.series for one, _ in self.names if one.series is not None))


class _Unjudged(Exception):
    """A check that gets no pass or fail: ``status`` and ``reason`` instead."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class _Run:
    """All that the run gave, and the look-ups in it."""

    plan: Plan
    measurements: Sequence[Measurement]
    missing: Sequence[Missing]
    skipped: Sequence[Skipped]

    def unselected(self, selection: Selection) -> str | None:
        """Why the run was not to measure this at all, or None."""
        plan = self.plan
        variant, series = selection.selector("variant"), selection.selector("series")
        testbed = selection.selector("testbed")
        test = registry.test_of(selection.name).name
        if self.rows(selection):
            return None
        if test not in plan.tests:
            return f"the test '{test}' is not part of this run (it has: {_list(plan.tests)})"
        if variant is not None and variant not in plan.variants:
            return (
                f"the variant '{variant}' is not part of this run (it has: {_list(plan.variants)})"
            )
        if series is not None and series not in plan.series:
            return f"the series '{series}' is not part of this run (it has: {_list(plan.series)})"
        if testbed is not None and testbed != plan.testbed:
            return f"this run's host is {plan.testbed or 'no testbed'}, not the testbed '{testbed}'"
        return None

    def rows(self, selection: Selection) -> list[Measurement]:
        """The rows that the selectors match."""
        return [
            row
            for row in self.measurements
            if row.name == selection.name
            and all(_key(row, key) == value for key, value in selection.selectors)
        ]

    def missing_reason(self, selection: Selection) -> str | None:
        """Why the run failed to measure something of this selection, or None."""
        for entry in self.missing:
            if _concerns(entry, selection):
                return f"{selection.name} was not measured: {first_line(entry.reason)}"
        return None

    def absent(self, selection: Selection) -> _Unjudged:
        """What to say of a selection that no row matches although the run has its test."""
        if reason := self.missing_reason(selection):
            return _Unjudged("error", reason)
        for entry in self.skipped:
            if _concerns(entry, selection):
                return _Unjudged("skip", first_line(entry.reason))
        name = selection.name
        others = [row for row in self.measurements if row.name == name]
        if others:
            labels = sorted({_label(row) for row in others})
            more = f"; and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
            have = "; ".join(labels[:_SHOWN]) + more
            return _Unjudged("error", f"no row of {_asked(selection)}; there are: {have}")
        planned = self.plan.names.items()
        if any(name in names and _covers(selection, subject) for (subject, _), names in planned):
            return _Unjudged(
                "error", f"{name} should have been measured, and the run has no row of it"
            )
        return _Unjudged("skip", f"{name} was not to be measured in this run")

    def value(self, selection: Selection) -> float | int | tuple[float, ...]:
        """What a call in an expression gives; raises _Unjudged where it can give nothing."""
        rows = self.rows(selection)
        if not rows:
            raise self.absent(selection)
        if selection.function in ONE_ROW and len(rows) > 1:
            raise _Unjudged("error", _ambiguous(selection, rows))
        if selection.function in ROWS and (reason := self.missing_reason(selection)):
            raise _Unjudged("error", reason)
        values = tuple(value for row in rows for value in row.values)
        if not values:
            raise _Unjudged("error", f"{_asked(selection)} has no values")
        if not all(math.isfinite(value) for value in values):
            raise _Unjudged("error", f"{_asked(selection)} has a value that is not a finite number")
        match selection.function:
            case "median":
                return statistics.median(values)
            case "values":
                return values
            case "spread":
                if len(values) < 2:
                    raise _Unjudged(
                        "error", f"{_asked(selection)} has one value; a spread needs two"
                    )
                return max(values) - min(values)
            case "maximum":
                return max(values)
            case "minimum":
                return min(values)
            case _:
                return len(values)


def _covers(selection: Selection, subject: Subject) -> bool:
    """Whether rows of a subject may be among those that the selectors ask for."""
    return all(
        subject.keys.get(key) == value
        for key, value in selection.selectors
        if key in ("variant", "series", "setup", "testbed")
    )


def _concerns(entry: Missing | Skipped, selection: Selection) -> bool:
    """Whether something not measured is (part of) what a selection asks for."""
    return selection.name in entry.names and _covers(selection, entry.subject)


def _key(row: Measurement, key: str) -> str | None:
    """A row's value of a selector's key."""
    return row.subject.keys.get(key, row.context.get(key))


def _label(row: Measurement) -> str:
    words = (row.variant, *((row.series,) if row.series else ()))
    return ", ".join((*words, *(f"{key}={value}" for key, value in row.where.items())))


def _asked(selection: Selection) -> str:
    """A selection in short: ``lspci.exits[vanilla, cf8]``."""
    order = sorted(selection.selectors, key=lambda item: _rank(item[0]))
    words = [value if value is not None else f"no {key}" for key, value in order]
    return f"{selection.name}[{', '.join(words)}]" if words else selection.name


def _rank(key: str) -> int:
    """The place of a selector in a label: the widest first."""
    keys = ("variant", "series", "testbed", "setup", "path", "pass")
    return keys.index(key) if key in keys else len(keys)


def _ambiguous(selection: Selection, rows: Sequence[Measurement]) -> str:
    keys = ("variant", "series", *dict.fromkeys(key for row in rows for key in row.where))
    apart = []
    for key in keys:
        values = list(dict.fromkeys(_key(row, key) for row in rows))
        if len(values) > 1:
            apart.append(f"{key} ({', '.join('None' if v is None else v for v in values)})")
    tell = f"tell them apart by {', '.join(apart)}" if apart else "nothing tells them apart"
    return f"{len(rows)} rows are {_asked(selection)}: {tell}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def judge(
    checks: Iterable[Check],
    measurements: Sequence[Measurement],
    missing: Sequence[Missing],
    skipped: Sequence[Skipped],
    plan: Plan,
) -> tuple[CheckResult, ...]:
    """A verdict for each check, in order, then an error for all that was not measured.

    What should have been measured and was not fails the run by a result of its own, named
    ``measured:<test>:<variant>``, whether or not a check needs it. Never raises.
    """
    run = _Run(plan, measurements, missing, skipped)
    return (*(_judge_one(check, run) for check in checks), *_unmeasured(run))


def _judge_one(check: Check, run: _Run) -> CheckResult:
    def result(status: Status, observed: str, reason: str) -> CheckResult:
        return CheckResult(check.name, status, observed, check.expected, reason)

    if reason := _not_applicable(check.applies_to, run.plan):
        return result("skip", "", reason)
    for selection in check.selections:
        if reason := run.unselected(selection):
            return result("skip", "", reason)
    observed: list[str] = []
    refusals: list[_Unjudged] = []
    values: dict[Selection, Any] = {}
    for selection in check.selections:
        try:
            values[selection] = run.value(selection)
        except _Unjudged as refusal:
            refusals.append(refusal)
        else:
            observed.append(_observed(selection, values[selection]))
    if refusals:
        worst = next((r for r in refusals if r.status == "error"), refusals[0])
        return result(worst.status, "; ".join(observed), worst.reason)
    try:
        holds = evaluate(check.expression, values)
    except (ArithmeticError, TypeError, ValueError) as error:
        reason = f"`{check.expression}` cannot be evaluated: {first_line(str(error))}"
        return result("error", "; ".join(observed), reason)
    if not isinstance(holds, bool):
        reason = f"`{check.expression}` is {holds!r}, and not true or false"
        return result("error", "; ".join(observed), reason)
    if holds:
        return result("pass", "; ".join(observed), check.why)
    return result("fail", "; ".join(observed), f"`{check.expression}` is false. {check.why}")


def _not_applicable(condition: AppliesTo, plan: Plan) -> str | None:
    """Why a check is not for this run, or None."""
    testbed = (plan.testbed,) if plan.testbed else ()
    for what, wanted, have in (
        ("host", condition.hosts, (plan.host,)),
        ("testbed", condition.testbeds, testbed),
        ("test", condition.tests, plan.tests),
        ("variant", condition.variants, plan.variants),
        ("series", condition.series, plan.series),
    ):
        if wanted and not set(wanted).intersection(have):
            return f"the check is for the {what} {_list(wanted)}; this run has {_list(have)}"
    return None


def _observed(selection: Selection, value: float | int | tuple[float, ...]) -> str:
    unit = "" if selection.function == "count" else f" {registry.metrics()[selection.name].unit}"
    text = ", ".join(map(number, value)) if isinstance(value, tuple) else number(value)
    return f"{selection.function} {_asked(selection)} = {text}{unit}"


def _unmeasured(run: _Run) -> list[CheckResult]:
    """An error for each test and subject of which something was not measured."""
    reasons: dict[tuple[str, Subject], list[str]] = {}
    wanted: dict[tuple[str, Subject], list[str]] = {}
    for entry in run.missing:
        key = (entry.test, entry.subject)
        reasons.setdefault(key, []).append(f"{entry.reason}\n{entry.detail}".strip())
        wanted.setdefault(key, []).extend(entry.names)
    told = {(entry.subject, name) for entry in run.missing for name in entry.names}
    told |= {(entry.subject, name) for entry in run.skipped for name in entry.names}
    told |= {(row.subject, row.name) for row in run.measurements}
    for (subject, test), names in run.plan.names.items():
        for name in sorted(names):
            if (subject, name) not in told:
                key = (test, subject)
                reasons.setdefault(key, []).append(f"{name} has no row, and nothing says why")
                wanted.setdefault(key, []).append(name)
    return [
        CheckResult(
            name=f"measured:{test}:{subject.label}",
            status="error",
            observed="",
            expected=f"measured: {_list(dict.fromkeys(wanted[test, subject]))}",
            reason="\n".join(dict.fromkeys(reasons[test, subject])),
        )
        for test, subject in reasons
    ]


def together(parts: Mapping[str, Sequence[CheckResult]]) -> tuple[CheckResult, ...]:
    """The verdicts of several parts of one run in one list, by the names of the parts.

    A verdict of the second part and those behind it has the part's name beside the check's,
    and a part that skips a check is not heard where another has judged it.
    """
    judged = {one.name for part in parts.values() for one in part if one.status != "skip"}
    found: dict[str, CheckResult] = {}
    for number_, (name, part) in enumerate(parts.items()):
        for one in part:
            if one.status != "skip":
                label = f"{one.name} ({name})" if number_ else one.name
                found[label] = replace(one, name=label)
            elif one.name not in judged:
                found.setdefault(one.name, one)
    return tuple(found.values())


def exit_status(results: Iterable[CheckResult]) -> Exit:
    """FAILED if a check failed or something could not be judged, else OK."""
    bad = any(result.status in ("fail", "error") for result in results)
    return Exit.FAILED if bad else Exit.OK
