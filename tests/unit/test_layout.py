# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM around the windows of the host's switch."""

import pytest

from nearmetal.core.errors import MeasurementError
from nearmetal.pci.layout import GIB, LEAST_MIB, MIB, Range, around, windows

NOTHING = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
PORT = (
    7 * NOTHING
    + "0x000000000000c000 0x000000000000cfff 0x0000000000000101\n"
    + "0x00000000fe800000 0x00000000febfffff 0x0000000000000200\n"
    + "0x0000000240000000 0x0000000247ffffff 0x0000000000102201\n"
    + NOTHING
)
"""The file ``resource`` of a bridge: BARs and ROM, windows for I/O, memory and prefetchable."""
LOW, HIGH = Range(0xFE800000, 0xFEBFFFFF), Range(0x240000000, 0x247FFFFFF)


def test_windows_are_those_of_memory() -> None:
    assert windows(PORT) == (LOW, HIGH)
    bar = "0x0000000250000000 0x000000025fffffff 0x0000000000140204\n"
    assert windows(PORT.replace(NOTHING, bar, 1)) == (LOW, HIGH)


def ram(memory_mib: int, holes: tuple[Range, ...]) -> list[Range]:
    """Where QEMU puts RAM above 4 GiB, by the definition of ram-holes."""
    left, at, found = (memory_mib - 512) * MIB, 4 * GIB, []
    for hole in sorted(holes, key=lambda one: one.first):
        size = min(left, hole.first - at)
        if size > 0:
            found.append(Range(at, at + size - 1))
            left -= size
        at = hole.last + 1
    return [*found, Range(at, at + left - 1)] if left else found


@pytest.mark.parametrize("memory_mib", [1024, 2048, 8192])
@pytest.mark.parametrize("first", [0x240000000, 0x140000000, 0x380000000000])
def test_ram_is_on_both_sides_and_never_in_a_window(memory_mib: int, first: int) -> None:
    high = Range(first, first + 0x7FFFFFF)
    found = around([LOW, high], memory_mib)
    assert found.memory_mib == max(memory_mib, LEAST_MIB)
    assert ram(found.memory_mib, found.holes) == [found.below, found.behind]
    assert found.below.last < high.first < high.last < found.behind.first
    assert not any(high.overlaps(part) for part in (found.below, found.behind))
    # without a hole for the windows there would be RAM in them: the test can fail
    assert any(high.overlaps(part) for part in ram(found.memory_mib, found.holes[:-1]))


def test_what_qemu_is_told() -> None:
    assert around([LOW, HIGH], 2048).machine() == (
        "max-ram-below-4g=512M,ram-holes=0x100000000-0x1ffffffff:0x240000000-0x27fffffff"
    )


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([LOW], "no window above 4 GiB"),
        ([Range(0x1000000, 0x1FFFFFF), HIGH], "below 512 MiB"),
        ([Range(4 * GIB, 5 * GIB - 1)], "begins at 4 GiB"),
    ],
)
def test_windows_that_leave_no_room_are_refused(found: list[Range], why: str) -> None:
    with pytest.raises(MeasurementError, match=why):
        around(found, 2048)
