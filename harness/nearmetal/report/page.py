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
from markupsafe import Markup, escape

from ..core.model import CheckResult, Measurement, Report
from ..core.text import first_line, minutes, number, printable
from ..judging.load import load_checks
from ..measure import registry
from .cards import base_name, cards, short
from .junit import family
from .plot import draw
from .tables import (
    by_severity,
    context_text,
    in_order,
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
        context_text=context_text,
        spread_text=spread_text,
        variant_text=variant_text,
        short=short,
    )
    environment.filters["marked"] = _marked
    environment.filters["minutes"] = minutes
    environment.filters["coded"] = _coded
    worst, counts = verdict(report.checks)
    shared = shared_context(report.measurements)
    found = cards(report)
    page = environment.get_template("report.html.j2").render(
        report=report,
        worst=worst,
        counts=counts,
        emulated=any(row.provenance == "emulated" for row in report.measurements),
        hardware=any(row.provenance == "hardware" for row in report.measurements),
        bad=[check for check in by_severity(report.checks) if check.status in ("error", "fail")],
        cards=[(card, Markup(draw(card.figures[0])) if card.figures else "") for card in found],
        checks=_by_test(report.checks),
        sections=_sections(report),
        catalogue=registry.metrics(),
        shared=shared,
        shared_keys=frozenset(shared),
        links=[(path.as_posix(), quote(path.as_posix())) for path in links],
    )
    return re.sub(r"\n{2,}", "\n", page)


@dataclass(frozen=True)
class _Section:
    """What belongs to one test: its rows, or its checks."""

    title: str
    rows: tuple[Measurement, ...] = ()
    checks: tuple[CheckResult, ...] = ()

    @property
    def counts(self) -> str:
        """How many, in words."""
        if self.checks:
            return verdict(self.checks)[1]
        return f"{len(self.rows)} row{'s' if len(self.rows) != 1 else ''}"


def _sections(report: Report) -> list[_Section]:
    """The rows of each test, in their order; those of a test that is not installed come last."""
    found: dict[str, list[Measurement]] = {test: [] for test in registry.tests()}
    for row in report.measurements:
        known = row.name in registry.metrics()
        test = registry.test_of(row.name).name if known else row.name.partition(".")[0]
        found.setdefault(test, []).append(row)
    return [
        _Section(_title(name), rows=tuple(in_order(rows))) for name, rows in found.items() if rows
    ]


def _by_test(checks: Sequence[CheckResult]) -> list[_Section]:
    """The checks of each test, in their order; those that no test brings come last."""
    homes = {
        check.name: test.name
        for test in registry.tests().values()
        if test.checks is not None
        for check in load_checks(test.checks)
    }
    found: dict[str, list[CheckResult]] = {test: [] for test in registry.tests()}
    for check in checks:
        home = homes.get(base_name(check), family(check.name))
        found.setdefault(home, []).append(check)
    return [
        _Section(_title(name), checks=tuple(by_severity(some)))
        for name, some in found.items()
        if some
    ]


def _title(name: str) -> str:
    """The title of a test, or of the checks that none brings."""
    if name == "checks":
        return "Checks of no test"
    return registry.tests()[name].title if name in registry.tests() else name


def _marked(name: str) -> Markup:
    """A name with places where a narrow screen may break it."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", name))


def _coded(text: str) -> Markup:
    """A text with what stands in backquotes, such as a check's expression, as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup(escape(text))
    code = Markup("<code>{}</code>")
    return Markup("").join(
        code.format(part) if index % 2 else part for index, part in enumerate(parts)
    )
