# SPDX-License-Identifier: GPL-2.0-or-later
"""What the emulator says of its CPUs when the host does not answer."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from nearmetal.machines.emulators.testbed import read_autopsy, threads

DATA = Path(__file__).parent / "data"


def test_a_line_for_each_cpu() -> None:
    """Recorded from QEMU 10.0.13 in its firmware; the segment registers and those below are cut."""
    said = (DATA / "emulator-monitor.txt").read_text()
    first, second = read_autopsy(said)
    assert first == "CPU#0 EIP=0000b7b9 EFL=00000246 CPL=0 HLT=1"
    assert second.startswith("CPU#1 EIP=")


LAPIC = (
    '{"return": "dumping local APIC state for CPU 1 \\r\\n\\r\\nLVT0\\t 0x00010000\\r\\n'
    'ESR\\t 0x00000000\\r\\nISR\\t (none)\\r\\nIRR\\t 236 \\r\\n\\r\\nAPR 0x00\\r\\n"}\n'
    '{"return": "No CPU available\\r\\n"}\n'
)
"""QEMU 11.1.1, with a request put in."""


def test_interrupts_that_a_cpu_was_not_told_of() -> None:
    assert read_autopsy(LAPIC) == ["CPU#1 ISR=(none) IRR=236"]


def test_threads_of_a_program_that_hangs() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            end = time.monotonic() + 10
            while "sleep: S" not in (found := threads(sleeper.pid))[0]:
                assert time.monotonic() < end, found
        finally:
            sleeper.kill()
    assert found[0].startswith(f"thread {sleeper.pid} sleep: S")


def test_an_emulator_that_hangs_says_nothing() -> None:
    assert read_autopsy("") == ["it does not answer"]
    assert read_autopsy('{"return": {}}\nwarning: {half\n[1]\n') == ["it does not answer"]
