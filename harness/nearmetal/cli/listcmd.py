# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``list``: the names that other commands and files take."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.table import Table

from ..core import settings, ui
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..judging.load import load_checks
from ..machines import inventory
from ..measure import registry
from ..patches.series import load_series
from ..report import document, tables
from ..runs import plan
from .common import Commands, common_options

KINDS = ("tests", "metrics", "series", "checks", "hosts", "runs")


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "list",
        "list tests, metrics, series, checks, hosts or runs",
        command,
        common_options(only=("results_dir",)),
    )
    one.add_argument("kind", choices=KINDS, help="what to list")
    one.add_argument("--json", action="store_true", help="print JSON, for programs")
    one.add_argument(
        "--inventory",
        metavar="FILE",
        default=settings.default_inventory(),
        help="for hosts: the inventory (default: inventory.yaml, or inventory of your configuration"
        " file)",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    rows = rows_of(options.kind, conf, options.inventory)
    if options.json:
        print(json.dumps(rows, indent=1))
        return Exit.OK
    if not rows:
        print(f"no {options.kind}", file=sys.stderr)
        return Exit.OK
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    ui.out.print(table)
    return Exit.OK


def rows_of(kind: str, conf: Settings, hosts: str) -> list[dict[str, str]]:
    """A record for each thing of a kind."""
    if kind == "tests":
        return [
            {
                "test": test.name,
                "set-ups": ", ".join(registry.setups_of(test)) or "plain",
                "about": test.title,
            }
            for test in registry.tests().values()
        ]
    if kind == "metrics":
        return [
            {
                "metric": metric.name,
                "unit": metric.unit,
                "test": registry.test_of(metric.name).name,
                "context": " ".join(metric.keys),
                "meaning": metric.meaning,
            }
            for metric in registry.metrics().values()
        ]
    if kind == "series":
        return [
            {
                "series": one.label,
                "base": one.base,
                "patches": str(len(one.patches())),
                "state": "draft" if one.draft else "",
                "purpose": one.purpose,
            }
            for one in load_series(conf.repo / "patches", known=plan.known())
        ]
    if kind == "checks":
        return [{"check": one.name, "expected": one.expected} for one in load_checks()]
    if kind == "runs":
        return runs(conf.results_dir)
    return [
        {"host": one.name, "address": f"{one.address.user}@{one.address.host}:{one.address.port}"}
        for one in inventory.load(Path(hosts)).values()
    ]


def runs(folder: Path) -> list[dict[str, str]]:
    """The runs in a folder of results, the newest first; what is no report is told as such."""
    found = []
    for path in sorted(folder.glob(f"*/{document.REPORT_NAME}"), reverse=True):
        if path.parent.name == document.LATEST:
            continue
        row = {"run": path.parent.name}
        try:
            report = document.read(path)
        except UsageError as error:
            keys = ("started", "host", "verdict", "checks", "command")
            found.append({**row, **dict.fromkeys(keys, "-"), "checks": error.message})
            continue
        worst, counts = tables.verdict(report.checks)
        row |= {"started": report.run.started, "host": report.run.host, "verdict": worst}
        found.append({**row, "checks": counts, "command": report.run.command})
    return found
