# SPDX-License-Identifier: GPL-2.0-or-later
"""Notes of the machines that are up, by which ``ssh`` finds them: one for each host."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..builds import Keys
from ..core.cache import Cache, process
from ..core.errors import MeasurementError, UsageError
from ..core.text import first_line, nearest
from .shell import Address

_KNOCK_S = 5.0
_START = "start one with 'nearmetal boot' in another terminal"


@dataclass(frozen=True)
class Session:
    """Machines that are up: where ``nearmetal ssh`` finds them; ``name`` is the host's."""

    host: Address
    guest: Address | None
    name: str = "testbed"


def _folder(cache: Cache) -> Path:
    return cache.root / "sessions"


@contextmanager
def noted(cache: Cache, what: Session) -> Iterator[None]:
    """Note the machines for as long as the context lasts.

    Where it ends by an error the reason stays, for ``ssh`` to tell.
    """
    folder = _folder(cache)
    folder.mkdir(exist_ok=True)
    path = folder / f"{what.name}.json"

    def words(address: Address | None) -> dict[str, object] | None:
        if address is None:
            return None
        return {
            "host": address.alias or address.host,
            "port": address.port,
            "user": address.user,
            "key": str(address.key) if address.key else None,
        }

    note = {
        "name": what.name,
        "pid": os.getpid(),
        "host": words(what.host),
        "guest": words(what.guest),
    }
    _write(path, note)
    try:
        yield
    except MeasurementError as error:
        _write(path, {**note, "ended": f"{first_line(error.message)} ({_clock()})"})
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def _write(path: Path, note: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(note))
    part.replace(path)


def _clock() -> str:
    return time.strftime("%H:%M")


def find(cache: Cache, name: str | None = None) -> Mapping[str, Any]:
    """The note of the machines that are up, those of the host ``name`` if it is given.

    Raises UsageError where none is up, and says how the last ones ended, or where there are
    several to choose from.
    """
    up: dict[str, Mapping[str, Any]] = {}
    gone: list[str] = []
    for path in sorted(_folder(cache).glob("*.json")):
        try:
            note = json.loads(path.read_text())
        except ValueError:
            gone.append(f"{path.stem}: its note {path} cannot be read")
            continue
        if "ended" in note:
            gone.append(f"{note['name']}: {note['ended']}")
        elif not (Path("/proc") / str(note["pid"])).exists():
            gone.append(f"{note['name']}: its process {note['pid']} was killed")
            path.unlink(missing_ok=True)
        else:
            up[note["name"]] = note
    if not up:
        if gone:
            raise UsageError(f"the host is gone: {'; '.join(gone)}", hint=_START)
        raise UsageError("no host is up", hint=_START)
    if name is not None and name not in up:
        raise UsageError(f"no host '{name}' is up", hint=nearest(name, up))
    if name is None and len(up) > 1:
        raise UsageError(
            f"several hosts are up: {', '.join(up)}", hint="name the one that you mean: --host NAME"
        )
    return up[name] if name is not None else next(iter(up.values()))


def _knock(note: Mapping[str, Any]) -> None:
    """Raise UsageError unless the host's port is open."""
    host = note["host"]
    try:
        with socket.create_connection((host["host"], host["port"]), timeout=_KNOCK_S):
            pass
    except OSError as error:
        raise UsageError(
            f"the host does not answer: {error.strerror or error}",
            hint=f"it was booted by {process(str(note['pid']))}; end that, and boot anew",
        ) from None


def ssh_command(
    cache: Cache, keys: Keys, machine: str, words: Sequence[str], name: str | None = None
) -> list[str]:
    """The ssh command line to a machine that is up; UsageError when none is."""
    what = find(cache, name)
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
    if ours:
        _knock(what)
    line = ["ssh"]
    if machine == "guest":
        guest = what["guest"]
        jump = ["ssh", *options(host, ours), "-W", "%h:%p", f"{host['user']}@{host['host']}"]
        line += ["-o", f"ProxyCommand={' '.join(jump)}", *options(guest, True)]
        line.append(f"{guest['user']}@{guest['host']}")
    else:
        line += [*options(host, ours), f"{host['user']}@{host['host']}"]
    return [*line, *words]
