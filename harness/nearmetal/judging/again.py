# SPDX-License-Identifier: GPL-2.0-or-later
"""The measurements of a run judged again, by checks that its report was not made with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..core.model import (
    VARIANTS,
    CheckResult,
    Measurement,
    Missing,
    Report,
    Subject,
)
from ..measure import registry
from .judge import Plan, judge, together
from .load import Check


def judge_again(report: Report, checks: Iterable[Check]) -> tuple[CheckResult, ...]:
    """The verdicts of other checks on a report's measurements.

    What a report says was not measured is an error again. What the run left out on purpose is
    not in a report: a check that needs it is skipped.
    """
    every = tuple(checks)
    lost = list(_lost(report))
    testbeds = list(
        dict.fromkeys(
            [
                *(row.subject.testbed for row in report.measurements),
                *(one.subject.testbed for one in lost),
            ]
        )
    ) or [None]
    parts = {}
    for testbed in testbeds:
        rows = [row for row in report.measurements if row.subject.testbed == testbed]
        missing = [one for one in lost if one.subject.testbed == testbed]
        parts[testbed or report.run.host] = judge(
            every, rows, missing, (), _plan(report, rows, missing, testbed)
        )
    return together(parts)


def _plan(
    report: Report, rows: Sequence[Measurement], missing: Sequence[Missing], testbed: str | None
) -> Plan:
    """What the run set out to measure on one host, as far as its report tells."""
    names: dict[tuple[Subject, str], set[str]] = {}
    for row in rows:
        if row.name in registry.metrics():
            names.setdefault((row.subject, registry.test_of(row.name).name), set()).add(row.name)
    for one in missing:
        names.setdefault((one.subject, one.test), set()).update(one.names)
    tests = dict.fromkeys(test for _, test in names)
    return Plan(
        tests=tuple(name for name in registry.tests() if name in tests),
        names={key: frozenset(value) for key, value in names.items()},
        host=report.run.host,
        testbed=testbed,
    )


_MEASURED = re.compile(r"measured:(?P<test>[^:]+):(?P<label>\S+)(?: \((?P<part>.+)\))?")


def _lost(report: Report) -> Iterable[Missing]:
    """What was to be measured and was not, by the report's own errors about it."""
    first = next((row.subject.testbed for row in report.measurements), None)
    for check in report.checks:
        found = _MEASURED.fullmatch(check.name)
        if found is None or check.status != "error":
            continue
        reason, _, detail = check.reason.partition("\n")
        names = check.expected.removeprefix("measured: ").split(", ")
        subject = _subject(found["label"], found["part"] or first)
        yield Missing(found["test"], subject, reason, tuple(names), detail)


def _subject(label: str, testbed: str | None) -> Subject:
    """The subject of a label such as ``on-direct-direct-p2p`` (core.model.Subject.label)."""
    variant = next(one for one in (*VARIANTS, None) if one is None or label.startswith(one))
    rest = label.removeprefix(f"{variant or 'vanilla'}").removeprefix("-")
    setup = next(
        (one for one in registry.setups() if rest == one or rest.startswith(f"{one}-")), None
    )
    series = rest.removeprefix(setup or "").removeprefix("-") or None
    return Subject(variant or "vanilla", series, setup, testbed)
