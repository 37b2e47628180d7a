# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's own ssh configuration: aliases, users, keys, jump hosts, as ``ssh -G`` resolves them.

OpenSSH reads the files itself (Include, Match, patterns), so a machine that ``ssh NAME`` reaches is
reached by that name. What an inventory says goes before it.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import UsageError
from .shell import Address

_DEADLINE_S = 20.0
_DEEPEST = 8
"""Jump hosts in a row; more are a loop."""


def resolve(
    name: str,
    *,
    port: int | None = None,
    user: str | None = None,
    key: Path | None = None,
    host_key: str | None = None,
    config: Path | None = None,
) -> Address:
    """Where the machine ``name`` is, as ssh would reach it; what is given goes before.

    The user is root where neither the caller nor the configuration names one; ``ssh -G`` does not
    tell the name of who runs it from none at all. ``config`` stands for the user's and the system's
    files. Without OpenSSH, and of a machine that the configuration does not mention, the name is
    the address. Raises UsageError for a configuration that ssh refuses or whose jumps go in
    circles.
    """
    return _resolve(name, port, user, key, host_key, config, ())


def _resolve(
    name: str,
    port: int | None,
    user: str | None,
    key: Path | None,
    host_key: str | None,
    config: Path | None,
    before: tuple[str, ...],
) -> Address:
    said, plain = _asked(name, config), _asked(name, Path("none"))
    host = said.get("hostname", name)
    there = int(said.get("port", 22)) if port is None else port
    if user is None:
        # root is our default; a jump host has ssh's own
        user = plain.get("user", "root") if before else "root"
        if said.get("user") != plain.get("user"):
            user = said["user"]
    if key is None and said.get("identityfile") != plain.get("identityfile"):
        key = _first_key(said["identityfile"])
    jump, proxy = None, None
    if (hops := said.get("proxyjump", "none")) != "none":
        if len(before) >= _DEEPEST or name in before:
            raise UsageError(
                f"ssh's configuration goes in circles: {' -> '.join((*before, name))}",
                hint="look at ProxyJump in ~/.ssh/config",
            )
        jump = _jumps(hops, config, (*before, name))
    elif (command := said.get("proxycommand", "none")) != "none":
        values = {"h": host, "p": str(there), "r": user, "n": name, "%": "%"}
        proxy = re.sub(r"%(.)", lambda one: values.get(one[1], one[0]), command)
    alias = name if (host, jump, proxy) != (name, None, None) else None
    return Address(host, there, user, key, host_key, jump, proxy, alias)


def _jumps(hops: str, config: Path | None, before: tuple[str, ...]) -> Address | None:
    """The last of the jump hosts; each is reached through the one before it."""
    found: Address | None = None
    for hop in hops.split(","):
        user, _, rest = hop.strip().removeprefix("ssh://").rpartition("@")
        match = re.fullmatch(r"\[?(?P<host>[^\[\]]+?)\]?(:(?P<port>\d+))?/?", rest)
        if match is None:
            raise UsageError(f"ssh's configuration has a ProxyJump that is none: '{hop}'")
        port = int(match["port"]) if match["port"] else None
        one = _resolve(match["host"], port, user or None, None, None, config, before)
        if found is not None:
            # named in a row, it is reached through the one before, whatever its own jump is
            one = Address(one.host, one.port, one.user, one.key, None, found, None, one.alias)
        found = one
    return found


def _first_key(files: str) -> Path | None:
    """The first of the key files that is there: ssh passes over those that are not."""
    for name in files.split("\n"):
        path = Path(name).expanduser()
        if path.is_file():
            return path
    return None


@functools.cache
def _asked(name: str, config: Path | None) -> Mapping[str, str]:
    """What ``ssh -G`` says of a machine, by keyword; several values of one are in lines."""
    if shutil.which("ssh") is None or name.startswith("-"):
        return {}
    words = ["ssh", "-G", *(["-F", str(config)] if config else []), name]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"'ssh -G {name}' did not end within {_DEADLINE_S:.0f} s",
            hint="a 'Match exec' of ~/.ssh/config may wait for something",
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UsageError(
            f"ssh's configuration cannot be read: {reason}", hint=f"'ssh -G {name}' shows it"
        )
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        word, _, value = line.partition(" ")
        found[word] = f"{found[word]}\n{value}" if word in found else value
    return found
