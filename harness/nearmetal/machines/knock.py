# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a machine answers at all, found out before anything else is done with it."""

from __future__ import annotations

import socket

from ..core import ui
from ..core.errors import EnvironmentBroken, UsageError
from .shell import Address


def knock(name: str, address: Address, *, deadline_s: float = 10.0) -> None:
    """Open a TCP connection to where the machine's sshd should be, and close it.

    Raises UsageError for a name that doesn't resolve, and EnvironmentBroken at once where the
    connection is refused or what answers is no SSH server, or when nothing has answered within
    ``deadline_s`` seconds. A port that is open and silent may be a slow machine's: that is told.
    Of a machine behind others the first that is met is knocked at; behind a command, none is.
    """
    while address.jump is not None:
        name, address = f"{name}'s jump host", address.jump
    if address.proxy is not None:
        return
    where = f"{address.host}, port {address.port}"
    try:
        with socket.create_connection((address.host, address.port), timeout=deadline_s) as there:
            banner = _banner(there)
    except socket.gaierror as error:
        raise UsageError(
            f"{name}: there is no host {address.host}: {error.strerror}",
            hint="check the address in the inventory",
        ) from None
    except ConnectionRefusedError:
        raise EnvironmentBroken(
            f"{name}: {address.host} refuses connections to port {address.port}",
            hint="is sshd running there, and is the port in the inventory right?",
        ) from None
    except TimeoutError:
        raise EnvironmentBroken(
            f"{name}: nothing answers at {where} ({deadline_s:.0f} s)",
            hint="is the machine up, and does a firewall let us through?",
        ) from None
    except OSError as error:
        raise EnvironmentBroken(
            f"{name}: cannot reach {where}: {error.strerror or error}",
            hint="is the machine up, and is there a route to it?",
        ) from None
    except UnicodeError:
        raise UsageError(
            f"{name}: '{address.host}' is not a host name",
            hint="check the address in the inventory",
        ) from None
    if banner is None:
        ui.say(f"{name}: {where}, accepts connections and says nothing yet: waiting")
    elif not banner:
        raise EnvironmentBroken(
            f"{name}: {where}, closes the connection at once",
            hint="does its sshd refuse us (MaxStartups, hosts.deny), or is the port another's?",
        )
    elif "SSH-" not in banner:
        first = banner.split("\n")[0].strip()[:60]
        raise EnvironmentBroken(
            f"{name}: what answers at {where} is not an SSH server ('{first}')",
            hint="is the port in the inventory right?",
        )


def _banner(there: socket.socket) -> str | None:
    """What the server says first, None if it says nothing in time.

    Lines may come before SSH's own (RFC 4253, 4.2).
    """
    text = b""
    try:
        while b"SSH-" not in text and len(text) < 1024 and (more := there.recv(1024)):
            text += more
    except TimeoutError:
        return text.decode(errors="replace") if text else None
    return text.decode(errors="replace")
