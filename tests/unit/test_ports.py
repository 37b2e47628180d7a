# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports that guests and servers of tools take on a machine."""

from __future__ import annotations

import socket
from typing import cast

import pytest
from lib.fakes import LocalShell

from nearmetal.core.errors import MeasurementError
from nearmetal.machines.shell import Shell, free_port_on


def test_a_port_that_nobody_listens_at() -> None:
    here = cast(Shell, LocalShell("here"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MeasurementError, match="are taken"):
            free_port_on(here, port, port)
        assert free_port_on(here, port, port + 50) > port
