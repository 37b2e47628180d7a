# SPDX-License-Identifier: GPL-2.0-or-later
"""The note of the machines that are up, by which ``ssh`` finds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..builds import Keys
from ..core.cache import Cache
from ..core.errors import UsageError
from .shell import Address


@dataclass(frozen=True)
class Session:
    """Machines that are up: where ``nearmetal ssh`` finds them."""

    host: Address
    guest: Address | None


def _note(cache: Cache) -> Path:
    return cache.root / "session.json"


@contextmanager
def noted(cache: Cache, what: Session) -> Iterator[None]:
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
