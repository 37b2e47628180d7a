# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a machine answers at all, found out before anything else is done with it."""

from __future__ import annotations

import socket

from ..core.errors import EnvironmentBroken, UsageError
from .shell import Address


def knock(name: str, address: Address, *, deadline_s: float = 10.0) -> None:
    """Open a TCP connection to where the machine's sshd should be, and close it.

    Raises UsageError for a name that doesn't resolve, and EnvironmentBroken at once where the
    connection is refused, or when nothing has answered within ``deadline_s`` seconds.
    """
    try:
        socket.create_connection((address.host, address.port), timeout=deadline_s).close()
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
            f"{name}: nothing answers at {address.host}, port {address.port} ({deadline_s:.0f} s)",
            hint="is the machine up, and does a firewall let us through?",
        ) from None
    except OSError as error:
        raise EnvironmentBroken(
            f"{name}: cannot reach {address.host}, port {address.port}: {error.strerror or error}",
            hint="is the machine up, and is there a route to it?",
        ) from None
    except UnicodeError:
        raise UsageError(
            f"{name}: '{address.host}' is no name of a host",
            hint="check the address in the inventory",
        ) from None
