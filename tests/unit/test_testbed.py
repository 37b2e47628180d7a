# SPDX-License-Identifier: GPL-2.0-or-later
"""What the emulator says of its CPUs when the host does not answer."""

from __future__ import annotations

from pathlib import Path

from nearmetal.machines.emulators.testbed import read_autopsy

DATA = Path(__file__).parent / "data"


def test_a_line_for_each_cpu() -> None:
    """Recorded from QEMU 10.0.13 in its firmware; the segment registers and those below are cut."""
    said = (DATA / "emulator-monitor.txt").read_text()
    first, second = read_autopsy(said)
    assert first == "CPU#0 EIP=0000b7b9 EFL=00000246 CPL=0 HLT=1"
    assert second.startswith("CPU#1 EIP=")


def test_an_emulator_that_hangs_says_nothing() -> None:
    assert read_autopsy("") == ["it does not answer"]
    assert read_autopsy('{"return": {}}\nwarning: {half\n[1]\n') == ["it does not answer"]
