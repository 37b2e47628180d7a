# SPDX-License-Identifier: GPL-2.0-or-later
"""A report as text: the table at the end of a run, and the README's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.errors import UsageError
from ..core.model import CheckResult, Measurement, Report, Status
from ..core.text import first_line, nearest, number, printable
from ..measure import registry

README_BEGIN = re.compile(r"<!-- results:begin(?P<rows>[^>]*?)-->")
"""May choose rows: ``<!-- results:begin lspci.exits variant=on path=cf8; p2p.bytes_direct -->``."""
README_END = "<!-- results:end -->"

WORST_FIRST: tuple[Status, ...] = ("error", "fail", "skip", "pass")
_STYLE: dict[Status, str] = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "skip": "yellow",
}


def context_text(context: Mapping[str, str], *, without: frozenset[str] = frozenset()) -> str:
    """A row's context as ``key=value`` words."""
    return " ".join(f"{key}={value}" for key, value in context.items() if key not in without)


def spread_text(row: Measurement) -> str:
    """The smallest and the largest value, or nothing where there is only one."""
    if len(row.values) < 2:
        return ""
    low, high = min(row.values), max(row.values)
    return "all equal" if low == high else f"{number(low)} .. {number(high)}"


def verdict(checks: Sequence[CheckResult]) -> tuple[Status, str]:
    """A run's verdict, and one line with the counts of its checks."""
    counts = {status: sum(check.status == status for check in checks) for status in WORST_FIRST}
    words = (
        ("passed", counts["pass"]),
        ("failed", counts["fail"]),
        ("could not be judged", counts["error"]),
        ("skipped", counts["skip"]),
    )
    line = ", ".join(f"{count} {word}" for word, count in words if count) or "no checks"
    worst: Status
    if counts["error"] or counts["fail"]:
        worst = "fail" if counts["fail"] else "error"
    else:
        worst = "pass" if counts["pass"] else "skip"
    return worst, line


def by_severity(checks: Sequence[CheckResult]) -> list[CheckResult]:
    """The checks with those that fail the run first."""
    return sorted(checks, key=lambda check: WORST_FIRST.index(check.status))


def provenance_text(report: Report) -> str:
    """How the figures came about: ``emulated``, ``hardware`` or both."""
    return ", ".join(sorted({row.provenance for row in report.measurements})) or "nothing measured"


def in_order(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows with those of one name together, in the catalogue's order."""
    names = list(registry.metrics())
    return sorted(rows, key=lambda r: names.index(r.name) if r.name in names else len(names))


def render_terminal(report: Report) -> RenderableType:
    """The summary at the end of a run: what was measured, then the checks, then the verdict."""
    shared = shared_context(report.measurements)
    about = ", ".join((provenance_text(report), *shared.values()))
    results = _table(f"Results on {report.run.host} ({about})")
    results.add_column("measurement", overflow="fold", min_width=24)
    results.add_column("variant", overflow="fold")
    results.add_column("context", overflow="fold")
    results.add_column("median", justify="right", no_wrap=True)
    results.add_column("unit", no_wrap=True)
    results.add_column("range", overflow="fold")
    for row in in_order(report.measurements):
        results.add_row(
            Text(row.name),
            Text(variant_text(row)),
            Text(" ".join(value for key, value in row.where.items() if key not in shared)),
            number(row.median) if row.values else "-",
            Text(row.unit),
            spread_text(row),
        )
    return Group(*((results,) if report.measurements else ()), render_checks(report))


def render_checks(report: Report) -> RenderableType:
    """The checks and the verdict. Checks that were skipped for one reason share a line."""
    checks = _table("Checks")
    checks.add_column("", no_wrap=True)
    checks.add_column("check", overflow="fold", min_width=32)
    checks.add_column("why it did not pass", overflow="fold")
    skipped: dict[str, list[str]] = {}
    for check in report.checks:
        if check.status == "skip":
            skipped.setdefault(first_line(check.reason), []).append(check.name)
    for reason, names in skipped.items():
        if len(names) > 1:
            checks.add_row(
                Text("skip", style=_STYLE["skip"]), f"{len(names)} checks", Text(printable(reason))
            )
    for check in by_severity(report.checks):
        if check.status == "skip" and len(skipped[first_line(check.reason)]) > 1:
            continue
        why = () if check.status == "pass" else (*check.observed.split("; "), check.reason)
        checks.add_row(
            Text(check.status, style=_STYLE[check.status]),
            Text(check.name),
            Text(printable("\n".join(first_line(line) for line in why if line))),
        )
    worst, counts = verdict(report.checks)
    took = f"{'cold' if report.run.cold else 'warm'} run, {report.run.seconds:.0f} s"
    return Group(
        *((checks,) if report.checks else ()),
        Text(f"{worst}: {counts} ({report.run.id}, {took})", style=_STYLE[worst]),
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def variant_text(row: Measurement) -> str:
    """A row's variant, with its series where it has one."""
    return f"{row.variant} ({row.series})" if row.series else row.variant


def chosen(rows: Sequence[Measurement], words: str) -> list[Measurement]:
    """The rows that a marker names, ``name key=value ...`` each, with ``;`` between; all for none.

    Raises UsageError for a name that is not measured by anything.
    """
    wanted = [part.split() for part in words.split(";") if part.strip()]
    for name, *_ in wanted:
        if name not in registry.metrics():
            raise UsageError(
                f"the table of results asks for '{name}', which is not a metric",
                hint=nearest(name, list(registry.metrics())),
            )
    if not wanted:
        return list(rows)
    return [
        row
        for row in rows
        if any(
            row.name == name
            and {tuple(word.split("=", 1)) for word in has}
            <= {**row.subject.keys, **row.context}.items()
            for name, *has in wanted
        )
    ]


def render_readme_table(report: Report, words: str = "") -> str:
    """The results as a Markdown table, with what they are worth below it.

    ``words`` choose rows, see ``chosen``.
    """
    shared = shared_context(report.measurements)
    lines = [
        "| measurement | what it is | variant | context | median | unit |",
        "|---|---|---|---|--:|---|",
    ]
    before = ""
    for row in in_order(chosen(report.measurements, words)):
        entry = registry.metrics().get(row.name)
        cells = (
            f"`{row.name}`",
            entry.meaning if entry and row.name != before else "",
            variant_text(row),
            context_text(row.where, without=frozenset(shared)),
            number(row.median) if row.values else "-",
            row.unit,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        before = row.name
    host = f"host `{report.run.host}`" + (f" ({context_text(shared)})" if shared else "")
    _, counts = verdict(report.checks)
    lines += [
        "",
        f"Run `{report.run.id}`, {host}, provenance: **{provenance_text(report)}**; "
        f"checks: {counts}. Generated by `nearmetal report`.",
    ]
    return "\n".join(lines) + "\n"


def shared_context(rows: Sequence[Measurement]) -> dict[str, str]:
    """What all rows of a report have in common (said once, not in every line)."""
    if not rows:
        return {}
    first = rows[0].where
    return {
        key: value
        for key, value in first.items()
        if all(row.where.get(key) == value for row in rows)
    }
