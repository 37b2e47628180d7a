# SPDX-License-Identifier: GPL-2.0-or-later
"""report.html: one self-contained page, and the plots in it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from ..core.model import Measurement, Report
from ..measure.catalogue import CATALOGUE, TESTS
from .tables import (
    by_severity,
    context_text,
    first_line,
    in_order,
    number,
    printable,
    provenance_text,
    shared_context,
    spread_text,
    variant_text,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Plot:
    """A bar chart of measurements of one unit, side by side."""

    test: str
    title: str
    bars: Mapping[str, str]
    """The legend's words for each measurement's name."""


PLOTS: tuple[Plot, ...] = (
    Plot(
        "lspci",
        "Exits of one pass over all config registers",
        {"lspci.exits": "all config accesses", "lspci.userspace_exits": "of these, to QEMU"},
    ),
    Plot("lspci", "Time of one 4-byte config read", {"lspci.dword_ns": "in the guest"}),
    Plot(
        "lspci",
        "Host instructions of one 4-byte config read",
        {
            "lspci.dword_instructions": "a read",
            "exit.kernel_pair_instructions": "two port accesses that KVM serves",
        },
    ),
    Plot(
        "vmexit",
        "Exits for one sample of the monitoring agent",
        {
            "vmexit.agent.exits_per_sample": "all reasons",
            "vmexit.agent.userspace_exits_per_sample": "to QEMU",
            "vmexit.agent.pmu_exits_per_sample": "PMU",
        },
    ),
    Plot(
        "p2p",
        "Bandwidth between peers, beside guest RAM",
        {
            "p2p.read_mib_s": "read into the peer",
            "p2p.write_mib_s": "write from the peer",
            "p2p.host_ram_mib_s": "the same with guest RAM",
        },
    ),
)

_TITLES = {
    "lspci": "Config reads (lspci)",
    "vmexit": "Exits under a monitoring agent (vmexit)",
    "p2p": "Peer-to-peer DMA (p2p)",
}
_COLOURS = ("#4a90d9", "#e08a2e", "#2fa58e", "#b565c4")
_INK = "#010203"
"""Stands for the page's text colour until the plot is in the page, light or dark."""
_WIDTH_IN = 5.8
_BAR_IN = 0.24


def render_html(report: Report, links: Sequence[Path] = ()) -> str:
    """The page of a report; ``links`` are paths relative to the folder that it lies in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("nearmetal") / "data")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["printable"] = printable
    environment.filters["first_line"] = first_line
    environment.globals.update(
        context_text=context_text, spread_text=spread_text, variant_text=variant_text
    )
    worst, counts = verdict(report.checks)
    shared = shared_context(report.measurements)
    page = environment.get_template("report.html.j2").render(
        report=report,
        worst=worst,
        counts=counts,
        provenance=provenance_text(report),
        emulated=any(row.provenance == "emulated" for row in report.measurements),
        hardware=any(row.provenance == "hardware" for row in report.measurements),
        checks=by_severity(report.checks),
        sections=_sections(report),
        catalogue=CATALOGUE,
        shared=shared,
        shared_keys=frozenset(shared),
        links=[(path.as_posix(), quote(path.as_posix())) for path in links],
    )
    return re.sub(r"\n{2,}", "\n", page)


@dataclass(frozen=True)
class _Section:
    """The results of one test."""

    test: str
    title: str
    plots: tuple[Markup, ...]
    rows: tuple[Measurement, ...]


def _sections(report: Report) -> list[_Section]:
    found: dict[str, list[Measurement]] = {test: [] for test in TESTS}
    for row in report.measurements:
        entry = CATALOGUE.get(row.name)
        test = entry.test if entry else row.name.partition(".")[0]
        found.setdefault(test, []).append(row)
    return [
        _Section(
            test=test,
            title=_TITLES.get(test, test),
            plots=tuple(
                Markup(svg)
                for number_, plot in enumerate(PLOTS)
                if plot.test == test
                if (svg := draw(plot, rows, prefix=f"plot{number_}"))
            ),
            rows=tuple(in_order(rows)),
        )
        for test, rows in found.items()
        if rows
    ]


# --- plots -----------------------------------------------------------------------------------


def draw(plot: Plot, rows: Sequence[Measurement], *, prefix: str) -> str:
    """A plot as an SVG element to be put into a page, or "" where no row belongs into it.

    A bar is a row's median, the line on it spans all values. Rows are grouped by variant,
    series and context. ``prefix`` makes the element's ids its own. Colours of text and axes
    are the page's.
    """
    chosen = [
        row
        for row in rows
        if row.name in plot.bars and row.values and all(map(math.isfinite, row.values))
    ]
    if not chosen:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = _groups(chosen)
    bars = sum(map(len, groups.values()))
    height = 1.35 + _BAR_IN * bars + 0.16 * len(groups)
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": prefix,
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        axes = figure.add_subplot()
        _draw_bars(axes, plot, groups)
        provenance = ", ".join(sorted({row.provenance for row in chosen}))
        axes.set_xlabel(f"{chosen[0].unit}  ({provenance})")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    label = f"{plot.title}, in {chosen[0].unit}, {provenance}; the table below has the figures"
    return _embed(stream.getvalue(), prefix, label)


def _groups(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The rows by what tells them apart besides their names, which is their label."""
    shared = frozenset(shared_context(rows))
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        context = ", ".join(value for key, value in row.context.items() if key not in shared)
        label = f"{variant_text(row)}\n{context}" if context else variant_text(row)
        groups.setdefault(label, []).append(row)
    return groups


def _draw_bars(axes: Axes, plot: Plot, groups: Mapping[str, Sequence[Measurement]]) -> None:
    names = [name for name in plot.bars if any(r.name == name for g in groups.values() for r in g)]
    top = max(max(row.values) for group in groups.values() for row in group) or 1.0
    position = 0.0
    ticks = []
    labelled: set[str] = set()
    for group in groups.values():
        first = position
        for row in sorted(group, key=lambda row: names.index(row.name)):
            axes.barh(
                position,
                row.median,
                height=0.82,
                color=_COLOURS[names.index(row.name) % len(_COLOURS)],
                label=plot.bars[row.name] if row.name not in labelled else None,
            )
            labelled.add(row.name)
            low, high = min(row.values), max(row.values)
            if high > low:
                axes.plot([low, high], [position, position], color=_INK, linewidth=1.4)
            axes.text(
                max(row.median, high) + top * 0.015, position, number(row.median), va="center"
            )
            position += 1.0
        ticks.append((first + position - 1.0) / 2)
        position += 0.6
    axes.set_yticks(ticks, labels=list(groups))
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, top * 1.25)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(plot.title, loc="left", fontsize=11.5, pad=30 if len(names) > 1 else 8)
    if len(names) > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, fontsize=9.5,
            borderpad=0.2, handlelength=1.0, columnspacing=1.2,
        )  # fmt: skip


def _embed(svg: str, prefix: str, label: str) -> str:
    """A plot's SVG made fit for a page: no prologue, own ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg)
    return svg.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" ', 1)
