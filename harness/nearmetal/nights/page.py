# SPDX-License-Identifier: GPL-2.0-or-later
"""The morning page: one self-contained HTML for a night, and its line for a mail or a chat."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from ..core.errors import EnvironmentBroken
from ..core.text import number, printable
from ..measure import registry
from .changes import Verdict
from .history import Key, Night

TREND = 30
"""How many runs a trend shows."""
WIDTH, HEIGHT = 150, 28
"""Of a trend, in CSS pixels."""
VARIANTS = ("vanilla", "off", "on")


@dataclass(frozen=True)
class Ran:
    """An avocado test that ran, or was cancelled; ``links`` are paths beside the page."""

    name: str
    status: str
    """Avocado's: PASS, FAIL, ERROR, CANCEL, SKIP, INTERRUPTED."""
    seconds: float
    reason: str
    links: tuple[str, ...]

    @property
    def red(self) -> bool:
        """Whether it makes the night red."""
        return self.status in ("FAIL", "ERROR", "INTERRUPTED", "UNKNOWN")

    @property
    def skipped(self) -> bool:
        """Whether it did not run."""
        return self.status in ("CANCEL", "SKIP")


@dataclass(frozen=True)
class Morning:
    """All of a night."""

    name: str
    verdicts: tuple[Verdict, ...]
    past: tuple[Night, ...]
    """Runs for the trends, the oldest first."""
    ran: tuple[Ran, ...]
    broken: tuple[str, ...]
    """Jobs that ended before their time."""

    @property
    def good(self) -> bool:
        """Whether the night is green: something ran, and nothing is red."""
        some = any(not one.skipped for one in self.ran)
        bad = self.broken or any(one.red for one in self.ran)
        return some and not bad and all(one.good for one in self.verdicts)

    @property
    def news(self) -> list[tuple[str, Verdict]]:
        """What is red for the first time tonight: a line each."""
        return [
            (change.text, verdict)
            for verdict in self.verdicts
            for change in verdict.red
            if verdict.since[change.what].run == verdict.night.id
        ]

    def line(self) -> str:
        """A line for a mail's subject or a chat."""
        done = [one for one in self.ran if not one.skipped]
        counts = f"{sum(one.status == 'PASS' for one in done)} of {len(done)} tests passed"
        if skipped := len(self.ran) - len(done):
            counts += f", {skipped} skipped"
        if self.good:
            return f"nearmetal night {self.name}: GREEN, {counts}"
        changes = [change for verdict in self.verdicts for change in verdict.red]
        red = [change.text for change in changes] + list(self.broken)
        # a test that failed by a check is told as the check
        told = {change.what.split(" (")[0] for change in changes if change.kind == "failed"}
        red += [
            f"{one.name}: {one.reason or one.status}"
            for one in self.ran
            if one.red and one.reason.split(":")[0] not in told
        ]
        first = red[0].splitlines()[0] if red else "nothing ran"
        more = f" (and {len(red) - 1} more)" if len(red) > 1 else ""
        return f"nearmetal night {self.name}: RED, {first}{more}; {counts}"


def ran(job: Path, base: Path) -> list[Ran]:
    """The tests of an avocado job's folder, with links below ``base``.

    Raises EnvironmentBroken where its results.json is not there or is no JSON.
    """
    try:
        tests = json.loads((job / "results.json").read_text())["tests"]
    except (OSError, ValueError, KeyError) as error:
        raise EnvironmentBroken(
            f"the avocado job {job} left no results.json that can be read: {error}",
            hint="look at job.log there",
        ) from None
    found = []
    for one in tests:
        name = str(one["name"]).split(";", 1)
        short = name[1] if len(name) > 1 else name[0]
        reason = str(one.get("fail_reason") or "")
        folder = Path(one["logdir"])
        links = [
            str(path.relative_to(base))
            for pattern in ("**/report.html", "**/*.log")
            for path in sorted(folder.glob(pattern))
            if "latest" not in path.parts and path.is_relative_to(base)
        ]
        seconds = float(one.get("time_elapsed") or 0)
        plain = "" if reason in ("None", "<unknown>") else reason
        found.append(Ran(short, str(one["status"]), seconds, plain, tuple(links)))
    return found


def render(morning: Morning) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("nearmetal") / "data")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, printable=printable, quoted=quote)
    text = environment.get_template("night.html.j2").render(
        morning=morning,
        tables=[
            (verdict.night, _side_by_side(verdict, morning.past)) for verdict in morning.verdicts
        ],
        skipped=_skipped(morning),
    )
    return re.sub(r"\n{2,}", "\n", text)


def _skipped(morning: Morning) -> list[tuple[str, str]]:
    """What was skipped, and why."""
    found = [(one.name, one.reason) for one in morning.ran if one.skipped]
    for verdict in morning.verdicts:
        for name, judged in verdict.night.checks.items():
            if judged.status == "skip":
                found.append((name, judged.reason.splitlines()[0] if judged.reason else ""))
    return found


@dataclass(frozen=True)
class Line:
    """A figure on all variants; ``cells`` are vanilla, off and each series' on."""

    context: str
    cells: tuple[tuple[str, str], ...]
    """A variant's words, and its median."""
    trend: Markup
    changed: bool


def _side_by_side(verdict: Verdict, past: Sequence[Night]) -> list[tuple[str, str, list[Line]]]:
    """By measurement, with its unit: the lines."""
    night = verdict.night
    changed = {change.key for change in verdict.changes if change.kind != "new"}
    runs = [one for one in past if one.host == night.host]
    found: dict[str, dict[tuple[tuple[str, str], ...], list[Key]]] = {}
    for key in night.figures:
        found.setdefault(key.name, {}).setdefault(key.context, []).append(key)
    order = list(registry.metrics())
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    tables = []
    for name in names:
        lines = []
        for context, keys in found[name].items():
            keys.sort(key=lambda key: (VARIANTS.index(key.variant), key.series))
            cells = tuple(
                (key.series or key.variant, number(night.figures[key].median)) for key in keys
            )
            words = " ".join(f"{key}={value}" for key, value in context)
            lines.append(Line(words, cells, _trend(keys, runs), bool(changed & set(keys))))
        unit = night.figures[next(iter(found[name].values()))[0]].unit
        tables.append((name, unit, sorted(lines, key=lambda one: not one.changed)))
    return tables


def _trend(keys: Sequence[Key], runs: Sequence[Night]) -> Markup:
    """A line for each variant over the runs, as SVG; nothing for a single run."""
    rows = []
    for key in keys:
        points = [
            (index, median)
            for index, one in enumerate(runs)
            if key in one.figures and (median := one.figures[key].median) is not None
        ]
        if len(points) > 1:
            rows.append((key, points))
    if not rows:
        return Markup()
    values = [median for _, points in rows for _, median in points]
    low, high = min(values), max(values)
    told = f"{len(runs)} runs, {number(low)} to {number(high)}"
    lines = []
    for key, points in rows:
        path = " ".join(
            f"{3 + index / max(1, len(runs) - 1) * (WIDTH - 6):.1f},"
            f"{HEIGHT - 4 - (value - low) / ((high - low) or 1) * (HEIGHT - 8):.1f}"
            for index, value in points
        )
        lines.append(f'<polyline class="{escape(key.variant)}" points="{path}"/>')
    return Markup(
        f'<svg class="trend" role="img" aria-label="{escape(told)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{escape(told)}</title>{''.join(lines)}</svg>"
    )
