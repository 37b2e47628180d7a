# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``list``: the names that other commands and files take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..core.errors import Exit
from ..core.settings import Settings
from ..judging.load import load_checks
from ..machines import inventory
from ..measure import registry
from ..patches.series import load_series
from ..runs import plan
from .common import Commands

KINDS = ("tests", "metrics", "series", "checks", "hosts")


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add("list", "list tests, metrics, series, checks or hosts", command)
    one.add_argument("kind", choices=KINDS, help="what to list")
    one.add_argument("--json", action="store_true", help="print JSON, for programs")
    one.add_argument(
        "--inventory",
        metavar="FILE",
        default="inventory.yaml",
        help="hosts: the inventory (default: inventory.yaml)",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    rows = rows_of(options.kind, conf, options.inventory)
    if options.json:
        print(json.dumps(rows, indent=1))
        return Exit.OK
    table = Table(*(rows[0] if rows else ()), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
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
    return [
        {"host": one.name, "address": f"{one.address.user}@{one.address.host}:{one.address.port}"}
        for one in inventory.load(Path(hosts)).values()
    ]
