# SPDX-License-Identifier: GPL-2.0-or-later
"""lspci: what a pass over config space costs, and how many of its accesses leave the kernel.

``lspci -xxx`` reads the first 256 bytes of every function, which Linux does through ports
0xCF8 and 0xCFC (arch/x86/pci/common.c, raw_pci_read); ``-xxxx`` reads all 4096, the rest of
them through the memory-mapped window (ECAM).
"""

from __future__ import annotations

import re

from ..errors import MeasurementError
from ..model import Measurement
from ..tracing import CONFIG_ADDRESS, CONFIG_DATA, Exits
from .bench import Bench

NAMES = ("lspci.pass_us", "lspci.dword_ns", "lspci.exits", "lspci.userspace_exits")

PASSES = 3
DWORD_READS = 1000
_DEADLINE_S = 300.0


def config_exits(exits: Exits) -> int:
    """Port accesses to config space."""
    return exits.ports(CONFIG_ADDRESS, CONFIG_DATA + 3)


def config_exits_userspace(exits: Exits) -> int:
    """Those of them that QEMU served."""
    return exits.ports_userspace(CONFIG_ADDRESS, CONFIG_DATA + 3)


def ecam_window(iomem: str) -> tuple[int, int]:
    """The first ECAM window in /proc/iomem: its first byte and the one behind its last."""
    found = re.search(r"^\s*([0-9a-f]+)-([0-9a-f]+) : PCI (?:ECAM|MMCONFIG) ", iomem, re.M)
    if not found or int(found[2], 16) == 0:
        raise MeasurementError("the guest's /proc/iomem names no ECAM window")
    return int(found[1], 16), int(found[2], 16) + 1


def functions(listing: str) -> dict[str, str]:
    """``lspci -D -n``: the functions and their class, ``0000:00:00.0`` to ``0600``."""
    return dict(re.findall(r"^(\S+) ([0-9a-f]{4}): ", listing, re.M))


def measure(bench: Bench) -> list[Measurement]:
    """All rows of the lspci test."""
    shell = bench.guest.shell
    listing = shell.run("lspci -D -n").stdout
    (bench.logs / f"{bench.variant}-lspci.txt").write_text(
        listing + shell.run("lspci -D -nn -vvv", deadline_s=_DEADLINE_S).stdout
    )
    window = ecam_window(shell.read("/proc/iomem"))
    return [
        *_passes_cf8(bench),
        *_passes_ecam(bench, window),
        *_dwords(bench, functions(listing), window),
    ]


def _passes_cf8(bench: Bench) -> list[Measurement]:
    times, totals, users = [], [], []
    for number in range(PASSES + 1):
        said, exits = bench.traced(
            f"lspci-xxx-{number}", "nm-run lspci -xxx", deadline_s=_DEADLINE_S
        )
        _succeeded(said["status"], "lspci -xxx")
        times.append(said["ns"] / 1000)
        totals.append(config_exits(exits))
        users.append(config_exits_userspace(exits))
    rows = []
    for name, values in (
        ("lspci.pass_us", times),
        ("lspci.exits", totals),
        ("lspci.userspace_exits", users),
    ):
        rows.append(bench.row(name, values[:1], path="cf8", **{"pass": "first"}))
        rows.append(bench.row(name, values[1:], path="cf8", **{"pass": "second"}))
    return rows


def _passes_ecam(bench: Bench, window: tuple[int, int]) -> list[Measurement]:
    times, totals, users = [], [], []
    for number in range(PASSES):
        said, exits = bench.traced(
            f"lspci-xxxx-{number}", "nm-run lspci -xxxx", deadline_s=_DEADLINE_S
        )
        _succeeded(said["status"], "lspci -xxxx")
        times.append(said["ns"] / 1000)
        totals.append(exits.mmio_reads(*window))
        users.append(exits.mmio_reads_userspace(*window))
    return [
        bench.row("lspci.pass_us", times, path="ecam", **{"pass": "second"}),
        bench.row("lspci.exits", totals, path="ecam", **{"pass": "second"}),
        bench.row("lspci.userspace_exits", users, path="ecam", **{"pass": "second"}),
    ]


def _dwords(bench: Bench, found: dict[str, str], window: tuple[int, int]) -> list[Measurement]:
    """One register read again and again: Vendor and Device ID, and the extended one at 0x100."""
    rows = []
    emulated = min(address for address, kind in found.items() if kind == "0600")
    targets = [("emulated", emulated)]
    if bench.host.p2p:
        nvme = sorted(address for address, kind in found.items() if kind == "0108")
        if nvme:
            targets.append(("assigned", nvme[0]))
    for kind, address in targets:
        config = f"/sys/bus/pci/devices/{address}/config"
        for path, offset in (("cf8", 0), ("ecam", 0x100)):
            size = int(bench.guest.shell.run(f"stat -c %s {config}").stdout)
            if offset >= size:
                continue
            nanoseconds = []
            for number in range(PASSES):
                said, exits = bench.traced(
                    f"dword-{kind}-{path}-{number}",
                    f"nm-config {config} {offset} {DWORD_READS}",
                    deadline_s=_DEADLINE_S,
                )
                nanoseconds.append(said["ns"] / said["reads"])
                served = config_exits(exits) if path == "cf8" else exits.mmio_reads(*window)
                expected = DWORD_READS * (2 if path == "cf8" else 1)
                if bench.variant != "on" and served < expected:
                    raise MeasurementError(
                        f"{served} exits for {DWORD_READS} reads of {address} by {path}: "
                        f"expected {expected}"
                    )
            rows.append(bench.row("lspci.dword_ns", nanoseconds, path=path, function=kind))
    return rows


def _succeeded(status: int, command: str) -> None:
    if status != 0:
        raise MeasurementError(f"'{command}' ended with status {status} in the guest")
