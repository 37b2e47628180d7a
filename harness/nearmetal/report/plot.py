# SPDX-License-Identifier: GPL-2.0-or-later
"""Bar charts as SVG elements for the page, in its colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import escape

from ..core.model import Measurement
from ..core.text import number
from ..measure.api import Plot
from .tables import shared_context, variant_text

_COLOURS = ("#4a90d9", "#e08a2e", "#2fa58e", "#b565c4")
WIDTH, LABELS, BAR, GAP, TOP, AXIS = 560, 170, 18, 9, 30, 44
"""Of a chart, in CSS pixels: its width, that of the labels, the height of a bar, the gap between
groups, the room above and below the bars."""
_VALUE = 76
"""Room for the value behind the longest bar."""
_TICKS = 5


def draw(plot: Plot, rows: Sequence[Measurement]) -> str:
    """A plot as an SVG element, or "" where no row belongs into it.

    A bar is a row's median, the line on it spans all values. Rows are grouped by variant, series
    and context; colours of text and axes are the page's.
    """
    chosen = [
        row
        for row in rows
        if row.name in plot.bars and row.values and all(map(math.isfinite, row.values))
    ]
    if not chosen:
        return ""
    names = [name for name in plot.bars if any(row.name == name for row in chosen)]
    legend = len(names) > 1
    first = TOP + 22 * legend
    groups = _groups(chosen)
    bottom = first + sum(BAR * len(group) for group in groups.values()) + GAP * len(groups)
    top = max(max(row.values) for row in chosen) or 1.0
    provenance = ", ".join(sorted({row.provenance for row in chosen}))
    unit = chosen[0].unit
    label = f"{plot.title}, in {unit}, {provenance}; the table below has the figures"
    parts = [
        f'<svg class="plot" role="img" aria-label="{escape(label)}" xmlns='
        f'"http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + AXIS}" font-size="13"'
        ' fill="currentColor">',
        f'<text x="0" y="16" font-size="15">{escape(plot.title)}</text>',
        *(_legend(plot, names) if legend else ()),
        *_axis(top, first, bottom, f"{unit}  ({provenance})"),
        *_bars(groups, names, top, first),
        "</svg>",
    ]
    return "\n".join(parts)


def _x(value: float, top: float) -> float:
    """Where a value lies, in pixels from the left."""
    return LABELS + max(value, 0.0) / top * (WIDTH - LABELS - _VALUE)


def _legend(plot: Plot, names: Sequence[str]) -> Iterator[str]:
    x = 0.0
    for index, name in enumerate(names):
        colour = _COLOURS[index % len(_COLOURS)]
        yield f'<rect x="{x:.0f}" y="26" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17:.0f}" y="37">{escape(plot.bars[name])}</text>'
        x += 30 + 7 * len(plot.bars[name])


def _axis(top: float, first: int, bottom: int, words: str) -> Iterator[str]:
    step = _step(top)
    lines = f"M{LABELS} {first}V{bottom}H{WIDTH - _VALUE}"
    yield f'<path d="{lines}" fill="none" stroke="currentColor"/>'
    for index in range(int(top / step) + 1):
        x = _x(index * step, top)
        yield f'<path d="M{x:.1f} {bottom}v4" stroke="currentColor"/>'
        text = f"{index * step:,.10g}"
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    middle = (LABELS + WIDTH - _VALUE) / 2
    yield f'<text x="{middle:.0f}" y="{bottom + 37}" text-anchor="middle">{escape(words)}</text>'


def _step(top: float) -> float:
    """A round distance of ticks: 1, 2 or 5 times a power of ten, at most _TICKS of them."""
    rough = top / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _bars(
    groups: Mapping[str, Sequence[Measurement]], names: Sequence[str], top: float, first: int
) -> Iterator[str]:
    y = first + GAP / 2
    for label, group in groups.items():
        lines = label.split("\n")
        middle = y + BAR * len(group) / 2 + 4 - 7 * (len(lines) - 1)
        for index, line in enumerate(lines):
            at = f'x="{LABELS - 8}" y="{middle + 14 * index:.1f}"'
            yield f'<text {at} text-anchor="end" font-size="12">{escape(line)}</text>'
        for row in sorted(group, key=lambda row: names.index(row.name)):
            end = _x(row.median, top)
            colour = _COLOURS[names.index(row.name) % len(_COLOURS)]
            size = f'width="{end - LABELS:.1f}" height="{BAR - 3}"'
            yield f'<rect x="{LABELS}" y="{y:.1f}" {size} fill="{colour}"/>'
            low, high = min(row.values), max(row.values)
            if high > low:
                span = f"M{_x(low, top):.1f} {y + BAR / 2 - 1.5:.1f}H{_x(high, top):.1f}"
                yield f'<path d="{span}" stroke="currentColor" stroke-width="1.6"/>'
                end = max(end, _x(high, top))
            yield f'<text x="{end + 5:.1f}" y="{y + BAR - 6:.1f}">{number(row.median)}</text>'
            y += BAR
        y += GAP


def _groups(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The rows by what tells them apart besides their names, which is their label."""
    shared = frozenset(shared_context(rows))
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        context = ", ".join(value for key, value in row.where.items() if key not in shared)
        label = f"{variant_text(row)}\n{context}" if context else variant_text(row)
        groups.setdefault(label, []).append(row)
    return groups
