# SPDX-License-Identifier: GPL-2.0-or-later
"""The small bar chart of a series as an SVG element, in the page's colours, light or dark."""

from __future__ import annotations

from markupsafe import escape

from ..core.model import Variant
from .cards import Figure, short

WIDTH, LABELS, VALUES, BAR, GAP = 360, 62, 92, 20, 8
"""Of a chart, in CSS pixels: its width, the room for the variants' names and for the values, the
height of a bar, the gap between two."""
_WORDS: dict[Variant, str] = {"vanilla": "vanilla", "off": "off", "on": "on"}


def draw(figure: Figure) -> str:
    """A bar for each variant that was measured: the median, and a line over all values."""
    rows = {variant: figure.rows[variant] for variant in _WORDS if variant in figure.rows}
    top = max(max(row.values) for row in rows.values()) or 1.0
    height = len(rows) * (BAR + GAP)
    unit = figure.after.unit
    told = ", ".join(f"{variant} {short(row.median, unit)}" for variant, row in rows.items())
    parts = [
        f'<svg class="plot" role="img" aria-label="{escape(f"{figure.headline.label}: {told}")}"'
        f' xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="14"'
        ' fill="currentColor">'
    ]
    for index, (variant, row) in enumerate(rows.items()):
        y = index * (BAR + GAP) + GAP / 2
        text = y + BAR / 2 + 5
        end = _x(row.median, top)
        parts += [
            f'<text x="{LABELS - 8}" y="{text:.1f}" text-anchor="end">{_WORDS[variant]}</text>',
            f'<rect class="bar {variant}" x="{LABELS}" y="{y:.1f}"'
            f' width="{max(end - LABELS, 1.5):.1f}" height="{BAR}" rx="2"/>',
        ]
        low, high = min(row.values), max(row.values)
        if high > low:
            line = f"M{_x(low, top):.1f} {y + BAR / 2:.1f}H{_x(high, top):.1f}"
            parts.append(f'<path d="{line}" stroke="currentColor" stroke-width="1.6"/>')
            end = max(end, _x(high, top))
        parts.append(f'<text x="{end + 7:.1f}" y="{text:.1f}">{short(row.median, unit)}</text>')
    return "\n".join([*parts, "</svg>"])


def _x(value: float, top: float) -> float:
    """Where a value lies, in pixels from the left."""
    return LABELS + max(value, 0.0) / top * (WIDTH - LABELS - VALUES)
