# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run says of each series: headline figures before and after, and its checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.model import CheckResult, Feature, Headline, Measurement, Report, Status, Variant
from ..core.text import number
from ..measure import registry
from .tables import verdict


@dataclass(frozen=True)
class Figure:
    """A headline on one host: rows of one metric, and those of the variants that the run has."""

    headline: Headline
    testbed: str | None
    rows: Mapping[Variant, Measurement]

    @property
    def before(self) -> Measurement | None:
        """The row without the series: vanilla's, or else that of ``off``.

        None of what only a guest with the series has.
        """
        return self.rows.get("vanilla", self.rows.get("off"))

    @property
    def after(self) -> Measurement:
        """The row with the series on."""
        return self.rows["on"]


@dataclass(frozen=True)
class Card:
    """One series in a report; ``figures`` are in the order of its headlines and of the hosts."""

    feature: Feature
    figures: tuple[Figure, ...]
    checks: tuple[CheckResult, ...]

    @property
    def verdict(self) -> tuple[Status, str]:
        """The worst of its checks, and their counts."""
        return verdict(self.checks)


def cards(report: Report) -> list[Card]:
    """A card for each series of which the run measured, or should have measured, something."""
    found = []
    for feature in report.series:
        measured = any(row.series == feature.name for row in report.measurements)
        failed = [check for check in report.checks if _lacks(check, feature.name)]
        if measured or failed:
            named = [check for check in report.checks if base_name(check) in feature.checks]
            found.append(Card(feature, tuple(figures(report, feature)), (*failed, *named)))
    return found


def base_name(check: CheckResult) -> str:
    """A check's name without the part of the run behind it, as in ``name (intel)``."""
    return check.name.partition(" (")[0]


def _lacks(check: CheckResult, series: str) -> bool:
    """Whether a verdict says that a series' ``on`` was not measured."""
    label = base_name(check)
    return label.startswith("measured:") and label.partition(":on-")[2].endswith(series)


def figures(report: Report, feature: Feature) -> list[Figure]:
    """The headlines that the run has, both before and after where there is a before.

    Those of its first host come first.
    """
    testbeds = list(dict.fromkeys(row.subject.testbed for row in report.measurements))
    found = [
        figure
        for testbed in testbeds
        for headline in feature.headlines
        if (figure := _figure(report, feature.name, headline, testbed)) is not None
    ]
    return sorted(found, key=lambda figure: testbeds.index(figure.testbed))


def figures_of(report: Report, series: str, metric: str) -> list[Figure]:
    """Figures of all rows that a metric has of a series' ``on``, beside the others of that context.

    A set-up of ``on`` alone is compared with the plain one of the others.
    """
    found = []
    for row in report.measurements:
        if row.name != metric or row.series != series:
            continue
        where = dict(row.context)
        words = " ".join(f"{key}={value}" for key, value in where.items())
        meaning = registry.metrics()[metric].meaning
        headline = Headline(
            metric,
            f"{meaning} ({words})" if words else meaning,
            rows=where,
            after={"setup": row.subject.setup},
        )
        figure = _figure(report, series, headline, row.subject.testbed)
        if figure is not None:
            found.append(figure)
    return found


def _figure(report: Report, series: str, headline: Headline, testbed: str | None) -> Figure | None:
    here = [
        row
        for row in report.measurements
        if row.name == headline.metric
        and row.subject.testbed == testbed
        and row.values
        and all(map(math.isfinite, row.values))
    ]
    rows: dict[Variant, Measurement] = {}
    sides: tuple[tuple[Variant, str | None, Mapping[str, str | None]], ...] = (
        ("vanilla", None, headline.before),
        ("off", None, headline.before),
        ("on", series, headline.after),
    )
    for variant, on, beside in sides:
        wanted = {**headline.rows, **beside}
        some = [
            row
            for row in here
            if (row.variant, row.series) == (variant, on)
            and all(row.where.get(key) == value for key, value in wanted.items())
        ]
        # a variant may be measured in set-ups besides the plain one, which is meant then
        if len(some) > 1:
            some = [row for row in some if row.subject.setup is None]
        if len(some) == 1:
            rows[variant] = some[0]
    if "on" not in rows or (len(rows) < 2 and not _is_new(headline.metric)):
        return None
    return Figure(headline, testbed, rows)


def _is_new(metric: str) -> bool:
    """Whether only ``on`` of a series can have a metric, as one of what no guest had before."""
    known = registry.metrics().get(metric)
    return known is not None and known.variants == ("on",)


def short(value: float, unit: str) -> str:
    """A figure in few characters: whole MiB of many bytes, three digits of a fraction."""
    mib = value / (1 << 20)
    if unit == "bytes" and mib >= 1:
        return f"{mib:.0f} MiB" if mib == int(mib) else f"{mib:.1f} MiB"
    if value != int(value) and 1e-4 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.1g}"
    return number(value) if abs(value) < 10000 else f"{value:,.0f}"
