# SPDX-License-Identifier: GPL-2.0-or-later
"""Which registers may be kept, on config space that a guest of the testbed has shown.

data/config/lspci-xxx.txt is ``lspci -D -xxx`` (pciutils 3.13) in a guest of QEMU 10.0.13, with two
assigned NVMe functions. The expected offsets were read off it by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nearmetal.pci.registers import CONFIG_SIZE, cacheable, capabilities, latch, parse_dump

DUMP = parse_dump((Path(__file__).parent / "data" / "config" / "lspci-xxx.txt").read_text())
HEADER0 = {at for at in range(0, 0x40, 4) if at != 0x04}
HEADER1 = HEADER0 - {0x1C}


def test_dump_is_read_whole() -> None:
    assert len(DUMP) == 14
    assert {len(data) for data in DUMP.values()} == {CONFIG_SIZE}
    assert DUMP["0000:00:00.0"][:4] == bytes.fromhex("8680c029")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0000:00:00.0", HEADER0),  # no capabilities
        ("0000:00:01.0", HEADER0 | {0x9C, 0xA0}),  # MSI-X at 98, five vendor-specific
        ("0000:00:1f.2", HEADER0 | {0x84, 0x88, 0x8C}),  # 64-bit MSI at 80, SATA at a8
        # SSVID at 40, MSI-X at 48, PCIe at 54
        (
            "0000:00:04.0",
            HEADER1 | {0x40, 0x44, 0x4C, 0x50, 0x54, 0x58, 0x60, 0x68, 0x78, 0x80, 0x88},
        ),
        # MSI-X at 40, PM at 60, PCIe at 80
        (
            "0000:03:00.0",
            HEADER0 | {0x44, 0x48, 0x60, 0x80, 0x8C, 0x94, 0xA4, 0xAC, 0xB4},
        ),
    ],
)
def test_registers_that_may_be_kept(address: str, expected: set[int]) -> None:
    assert cacheable(DUMP[address]) == expected


def test_ids_tell_whether_an_assigned_function_is_there() -> None:
    config = DUMP["0000:03:00.0"]
    assert cacheable(config, assigned=True) == cacheable(config) - {0x00}


@pytest.mark.parametrize(
    ("kind", "captures"),
    [(0, True), (1, True), (4, False), (5, True), (6, False), (7, True), (8, False), (9, False)],
)
def test_messages_set_the_power_limit_of_upstream_ports(kind: int, captures: bool) -> None:
    data = bytearray(CONFIG_SIZE)
    data[0x06], data[0x34] = 0x10, 0x40
    data[0x40], data[0x42] = 0x10, kind << 4 | 2
    assert (0x44 in cacheable(bytes(data))) != captures
    assert 0x40 in cacheable(bytes(data))


def test_self_test_makes_its_dword_live() -> None:
    data = bytearray(DUMP["0000:00:00.0"])
    data[0x0F] = 0x80
    assert cacheable(bytes(data)) == HEADER0 - {0x0C}


def test_conventional_bridge_s_control_is_live() -> None:
    data = bytearray(CONFIG_SIZE)
    data[0x0E] = 1
    assert cacheable(bytes(data)) == HEADER1 - {0x3C}


def test_list_that_loops_ends() -> None:
    data = bytearray(CONFIG_SIZE)
    data[0x06], data[0x34] = 0x10, 0x40
    data[0x40], data[0x41] = 0x01, 0x40
    assert list(capabilities(bytes(data))) == [(0x40, 0x01)]


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        cacheable(bytes(64))


def test_latch() -> None:
    assert latch("0000:02:1f.3", 0x3D) == 0x8002FB3C
