# SPDX-License-Identifier: GPL-2.0-or-later
"""Which config registers a cache may keep, from the PCI Express Base Specification alone.

Section numbers are those of revision 6.2. A register's attribute (7.4, "Configuration Register
Types") says who changes it: RO and HwInit nobody, RW software alone; what hardware sets (RW1C,
RO status fields, pending bits) or what acts when it is read or written (VPD's flag, power
state, enables of MSI and MSI-X) no cache may keep. A dword may be kept if all of it may.

This table is what the measurements are held against, so it owes nothing to the allow-list in
the patches, and is not derived from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CONFIG_SIZE = 256
"""Bytes of config space that ports 0xCF8 and 0xCFC reach."""

RO, RW, LIVE = "ro", "rw", "live"
"""Nobody changes it; software alone changes it; hardware changes it or it acts."""

Field = tuple[int, int, str]
"""Offset and length in bytes, attribute."""

_COMMON: tuple[Field, ...] = (  # 7.5.1.1
    (0x00, 4, RO),  # Vendor ID, Device ID
    (0x04, 2, LIVE),  # Command: enables
    (0x06, 2, LIVE),  # Status
    (0x08, 4, RO),  # Revision ID, Class Code
    (0x0C, 1, RW),  # Cache Line Size
    (0x0D, 1, RO),  # Latency Timer
    (0x0E, 1, RO),  # Header Type
    (0x34, 4, RO),  # Capabilities Pointer, reserved
)
_TYPE0: tuple[Field, ...] = (  # 7.5.1.2
    (0x10, 24, RW),  # BARs
    (0x28, 4, RO),  # Cardbus CIS Pointer
    (0x2C, 4, RO),  # Subsystem IDs
    (0x30, 4, RW),  # Expansion ROM BAR
    (0x38, 4, RO),  # reserved
    (0x3C, 1, RW),  # Interrupt Line
    (0x3D, 3, RO),  # Interrupt Pin, Min_Gnt, Max_Lat
)
_TYPE1: tuple[Field, ...] = (  # 7.5.1.3
    (0x10, 8, RW),  # BARs
    (0x18, 3, RW),  # bus numbers
    (0x1B, 1, RO),  # Secondary Latency Timer
    (0x1C, 2, RW),  # I/O Base, Limit
    (0x1E, 2, LIVE),  # Secondary Status
    (0x20, 16, RW),  # Memory and Prefetchable Base and Limit
    (0x30, 4, RW),  # I/O Base and Limit Upper 16 Bits
    (0x38, 4, RW),  # Expansion ROM BAR
    (0x3C, 1, RW),  # Interrupt Line
    (0x3D, 1, RO),  # Interrupt Pin
)


def _half(config: bytes, offset: int) -> int:
    return int.from_bytes(config[offset : offset + 2], "little")


def capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """(offset, ID) of the capabilities in the list (7.5.1.1.11)."""
    if not _half(config, 0x06) & 0x10:
        return
    at, seen = config[0x34] & 0xFC, set[int]()
    while at >= 0x40 and at not in seen:
        seen.add(at)
        yield at, config[at]
        at = config[at + 1] & 0xFC


def _capability(config: bytes, at: int, kind: int) -> tuple[Field, ...]:
    flags = _half(config, at + 2)
    if kind == 0x01:  # Power Management, 7.5.2: PMC; PMCSR is live
        return ((0, 4, RO), (4, 4, LIVE))
    if kind == 0x05:  # MSI, 7.7.1: Message Control has the enable
        wide, masking = bool(flags & 0x80), bool(flags & 0x100)
        data = 12 if wide else 8
        fields: tuple[Field, ...] = ((0, 4, LIVE), (4, data - 4, RW), (data, 4, RW))
        return (*fields, (data + 4, 4, RW), (data + 8, 4, LIVE)) if masking else fields
    if kind == 0x11:  # MSI-X, 7.7.2: Message Control; Table and PBA Offset/BIR
        return ((0, 4, LIVE), (4, 8, RO))
    if kind == 0x10:  # PCI Express, 7.5.3
        return _express(flags)
    if kind == 0x0D:  # Subsystem ID and Subsystem Vendor ID, 7.9.23
        return ((0, 8, RO),)
    if kind == 0x13:  # Advanced Features, 7.9.21 (PCI AF ECN): FLR and Transactions Pending
        return ((0, 4, RO), (4, 2, LIVE))
    return ()


def _express(flags: int) -> tuple[Field, ...]:
    version, kind, slot = flags & 0xF, flags >> 4 & 0xF, bool(flags & 0x100)
    integrated = kind in (0x9, 0xA)
    port = kind in (0x4, 0x6, 0x8)
    # Device Capabilities, 7.5.3.3: messages set Captured Slot Power Limit, of upstream ports only
    captures = not port and not integrated
    fields: list[Field] = [(0x00, 4, RO), (0x04, 4, LIVE if captures else RO)]
    fields.append((0x08, 4, LIVE))  # Device Control, Status
    if version >= 2 or not integrated:
        fields += [(0x0C, 4, RO), (0x10, 4, LIVE)]  # Link
    if version >= 2 or (port and slot):
        fields += [(0x14, 4, RO), (0x18, 4, LIVE)]  # Slot
    if version >= 2:
        fields += [(0x1C, 8, LIVE)]  # Root
        for at in (0x24, 0x2C, 0x34):  # Device, Link and Slot 2
            fields += [(at, 4, RO), (at + 4, 4, LIVE)]
    return tuple(fields)


def cacheable(config: bytes, *, assigned: bool = False) -> frozenset[int]:
    """The offsets of the dwords below 256 that a cache may keep, of a function's config space.

    ``config`` is its first 256 bytes. Registers that the specification does not define are not
    among them. Neither is Vendor ID of a function that is ``assigned``: hardware that is gone
    reads as all ones (2.3.2, completion of a configuration request), and nobody tells.
    Raises ValueError for fewer bytes.
    """
    if len(config) < CONFIG_SIZE:
        raise ValueError(f"{len(config)} bytes of config space, expected {CONFIG_SIZE}")
    kept: dict[int, bool] = {}

    def note(base: int, fields: tuple[Field, ...]) -> None:
        for offset, length, attribute in fields:
            for byte in range(base + offset, base + offset + length):
                kept[byte] = kept.get(byte, True) and attribute != LIVE

    note(0, _COMMON)
    # BIST, 7.5.1.1.8: its completion code is hardware's, unless there is no self test
    note(0, ((0x0F, 1, LIVE if config[0x0F] & 0x80 else RO),))
    kinds = [kind for _, kind in capabilities(config)]
    header = config[0x0E] & 0x7F
    if header == 0:
        note(0, _TYPE0)
    elif header == 1:
        # Bridge Control, 7.5.1.3.13: conventional PCI's Discard Timer Status is live
        note(0, (*_TYPE1, (0x3E, 2, RW if 0x10 in kinds else LIVE)))
    for at, kind in capabilities(config):
        note(at, _capability(config, at, kind))
    return frozenset(
        at
        for at in range(4 if assigned else 0, CONFIG_SIZE, 4)
        if all(kept.get(byte, False) for byte in range(at, at + 4))
    )


def parse_dump(text: str) -> dict[str, bytes]:
    """``lspci -D -xxx``: each function's address and its bytes (pciutils 3.x, lspci.c)."""
    found: dict[str, bytearray] = {}
    current: bytearray | None = None
    for line in text.splitlines():
        if head := re.match(r"([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ", line):
            current = found.setdefault(head[1], bytearray())
        elif current is not None and (row := re.match(r"[0-9a-f]{2,3}:((?: [0-9a-f]{2})+)$", line)):
            current += bytes.fromhex(row[1])
    return {address: bytes(data) for address, data in found.items()}


def latch(address: str, offset: int) -> int:
    """What is written to 0xCF8 for a register of ``0000:bb:dd.f`` (PCI 3.0, 3.2.2.3.2)."""
    bus, device, function = re.split(r"[:.]", address)[1:]
    return (
        1 << 31 | int(bus, 16) << 16 | int(device, 16) << 11 | int(function, 16) << 8 | offset & ~3
    )
