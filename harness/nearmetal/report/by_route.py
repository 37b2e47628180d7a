# SPDX-License-Identifier: GPL-2.0-or-later
"""Peer-to-peer figures by their route: bare metal, VM redirected, VM direct, beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.errors import UsageError
from ..core.model import Measurement, Report
from ..core.text import number
from .tables import provenance_text

_METAL, _REDIRECTED, _DIRECT = "bare metal", "VM redirected", "VM direct"
COLUMNS = (_METAL, _REDIRECTED, _DIRECT)

_WAY = frozenset(
    {"route", "acs", "ats", "relaxed_ordering", "at", "client", "server", "setup", "bars"}
)
"""Keys of the context that say by which way or where, and not what was measured."""


def column(row: Measurement) -> str:
    """The column of a figure, by where it was measured and the route of its registers."""
    context = row.where
    ends = [context[key].split(":")[0] for key in ("client", "server", "at") if key in context]
    if context.get("setup") == "bare" or (ends and set(ends) == {"host"}):
        return _METAL
    ways = set(context["route"].split("/"))
    return _DIRECT if ways <= {"direct", "direct-by-ats", "one-port"} else _REDIRECTED


def _what(context: Mapping[str, str]) -> str:
    """What was measured, without where and by which way; ends of perftest keep their memory."""
    kept = [value for key, value in sorted(context.items()) if key not in _WAY]
    kept += [
        context[key].split(":", 1)[-1]
        for key in ("client", "server")
        if ":" in context.get(key, "")
    ]
    return " ".join(kept)


def render(reports: Sequence[Report]) -> str:
    """A line a figure; medians. Several of one column are all shown, with their routes.

    Raises UsageError where no row has a route.
    """
    cells: dict[tuple[str, str, str], dict[str, list[Measurement]]] = {}
    for report in reports:
        for row in report.measurements:
            if "route" in row.where and row.values:
                key = (row.name, row.unit, _what(row.where))
                cells.setdefault(key, {}).setdefault(column(row), []).append(row)
    if not cells:
        raise UsageError(
            "no figure of these runs has a route",
            hint="routes are of tools and of p2p on servers (docs/servers.md)",
        )
    lines = [
        f"{report.run.id} ({report.run.host}, {provenance_text(report)})" for report in reports
    ]
    table: list[tuple[str, ...]] = [("", *COLUMNS, "routes")]
    for (name, unit, what), found in cells.items():
        routes = sorted({row.where["route"] for rows in found.values() for row in rows})
        figures = (
            " | ".join(number(row.median) for row in found.get(each, ())) or "-" for each in COLUMNS
        )
        table.append((f"{name} [{unit}] {what}".rstrip(), *figures, ", ".join(routes)))
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    for first, *medians, last in table:
        columns = [word.rjust(width) for word, width in zip(medians, widths[1:-1], strict=True)]
        lines.append("  ".join((first.ljust(widths[0]), *columns, last)).rstrip())
    return "\n".join(lines) + "\n"
