# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``cache``."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from rich.table import Table

from ..core import ui
from ..core.cache import Cache, remove
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from .common import Commands, common_options


def _size(path: Path) -> int:
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())


def show(cache: Cache, *, prune: bool, days: float, as_json: bool = False) -> int:
    """Show what is cached; with ``prune`` remove what has not been used for ``days``."""
    if not days >= 0:  # nan is neither
        raise UsageError("--older-than must be 0 or more days", hint="0 removes everything")
    now = time.time()
    freed = 0
    if prune:
        for entry in cache.entries():
            if now - entry.path.stat().st_mtime >= days * 86400:
                with cache.lock(f"{entry.kind}-{entry.key}"):
                    freed += _size(entry.path)
                    remove(entry.path)
        for path in sorted((cache.root / "tmp").iterdir()):
            if path.name.startswith("testbed-") and (Path("/proc") / path.name[8:]).exists():
                continue
            with cache.lock(path.name.removesuffix(".log")):
                freed += _size(path) if path.is_dir() else path.stat().st_size
                remove(path)
        for path in sorted((cache.root / "own").glob("*")):
            # build folders of users' trees; the stamp has the time of the last use
            if now - max(one.stat().st_mtime for one in (path, *path.glob("*"))) >= days * 86400:
                with cache.lock(f"own-{path.name}"):
                    freed += _size(path)
                    remove(path)
        if days == 0:
            for name in ("ccache", "venv", "apt", "git"):
                if (cache.root / name).is_dir():
                    freed += _size(cache.root / name)
                    remove(cache.root / name)
    if as_json:
        print(json.dumps(to_json(cache, freed), indent=1))
        return Exit.OK
    if prune:
        ui.out.print(f"freed {freed >> 20} MiB", markup=False)
    table = Table("kind", "what", "MiB", "last used", title=str(cache.root))
    for entry in cache.entries():
        age = (now - entry.path.stat().st_mtime) / 86400
        what = str(entry.meta.get("what", entry.key))
        table.add_row(entry.kind, what, str(_size(entry.path) >> 20), f"{age:.1f} days ago")
    ui.out.print(table)
    usage = shutil.disk_usage(cache.root)
    ui.out.print(f"{usage.free >> 30} GiB of disk are free", markup=False)
    return Exit.OK


def to_json(cache: Cache, freed: int) -> dict[str, object]:
    """What is cached, for programs: sizes in bytes, times in UTC, the oldest use first."""
    return {
        "folder": str(cache.root),
        "entries": [
            {
                "kind": entry.kind,
                "what": str(entry.meta.get("what", entry.key)),
                "key": entry.key,
                "bytes": _size(entry.path),
                "used": time.strftime(
                    "%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.path.stat().st_mtime)
                ),
            }
            for entry in cache.entries()
        ],
        "freed_bytes": freed,
        "free_bytes": shutil.disk_usage(cache.root).free,
    }


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "cache", "show and prune what is cached", command, common_options(only=("cache_dir",))
    )
    one.add_argument(
        "--prune",
        action="store_true",
        help="remove what no run has used for --older-than days, and broken attempts",
    )
    one.add_argument(
        "--older-than",
        type=float,
        default=30.0,
        metavar="DAYS",
        help="with --prune (default: 30); 0 removes everything",
    )
    one.add_argument("--json", action="store_true", help="print JSON, for programs")


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    return show(
        Cache(conf.cache_dir).open(),
        prune=options.prune,
        days=options.older_than,
        as_json=options.json,
    )
