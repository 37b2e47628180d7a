# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulator's count of instructions against a loop of known length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.patches import variants
from nearmetal.probes.instructions import Interval, clean, pinned, series, undisturbed

pytestmark = pytest.mark.testbed

COUNT = 50
LENGTHS = (1, 1000, 1001)


@pytest.fixture(scope="module")
def guest(
    conf: Settings, cache: Cache, built: Lab, vanilla: variants.Config, host: Host,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guest]:  # fmt: skip
    parts = built.guest_parts(vanilla, host, [])
    logs = tmp_path_factory.mktemp("guest")
    with running_guest(host, parts, logs=logs, label="vanilla") as machine, pinned(host, machine):
        yield machine


@pytest.fixture(scope="module")
def log(host: Host) -> Path:
    assert host.instructions is not None
    return host.instructions


def exactly(length: int) -> int:
    """nm-insns: a move, and LENGTH times DEC and JNZ."""
    return 2 * length + 1


@pytest.mark.parametrize("length", LENGTHS)
def test_a_loop_on_the_host_counts_exactly(host: Host, log: Path, length: int) -> None:
    found = series(log, host.shell, f"loop {length}", count=COUNT)
    exact = [one for one in found if one == Interval(exactly(length), 0, 0)]
    # the others were interrupted
    assert len(exact) >= 0.8 * len(found)
    assert all(one.host >= exactly(length) for one in found)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_loop_in_the_guest_is_the_guest_s(guest: Guest, log: Path, length: int) -> None:
    found = series(log, guest.shell, f"loop {length}", count=COUNT)
    exact = [one for one in found if one == Interval(0, exactly(length), 0)]
    assert len(exact) >= 0.8 * len(found)
    # an interrupt takes exits, and instructions of the host
    assert all((one.host > 0) == (one.entries > 0) for one in found)


def test_config_reads_cost_the_same_again(guest: Guest, log: Path) -> None:
    words = "config /sys/bus/pci/devices/0000:00:00.0/config 0"
    first, second = (undisturbed(series(log, guest.shell, words), 2) for _ in range(2))
    assert first == pytest.approx(second, rel=0.01)
    assert first > undisturbed(series(log, guest.shell, "ports 0x4d0"), 2) > 0


def test_another_number_of_exits_is_refused(guest: Guest, log: Path) -> None:
    words = "config /sys/bus/pci/devices/0000:00:00.0/config 0"
    with pytest.raises(MeasurementError, match="reads took the 1 exits"):
        clean(series(log, guest.shell, words), 1)


def test_loop_of_another_length_is_told_apart(host: Host, log: Path) -> None:
    found = series(log, host.shell, "loop 1000", count=COUNT)
    assert Interval(exactly(1001), 0, 0) not in found
