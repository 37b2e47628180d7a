# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests that there are: those below this package, and those of other people.

A distribution of yours adds tests by the entry point ``nearmetal.tests``, whose value is a
``measure.api.Test``: ``[project.entry-points."nearmetal.tests"]``, ``mine = "mine.test:TEST"``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType

from ..core.errors import UsageError
from ..core.model import SUBJECT_KEYS
from .api import Metric, Setup, Test

GROUP = "nearmetal.tests"


@functools.cache
def tests() -> Mapping[str, Test]:
    """All tests by name, in their order; UsageError for one that cannot be taken."""
    found: list[Test] = []
    here = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            one = getattr(importlib.import_module(f"{here}.{module.name}"), "TEST", None)
            if one is not None:
                found.append(one)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            one = point.load()
        except Exception as error:
            raise UsageError(
                f"the test {point.value} of entry point {GROUP} cannot be loaded: {error}",
                hint="correct it, or uninstall the package that provides it",
            ) from None
        if not isinstance(one, Test):
            raise UsageError(
                f"{point.value} of entry point {GROUP} is not a nearmetal.measure.api.Test",
                hint="docs/design.md shows how a test is added",
            )
        found.append(one)
    _check(found)
    return MappingProxyType({one.name: one for one in sorted(found, key=lambda one: one.order)})


def _check(found: list[Test]) -> None:
    names: dict[str, Test] = {}
    metrics: dict[str, Test] = {}
    setups: dict[str, Setup] = {}
    for test in found:
        if test.name in names:
            raise UsageError(f"there are two tests '{test.name}'", hint="give one another name")
        names[test.name] = test
        for metric in test.metrics:
            if metric.name in metrics:
                raise UsageError(
                    f"the tests {metrics[metric.name].name} and {test.name} both have a metric"
                    f" '{metric.name}'",
                    hint="give one another name",
                )
            if reserved := [key for key in metric.keys if key in SUBJECT_KEYS]:
                raise UsageError(
                    f"the metric {metric.name} uses the reserved context key '{reserved[0]}'",
                    hint="the keys of a subject are reserved",
                )
            metrics[metric.name] = test
        for setup in (test.plain, *test.setups):
            if setup.name is not None and setups.setdefault(setup.name, setup) != setup:
                raise UsageError(
                    f"the test {test.name} defines the set-up '{setup.name}' differently from"
                    " another test",
                    hint="give it another name",
                )


@functools.cache
def metrics() -> Mapping[str, Metric]:
    """All metrics by name, in the order of a report."""
    return MappingProxyType(
        {metric.name: metric for test in tests().values() for metric in test.metrics}
    )


@functools.cache
def test_of(metric: str) -> Test:
    """The test that measures a metric, which must be known."""
    return next(test for test in tests().values() if metric in test.names)


def setups() -> tuple[str, ...]:
    """The names of all set-ups."""
    return tuple(
        dict.fromkeys(
            setup.name
            for test in tests().values()
            for setup in (test.plain, *test.setups)
            if setup.name is not None
        )
    )


def setups_of(test: Test) -> tuple[str, ...]:
    """The names of a test's set-ups."""
    return tuple(one.name for one in (test.plain, *test.setups) if one.name is not None)


def series_setups(test_names: tuple[str, ...]) -> tuple[str, ...]:
    """The set-ups that a series whose ``on`` is measured by these tests may name."""
    return tuple(
        dict.fromkeys(
            setup.name
            for name in test_names
            for setup in (tests()[name].plain, *tests()[name].setups)
            if setup.name is not None and not setup.needs
        )
    )


def functions() -> tuple[str, ...]:
    """The names of all functions of a host that tests are about."""
    return tuple(dict.fromkeys(name for test in tests().values() for name in test.functions))


def forget() -> None:
    """Look for tests again at the next call."""
    for one in (tests, metrics, test_of):
        one.cache_clear()
