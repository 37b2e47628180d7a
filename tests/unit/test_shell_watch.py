# SPDX-License-Identifier: GPL-2.0-or-later
"""A console that says that the kernel died ends a wait; a warning alone does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearmetal.core.errors import MeasurementError
from nearmetal.machines.console import Console

OOPS = "[   48.111959] BUG: kernel NULL pointer dereference, address: 0000000000000000\n"
WARN = "[    3.000000] WARNING: CPU: 0 PID: 1 at kernel/fork.c:1 copy_process+0x1/0x2\n"


def test_oops_is_broken_each_time_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    console = Console("host", path)
    path.write_text("nearmetal: up\n")
    console.broken()
    path.write_text("nearmetal: up\n" + OOPS)
    for _ in range(2):
        with pytest.raises(MeasurementError, match="NULL pointer"):
            console.broken()
    with pytest.raises(MeasurementError, match="NULL pointer"):
        console.check()


def test_warning_does_not_end_what_runs_but_fails_the_check(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text(WARN)
    console = Console("host", path)
    console.broken()
    with pytest.raises(MeasurementError, match="WARNING"):
        console.check()


def test_a_failed_test_shows_the_detail() -> None:
    """pytest prints an exception's notes; the console's last lines are in there."""
    assert MeasurementError("QEMU ended", detail="its last words").__notes__ == ["its last words"]
