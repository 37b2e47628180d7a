# SPDX-License-Identifier: GPL-2.0-or-later
"""report.html: one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from ..core.model import Measurement, Report
from ..core.text import first_line, number, printable
from ..measure import registry
from .plot import draw
from .tables import (
    by_severity,
    context_text,
    in_order,
    provenance_text,
    shared_context,
    spread_text,
    variant_text,
    verdict,
)


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
        catalogue=registry.metrics(),
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
    """A section for each test, in their order; rows of a test that is not installed come last."""
    found: dict[str, list[Measurement]] = {test: [] for test in registry.tests()}
    for row in report.measurements:
        known = row.name in registry.metrics()
        test = registry.test_of(row.name).name if known else row.name.partition(".")[0]
        found.setdefault(test, []).append(row)
    sections = []
    for name, rows in found.items():
        test_ = registry.tests().get(name)
        plots = test_.plots if test_ is not None else ()
        drawn = [draw(plot, rows) for plot in plots]
        if rows:
            sections.append(
                _Section(
                    test=name,
                    title=test_.title if test_ is not None else name,
                    plots=tuple(Markup(svg) for svg in drawn if svg),
                    rows=tuple(in_order(rows)),
                )
            )
    return sections
