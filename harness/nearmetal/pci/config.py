# SPDX-License-Identifier: GPL-2.0-or-later
"""A function's config space, read: what topology wants to know of it.

Offsets and bits are those of PCIe r7.0, chapter 7, as Linux names them (uapi/linux/pci_regs.h).
"""

from __future__ import annotations

from dataclasses import dataclass

_CAP_PCIE, _CAP_ACS, _CAP_ATS = 0x10, 0x0D, 0x0F

ENDPOINT, ROOT_PORT, UPSTREAM, DOWNSTREAM = 0, 4, 5, 6
"""Device/Port Type of the PCI Express Capabilities Register."""


@dataclass(frozen=True, kw_only=True)
class Registers:
    """What config space says of a function; None where it lacks the register, or wasn't read.

    ``readable``: whether there is more than the header, so that a capability that is not found is
    not there. Without root Linux shows the header alone.
    ``acs_capable``, ``acs`` and ``egress_vector`` are ACS Capability, ACS Control and the Egress
    Control Vector; ``port_number`` is that of Link Capabilities, by which vectors name ports;
    ``ats`` is whether ATS is enabled, ``relaxed_ordering`` Enable Relaxed Ordering of Device
    Control, ``master`` Bus Master Enable.
    """

    readable: bool = False
    port_type: int | None = None
    port_number: int | None = None
    hotplug: bool = False
    master: bool = False
    acs_capable: int | None = None
    acs: int | None = None
    egress_vector: int = 0
    ats: bool | None = None
    relaxed_ordering: bool | None = None


NOT_READ = Registers()


@dataclass(frozen=True)
class _Space:
    data: bytes

    def word(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 2], "little")

    def long(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 4], "little")

    def capability(self, wanted: int) -> int | None:
        """Offset of a capability of the first 256 bytes."""
        if not self.word(0x06) & 0x10:
            return None
        offset, left = self.data[0x34] & 0xFC, 48
        while offset >= 0x40 and left:
            if self.data[offset] == wanted:
                return offset
            offset, left = self.data[offset + 1] & 0xFC, left - 1
        return None

    def extended(self, wanted: int) -> int | None:
        """Offset of an extended capability."""
        offset, left = 0x100, 960
        while 0x100 <= offset <= len(self.data) - 8 and left:
            head = self.long(offset)
            if head in (0, 0xFFFFFFFF):
                return None
            if head & 0xFFFF == wanted:
                return offset
            offset, left = head >> 20 & 0xFFC, left - 1
        return None


def registers(config: bytes) -> Registers:
    """Read config space, as far as there is some; zeros at its end may be missing.

    ``NOT_READ`` for a function that doesn't answer.
    """
    space = _Space(config.ljust(4096, b"\0"))
    # the first two words of a VF are all ones, too
    if len(config) < 64 or config[:64] == b"\xff" * 64:
        return NOT_READ
    master = bool(space.word(0x04) & 0x04)
    # the first capability lies behind what was read
    if space.word(0x06) & 0x10 and (space.data[0x34] & 0xFC) >= len(config):
        return Registers(master=master)
    port_type = port_number = relaxed_ordering = None
    hotplug = False
    if (express := space.capability(_CAP_PCIE)) is not None:
        flags = space.word(express + 0x02)
        port_type = flags >> 4 & 0xF
        port_number = space.long(express + 0x0C) >> 24
        relaxed_ordering = bool(space.word(express + 0x08) & 0x10)
        # Slot Implemented, and Hot-Plug Capable of Slot Capabilities
        hotplug = bool(flags & 0x100 and space.long(express + 0x14) & 0x40)
    capable = control = ats = None
    vector = 0
    if (acs := space.extended(_CAP_ACS)) is not None:
        capable, control = space.word(acs + 0x04), space.word(acs + 0x06)
        size = (capable >> 8) or 256
        if capable & 0x20:
            data = space.data[acs + 0x08 : acs + 0x08 + (size + 31) // 32 * 4]
            vector = int.from_bytes(data, "little") & ((1 << size) - 1)
    if (offset := space.extended(_CAP_ATS)) is not None:
        ats = bool(space.word(offset + 0x06) & 0x8000)
    return Registers(
        readable=True,
        port_type=port_type,
        port_number=port_number,
        hotplug=hotplug,
        master=master,
        acs_capable=capable,
        acs=control,
        egress_vector=vector,
        ats=ats,
        relaxed_ordering=relaxed_ordering,
    )
