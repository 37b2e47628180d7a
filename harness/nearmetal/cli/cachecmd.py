# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``cache``, and the note of what is up that ``ssh`` reads."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..builds.all import Keys
from ..core import ui
from ..core.cache import Cache, remove
from ..core.errors import Exit, UsageError
from ..machines.shell import Address


@dataclass(frozen=True)
class Session:
    """Machines that are up: where ``nearmetal ssh`` finds them."""

    host: Address
    guest: Address | None


def _note(cache: Cache) -> Path:
    return cache.root / "session.json"


@contextmanager
def session(cache: Cache, what: Session) -> Iterator[None]:
    """Note the machines for as long as the context lasts."""
    path = _note(cache)

    def words(address: Address | None) -> dict[str, object] | None:
        if address is None:
            return None
        return {
            "host": address.host,
            "port": address.port,
            "user": address.user,
            "key": str(address.key) if address.key else None,
        }

    path.write_text(json.dumps({"host": words(what.host), "guest": words(what.guest)}))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def ssh_command(cache: Cache, keys: Keys, machine: str, words: Sequence[str]) -> list[str]:
    """The ssh command line to a machine that is up; UsageError when none is."""
    path = _note(cache)
    if not path.is_file():
        raise UsageError(
            "no host is up", hint="start one with 'nearmetal boot' in another terminal"
        )
    what = json.loads(path.read_text())
    if what.get(machine) is None:
        raise UsageError(f"no {machine} is up", hint="start one with 'nearmetal boot'")
    known = cache.root / "ssh" / "known_hosts"
    key = " ".join(keys.host.with_suffix(".pub").read_text().split()[:2])
    known.write_text(f"nearmetal-testbed {key}\n")

    def options(one: dict[str, object], ours: bool) -> list[str]:
        line = ["-p", str(one["port"])]
        if one["key"]:
            line += ["-i", str(one["key"]), "-o", "IdentitiesOnly=yes"]
        if ours:
            line += ["-o", f"UserKnownHostsFile={known}", "-o", "HostKeyAlias=nearmetal-testbed"]
        return line

    host = what["host"]
    ours = host["key"] == str(keys.login)
    line = ["ssh"]
    if machine == "guest":
        guest = what["guest"]
        jump = ["ssh", *options(host, ours), "-W", "%h:%p", f"{host['user']}@{host['host']}"]
        line += ["-o", f"ProxyCommand={' '.join(jump)}", *options(guest, True)]
        line.append(f"{guest['user']}@{guest['host']}")
    else:
        line += [*options(host, ours), f"{host['user']}@{host['host']}"]
    return [*line, *words]


def _size(path: Path) -> int:
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())


def show(cache: Cache, *, prune: bool, days: float) -> int:
    """Show what is cached; with ``prune`` remove what has not been used for ``days``."""
    if not days >= 0:  # nan is neither
        raise UsageError("--older-than must be 0 or more days", hint="0 removes everything")
    now = time.time()
    if prune:
        freed = 0
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
        if days == 0:
            for name in ("ccache", "venv", "apt", "git"):
                if (cache.root / name).is_dir():
                    freed += _size(cache.root / name)
                    remove(cache.root / name)
        ui.say(f"freed {freed >> 20} MiB")
    table = Table("kind", "what", "MiB", "last used", title=str(cache.root))
    for entry in cache.entries():
        age = (now - entry.path.stat().st_mtime) / 86400
        what = str(entry.meta.get("what", entry.key))
        table.add_row(entry.kind, what, str(_size(entry.path) >> 20), f"{age:.1f} days ago")
    ui.console.print(table)
    usage = shutil.disk_usage(cache.root)
    ui.say(f"{usage.free >> 30} GiB of disk are free")
    return Exit.OK
