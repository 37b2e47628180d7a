# SPDX-License-Identifier: GPL-2.0-or-later
"""A run as the plain text that is pasted below a cover letter: ASCII, at most 72 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from ..core.errors import UsageError
from ..core.model import VARIANTS, Report, Variant
from ..core.text import nearest, number
from ..measure import registry
from .cards import Card, Figure, cards, figures_of
from .tables import provenance_text

WIDTH = 72
_LABEL = 40
"""Columns of what is measured; the rest is for three figures."""


def render_text(report: Report, series: Sequence[str] = (), metrics: Sequence[str] = ()) -> str:
    """A table for each series: vanilla, off and on, of its headlines or of ``metrics``.

    Raises UsageError for a series that the run did not switch on, and for an unknown metric.
    """
    every = {card.feature.name: card for card in cards(report)}
    for name in series:
        if name not in every:
            raise UsageError(
                f"the run {report.run.id} did not switch on a series '{name}'",
                hint=nearest(name, every) if every else "it switched on none",
            )
    for name in metrics:
        if name not in registry.metrics():
            raise UsageError(f"unknown metric '{name}'", hint=nearest(name, registry.metrics()))
    if not every:
        raise UsageError(
            f"the run {report.run.id} switched on no series, so there is nothing to compare",
            hint="choose a run with the variants vanilla and on ('nearmetal list runs')",
        )
    chosen = [every[name] for name in dict.fromkeys(series)] or list(every.values())
    return "\n".join("\n".join(_table(report, card, metrics)) for card in chosen)


def _table(report: Report, card: Card, metrics: Sequence[str]) -> Iterator[str]:
    feature = card.feature
    shown = list(card.figures)
    if metrics:
        shown = [figure for name in metrics for figure in figures_of(report, feature.name, name)]
    yield f"{feature.name}:"
    yield ""
    if not shown:
        yield "  (the run has no row both with and without it)"
        yield ""
    columns: list[Variant] = [
        variant for variant in VARIANTS if any(variant in one.rows for one in shown)
    ]
    if shown:
        width = (WIDTH - _LABEL) // max(len(columns), 1)
        yield " " * _LABEL + "".join(f"{variant:>{width}}" for variant in columns)
    testbeds = list(dict.fromkeys(one.testbed for one in shown))
    for testbed in testbeds:
        if len(testbeds) > 1:
            yield f"on the {testbed} testbed:"
        for figure in shown:
            if figure.testbed == testbed:
                values = "".join(f"{_cell(figure, variant):>{width}}" for variant in columns)
                *head, last = textwrap.wrap(
                    figure.headline.label, _LABEL - 3, subsequent_indent="  "
                )
                yield from (f"  {line}" for line in head)
                yield f"  {last:<{_LABEL - 2}}{values}".rstrip()
    if shown:
        yield ""
    yield from textwrap.wrap(_about(report, card), WIDTH)
    yield ""


def _cell(figure: Figure, variant: Variant) -> str:
    row = figure.rows.get(variant)
    return "-" if row is None else number(row.median)


def _about(report: Report, card: Card) -> str:
    """Where the figures come from and what else was found, in a paragraph."""
    roles = ("host-kernel", "host-qemu")
    built = dict.fromkeys(
        one.source.split(" (")[0] for role in roles for one in report.builds if one.role == role
    )
    of = f" of {' and '.join(built)}" if built else ""
    kind = provenance_text(report)
    worth = (
        " on an emulated host, which proves counts and routes but no times"
        if kind == "emulated"
        else f" ({kind})"
    )
    _, counts = card.verdict
    return (
        f"Medians{of}{worth}. vanilla: without the patches; off: with them, switched off; on:"
        f" switched on. Checks of the series: {counts}. Run {report.run.id} of nearmetal."
    )
