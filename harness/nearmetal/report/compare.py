# SPDX-License-Identifier: GPL-2.0-or-later
"""Two reports side by side: what changed, and whether by more than chance explains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core.errors import UsageError
from ..core.model import Measurement, Report, Variant
from ..core.text import number
from ..measure import registry
from .tables import context_text, provenance_text

Verdict = Literal["same", "better", "worse", "differs", "only in a", "only in b", "no proof"]
"""``no proof``: a time or a speed of an emulated machine, which a comparison says nothing about."""

_SPEEDS = frozenset({"ns", "us", "ms", "s", "MiB/s", "GB/s", "Gb/s", "samples/s"})
_FLOOR = 0.01
"""A change of the median by at most this much, in a row's unit, is the noise of timers: shares of
an exit for a sample, of a per cent, of a ratio."""

_STYLE: dict[Verdict, str] = {
    "same": "",
    "better": "green",
    "worse": "bold red",
    "differs": "yellow",
    "only in a": "yellow",
    "only in b": "yellow",
    "no proof": "dim",
}


@dataclass(frozen=True)
class Row:
    """One measurement in both reports; medians in ``unit``, None where a report lacks it."""

    name: str
    variant: Variant
    series: str | None
    context: Mapping[str, str]
    unit: str
    a: float | None
    b: float | None
    beyond_spread: bool
    """Whether no value of the one report lies within the other's, and the medians differ by
    more than the tolerance."""
    verdict: Verdict

    @property
    def ratio(self) -> float | None:
        """b's median divided by a's; None where one is lacking or a's is 0."""
        if self.a is None or self.b is None or self.a == 0:
            return None
        return self.b / self.a


@dataclass(frozen=True)
class Comparison:
    """Two reports compared; ``a`` is the one before."""

    a: Report
    b: Report
    tolerance: float
    rows: tuple[Row, ...]

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows that are not the same in both, without those that prove nothing."""
        return tuple(row for row in self.rows if row.verdict not in ("same", "no proof"))


_Key = tuple[str, str, str | None, tuple[tuple[str, str], ...]]


def compare(
    a: Report, b: Report, tolerance: float = 0.0, *, mix_provenance: bool = False
) -> Comparison:
    """Compare two reports row by row; rows match by name, variant, series and context.

    ``tolerance`` is the part of a's median (0.05 for 5 %) by which medians may differ
    without being called a change. Raises UsageError where one report's figures are
    emulated and the other's are not (unless ``mix_provenance``), for two rows of one report
    that nothing tells apart, for one measurement in two units, and for a tolerance below 0.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(
            f"invalid tolerance {tolerance}",
            hint="give a number of 0 or more; 0.05 ignores changes up to 5 %",
        )
    provenance = [provenance_text(report) for report in (a, b)]
    if provenance[0] != provenance[1] and not mix_provenance and a.measurements and b.measurements:
        raise UsageError(
            f"{a.run.id} is {provenance[0]} and {b.run.id} is {provenance[1]}: "
            "emulated figures cannot be compared with those of hardware",
            hint="compare two runs of one kind, or give --mix-provenance",
        )
    before, after = _by_key(a), _by_key(b)
    keys = [*before, *(key for key in after if key not in before)]
    names = list(dict.fromkeys((*registry.metrics(), *(key[0] for key in keys))))
    keys.sort(key=lambda key: names.index(key[0]))
    rows = tuple(_row(before.get(key), after.get(key), tolerance) for key in keys)
    return Comparison(a, b, tolerance, rows)


def _by_key(report: Report) -> dict[_Key, Measurement]:
    found: dict[_Key, Measurement] = {}
    for row in report.measurements:
        key = (row.name, row.variant, row.series, tuple(sorted(row.where.items())))
        if key in found:
            words = " ".join((row.name, row.variant, context_text(row.where))).rstrip()
            raise UsageError(
                f"{report.run.id} has two rows of {words}", hint="compare runs made by nearmetal"
            )
        found[key] = row
    return found


def _row(a: Measurement | None, b: Measurement | None, tolerance: float) -> Row:
    some = a or b
    assert some is not None
    if a and b and a.unit != b.unit:
        raise UsageError(
            f"{a.name} is in {a.unit} in one report and in {b.unit} in the other",
            hint="use reports of one version of nearmetal",
        )
    beyond = bool(a and b and _beyond(a, b, tolerance))
    return Row(
        name=some.name,
        variant=some.variant,
        series=some.series,
        context=some.where,
        unit=some.unit,
        a=a.median if a and a.values else None,
        b=b.median if b and b.values else None,
        beyond_spread=beyond,
        verdict=_verdict(a, b, beyond),
    )


def _beyond(a: Measurement, b: Measurement, tolerance: float) -> bool:
    if not all(row.values and all(map(math.isfinite, row.values)) for row in (a, b)):
        return True
    apart = max(a.values) < min(b.values) or max(b.values) < min(a.values)
    return apart and abs(b.median - a.median) > max(tolerance * abs(a.median), _FLOOR)


def _verdict(a: Measurement | None, b: Measurement | None, beyond: bool) -> Verdict:
    if a is None:
        return "only in b"
    if b is None:
        return "only in a"
    if not beyond:
        return "same"
    if a.unit in _SPEEDS and "emulated" in (a.provenance, b.provenance):
        return "no proof"
    entry = registry.metrics().get(a.name)
    higher = (b.median if b.values else math.nan) - (a.median if a.values else math.nan)
    if entry is None or entry.better == "equal" or not math.isfinite(higher):
        return "differs"
    return "better" if (higher > 0) == (entry.better == "higher") else "worse"


# --- as text ---------------------------------------------------------------------------------


def summary(comparison: Comparison) -> str:
    """One line: how many rows are the same, better, worse, …."""
    verdicts: Sequence[Verdict] = (
        *("worse", "better", "differs", "only in a", "only in b", "no proof", "same"),
    )
    counts = [(sum(row.verdict == name for row in comparison.rows), name) for name in verdicts]
    return ", ".join(f"{count} {name}" for count, name in counts if count) or "nothing to compare"


def render_json(comparison: Comparison, *, every: bool = False) -> str:
    """The comparison for programs: an object with the runs and the rows that ``every`` chooses."""
    rows = [
        {
            "name": row.name,
            "variant": row.variant,
            "series": row.series,
            "context": dict(row.context),
            "unit": row.unit,
            "a": _finite(row.a),
            "b": _finite(row.b),
            "verdict": row.verdict,
        }
        for row in _shown(comparison, every)
    ]
    runs = {"a": comparison.a.run.id, "b": comparison.b.run.id}
    return json.dumps({**runs, "tolerance": comparison.tolerance, "rows": rows}, indent=1)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shown(comparison: Comparison, every: bool) -> Sequence[Row]:
    return comparison.rows if every else comparison.changed


def render_rich(comparison: Comparison, *, every: bool = False) -> Table:
    """The comparison as a table for a terminal: what changed, or ``every`` row."""
    table = Table(
        title=f"a: {comparison.a.run.id}   b: {comparison.b.run.id}",
        title_justify="left",
        caption=summary(comparison),
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("measurement", "row"):
        table.add_column(heading, overflow="fold")
    for heading in ("a", "b", "b/a"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in _shown(comparison, every):
        table.add_row(
            Text(row.name),
            Text(_which(row)),
            number(row.a),
            number(row.b),
            _ratio(row),
            Text(row.unit),
            Text(row.verdict, style=_STYLE[row.verdict]),
        )
    return table


def render_text(comparison: Comparison, *, every: bool = False) -> str:
    """The comparison as plain text that stays whole in a mail (ASCII, no colours).

    A name stands in a line of its own above its rows, so that lines stay below 80 columns.
    """
    a, b = comparison.a.run, comparison.b.run
    lines = [
        f"a: {a.id} ({a.host}, {provenance_text(comparison.a)})",
        f"b: {b.id} ({b.host}, {provenance_text(comparison.b)})",
        "a change: the ranges do not meet, and the medians are more than "
        f"{100 * comparison.tolerance:g} % apart",
    ]
    cells = [
        (_which(row), number(row.a), number(row.b), _ratio(row), row.verdict)
        for row in _shown(comparison, every)
    ]
    headings = ("", "a", "b", "b/a", "")
    widths = [max(len(cell) for cell in column) for column in zip(headings, *cells, strict=True)]

    def line(words: Sequence[str]) -> str:
        first, *figures, last = words
        columns = [figure.rjust(width) for figure, width in zip(figures, widths[1:-1], strict=True)]
        return "  ".join(("", first.ljust(widths[0]), *columns, last)).rstrip()

    if not cells:
        return "\n".join([*lines, "", summary(comparison)]) + "\n"
    lines += ["", line(headings)]
    name = ""
    for row, words in zip(_shown(comparison, every), cells, strict=True):
        if row.name != name:
            name = row.name
            lines.append(f"{name} [{row.unit}]")
        lines.append(line(words))
    lines += ["", summary(comparison)]
    return "\n".join(lines) + "\n"


def _which(row: Row) -> str:
    """What tells a row apart from others of its name, in short."""
    return " ".join((row.variant, *((row.series,) if row.series else ()), *row.context.values()))


def _ratio(row: Row) -> str:
    return f"{row.ratio:.3f}" if row.ratio is not None and math.isfinite(row.ratio) else "-"
