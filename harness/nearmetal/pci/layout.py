# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a guest's RAM lies when the windows of a switch of the host are inside its range.

With direct peer-to-peer a request for an address in such a window goes to a peer and to nobody
else, so no RAM may be there (series direct-p2p, docs/system/i386/direct-p2p.rst in QEMU). A guest
whose RAM ends far below the windows would show nothing: here there is RAM right below them and
right behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import MeasurementError

MIB, GIB = 1 << 20, 1 << 30
BELOW_4G_MIB = 512
"""RAM below 4 GiB, little, so that the rest is where it is wanted."""
LEAST_MIB = BELOW_4G_MIB + 1024 + 512
"""With less there is nothing behind the windows."""

_FIRST_WINDOW = 7
"""Line of a bridge's first window: behind six BARs and the ROM (Linux, sysfs-bus-pci: resource)."""
_MEMORY = 0x200
"""IORESOURCE_MEM (Linux, include/linux/ioport.h)"""


@dataclass(frozen=True)
class Range:
    """Addresses from ``first`` to ``last``."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first:#x}-{self.last:#x}"

    def overlaps(self, other: Range) -> bool:
        """Whether an address is in both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Layout:
    """A guest's RAM around windows: ``below`` and ``behind`` them there is some."""

    memory_mib: int
    holes: tuple[Range, ...]
    below: Range
    behind: Range

    def machine(self) -> str:
        """The options of QEMU's machine."""
        holes = ":".join(map(str, self.holes))
        return f"max-ram-below-4g={BELOW_4G_MIB}M,ram-holes={holes}"


def windows(resource: str) -> tuple[Range, ...]:
    """The memory windows of a bridge, from its file ``resource`` in sysfs."""
    found = []
    for line in resource.splitlines()[_FIRST_WINDOW:]:
        first, last, flags = (int(word, 16) for word in line.split())
        if flags & _MEMORY and last > first:
            found.append(Range(first, last))
    return tuple(found)


def around(host: Sequence[Range], memory_mib: int) -> Layout:
    """RAM with the host's windows above 4 GiB in the middle of it, as whole GiB.

    A GiB of RAM lies right below them, if there is room, and the rest right behind.
    """
    high = [window for window in host if window.first >= 4 * GIB]
    low = [window for window in host if window.first < 4 * GIB]
    if not high:
        raise MeasurementError(
            "the host's switch has no window above 4 GiB",
            hint="the host's firmware may have a setting for decoding above 4 GiB",
        )
    if any(window.first < BELOW_4G_MIB * MIB for window in low):
        raise MeasurementError(f"a window of the host's switch is below {BELOW_4G_MIB} MiB")
    first = min(window.first for window in high) // GIB * GIB
    last = -(-(max(window.last for window in high) + 1) // GIB) * GIB - 1
    memory_mib = max(memory_mib, LEAST_MIB)
    if first == 4 * GIB:
        raise MeasurementError("a window of the host's switch begins at 4 GiB: no RAM fits below")
    below = Range(first - GIB, first - 1)
    rest = (memory_mib - BELOW_4G_MIB) * MIB - GIB
    windows_and_more = Range(first, last)
    in_front = (Range(4 * GIB, below.first - 1),) if below.first > 4 * GIB else ()
    return Layout(memory_mib, (*in_front, windows_and_more), below, Range(last + 1, last + rest))
