# SPDX-License-Identifier: GPL-2.0-or-later
"""lspci: what a pass over config space costs, and how many of its accesses leave the kernel.

``lspci -xxx`` reads the first 256 bytes of every function, which Linux does through ports
0xCF8 and 0xCFC (arch/x86/pci/common.c, raw_pci_read); ``-xxxx`` reads all 4096, the rest of
them through the memory-mapped window (ECAM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import MeasurementError
from ...core.model import Measurement
from ...machines.equipment import INSTRUCTIONS, PCIE
from ...pci.registers import CONFIG_SIZE, cacheable, capabilities, latch, parse_dump
from ...probes.tracing import CONFIG_ADDRESS, CONFIG_DATA, Exits
from ..api import Keys, Metric, Test
from ..bench import Bench
from . import instructions

PASSES = 3
COMPARISONS = 3
DWORD_READS = 500
DWORD_PROOF = 50
_DEADLINE_S = 300.0
_CAP_EXPRESS = 0x10
_LINK_CONTROL = 0x10
"""Where Link Control and Status are in the PCI Express capability (PCIe r6.2, 7.5.3)."""

HOST_BRIDGE = "/machine/q35"
CACHE_ACTIVE = "config-cache-active"
"""Where QEMU's series pci-config-cache puts its switch (docs/system/i386/pci-config-cache.rst)."""
LIVE_ACTIVE = "config-live-active"
"""Where its series pci-config-live does (docs/system/i386/pci-config-live.rst)."""
ECAM_MAPPED = "ecam-mapped"
"""Where its series pci-ecam lists the functions that it maps (docs/specs/pci-ecam-hint.rst)."""
ASSIGNED_ID = "hostdev"
"""How the ids of assigned devices begin (guest.py)."""
ECAM_PAGE = 4096
"""Bytes of ECAM a function has (PCIe r6.2, 7.2.2)."""


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
        raise MeasurementError("the guest's /proc/iomem has no ECAM window")
    return int(found[1], 16), int(found[2], 16) + 1


def functions(listing: str) -> dict[str, str]:
    """``lspci -D -n``: the functions and their class, ``0000:00:00.0`` to ``0600``."""
    return dict(re.findall(r"^(\S+) ([0-9a-f]{4}): ", listing, re.M))


def kinds(buses: list[dict[str, Any]]) -> dict[str, str]:
    """What stands behind each function, from the answer to QMP's ``query-pci``.

    ``assigned``: a function of the host's, whose registers change in hardware; ``above``: the
    port in front of one, whose link status is that of the function (hw/pci/pcie.c,
    pcie_sync_bridge_lnk); ``emulated``: all else. By address, ``01:00.0``.
    """
    found: dict[str, str] = {}

    def walk(devices: list[dict[str, Any]]) -> bool:
        """Whether one of them is assigned."""
        any_assigned = False
        for device in devices:
            address = f"{device['bus']:02x}:{device['slot']:02x}.{device['function']:x}"
            assigned = str(device.get("qdev_id", "")).startswith(ASSIGNED_ID)
            below = device.get("pci_bridge", {}).get("devices", [])
            found[address] = "assigned" if assigned else "above" if walk(below) else "emulated"
            any_assigned |= assigned
        return any_assigned

    for bus in buses:
        walk(bus["devices"])
    return found


def measure(bench: Bench) -> list[Measurement]:
    """All rows of the lspci test."""
    shell = bench.guest.shell
    listing = shell.run("lspci -D -n").stdout
    (bench.logs / f"{bench.label}-lspci.txt").write_text(
        listing + shell.run("lspci -D -nn -vvv", deadline_s=_DEADLINE_S).stdout
    )
    window = ecam_window(shell.read("/proc/iomem"))
    found = functions(listing)
    return [
        *passes_cf8(bench, window),
        *_compared(bench),
        *_passes_ecam(bench, window),
        *_dwords(bench, found, window),
        *(
            instructions.measure(
                bench, found, [f"0000:{one}" for one in _mapped(bench)], _prefers_ecam(bench)
            )
            if bench.host.can(INSTRUCTIONS)
            else ()
        ),
    ]


def _dump(bench: Bench) -> dict[str, bytes]:
    """The first 256 bytes of every function, as the guest reads them through the ports."""
    text = bench.guest.shell.run("lspci -D -xxx", deadline_s=_DEADLINE_S).stdout
    found = parse_dump(text)
    short = [address for address, data in found.items() if len(data) != CONFIG_SIZE]
    if short or not found:
        raise MeasurementError(
            f"'lspci -D -xxx' does not show 256 bytes of {short[0] if short else 'any function'}",
            detail=text[-1000:],
        )
    return found


def cacheable_exits(exits: Exits, kept: Mapping[str, frozenset[int]]) -> int:
    """Exits to userspace for registers that the specification lets a cache keep."""
    return sum(
        exits.config_user.get(latch(address, offset), 0)
        for address, offsets in kept.items()
        for offset in offsets
    )


def _cacheable(bench: Bench, dump: Mapping[str, bytes]) -> dict[str, frozenset[int]]:
    """The offsets that a cache may keep, by function."""
    known = kinds(bench.guest.qmp("query-pci"))
    return {
        address: cacheable(data, assigned=known.get(address.removeprefix("0000:")) == "assigned")
        for address, data in dump.items()
    }


def link_status_exits(exits: Exits, ports: Mapping[str, bytes]) -> int:
    """Exits to userspace for the dword with Link Status (PCIe r6.2, 7.5.3.7) of these ports."""
    return sum(
        exits.config_user.get(latch(address, start + _LINK_CONTROL), 0)
        for address, data in ports.items()
        for start, one in capabilities(data)
        if one == _CAP_EXPRESS
    )


def _compared(bench: Bench) -> list[Measurement]:
    """Every byte of every function, served by KVM and, switched off, by QEMU.

    Where KVM serves none, the same is read twice: the control, bytes that change by themselves.
    """
    guest = bench.guest
    switches = [one for one in (CACHE_ACTIVE, LIVE_ACTIVE) if guest.has_property(HOST_BRIDGE, one)]
    mismatches, compared = [], []
    for _ in range(COMPARISONS):
        cached = _dump(bench)
        for one in switches:
            guest.qmp("qom-set", path=HOST_BRIDGE, property=one, value=False)
        try:
            plain = _dump(bench)
        finally:
            for one in switches:
                guest.qmp("qom-set", path=HOST_BRIDGE, property=one, value=True)
        if cached.keys() != plain.keys():
            raise MeasurementError("lspci shows other functions when QEMU serves config reads")
        differ = [
            f"{address}+{offset:#x}: {cached[address][offset]:#x}, by QEMU {byte:#x}"
            for address, data in plain.items()
            for offset, byte in enumerate(data)
            if cached[address][offset] != byte
        ]
        if differ:
            (bench.logs / f"{bench.label}-mismatches.txt").write_text("\n".join(differ) + "\n")
        mismatches.append(len(differ))
        compared.append(sum(len(data) for data in plain.values()))
    return [
        bench.row("lspci.byte_mismatches", mismatches, path="cf8"),
        bench.row("lspci.bytes_compared", compared, path="cf8"),
    ]


def passes_cf8(bench: Bench, window: tuple[int, int]) -> list[Measurement]:
    """The rows of ``lspci -xxx``: passes, exits, and which registers they were for.

    A guest that is told to reads the same registers by ECAM (series pci-ecam), whose window is
    ``window``: these exits count, too.
    """
    dump = _dump(bench)
    may = _cacheable(bench, dump)
    known = kinds(bench.guest.qmp("query-pci"))
    above = {
        address: data
        for address, data in dump.items()
        if known.get(address.removeprefix("0000:")) == "above"
    }
    totals, users, kept, links = [], [], [], []
    first = _timed_pass(bench, "lspci -xxx")
    for number in range(PASSES + 1):
        exits = _counted_pass(bench, "lspci -xxx", number)
        totals.append(config_exits(exits) + exits.mmio_reads(*window))
        users.append(config_exits_userspace(exits) + exits.mmio_reads_userspace(*window))
        kept.append(cacheable_exits(exits, may))
        links.append(link_status_exits(exits, above))
    times = [first, *(_timed_pass(bench, "lspci -xxx") for _ in range(PASSES))]
    rows = []
    for name, values in (
        ("lspci.pass_us", times),
        ("lspci.exits", totals),
        ("lspci.userspace_exits", users),
        ("lspci.userspace_exits_cacheable", kept),
        ("lspci.userspace_exits_link_status", links),
    ):
        rows.append(bench.row(name, values[:1], path="cf8", **{"pass": "first"}))
        rows.append(bench.row(name, values[1:], path="cf8", **{"pass": "second"}))
    dwords = sum(CONFIG_SIZE // 4 - len(offsets) for offsets in may.values())
    return [*rows, bench.row("lspci.uncacheable_dwords", [dwords], path="cf8")]


def _passes_ecam(bench: Bench, window: tuple[int, int]) -> list[Measurement]:
    counted = [_counted_pass(bench, "lspci -xxxx", number) for number in range(PASSES)]
    times = [_timed_pass(bench, "lspci -xxxx") for _ in range(PASSES)]
    totals = [exits.mmio_reads(*window) for exits in counted]
    users = [exits.mmio_reads_userspace(*window) for exits in counted]
    return [
        *_by_kind(bench, window[0], counted),
        bench.row("lspci.pass_us", times, path="ecam", **{"pass": "second"}),
        bench.row("lspci.exits", totals, path="ecam", **{"pass": "second"}),
        bench.row("lspci.userspace_exits", users, path="ecam", **{"pass": "second"}),
    ]


def _by_kind(bench: Bench, base: int, counted: list[Exits]) -> list[Measurement]:
    """What the reads of ECAM cost by what is read, and which functions QEMU says it maps."""
    guest = bench.guest
    known = kinds(guest.qmp("query-pci"))
    rows = []
    for kind in ("emulated", "above", "assigned"):
        pages = [ecam_page(base, address) for address, what in known.items() if what == kind]
        exits = [sum(one.mmio_reads(page, page + ECAM_PAGE) for page in pages) for one in counted]
        rows.append(bench.row("ecam.read_exits", exits, path="ecam", function=kind))
        rows.append(bench.row("ecam.functions", [len(pages)], function=kind))
    mapped = _mapped(bench)
    strange = [address for address in mapped if known.get(address) != "emulated"]
    if strange:
        raise MeasurementError(f"QEMU maps config space of {strange[0]}, which it must not do")
    return [*rows, bench.row("ecam.mapped_functions", [len(mapped)])]


def _mapped(bench: Bench) -> list[str]:
    """The functions that QEMU says it maps into the guest, as ``01:00.0``."""
    if not bench.guest.has_property(HOST_BRIDGE, ECAM_MAPPED):
        return []
    found: list[str] = bench.guest.qmp("qom-get", path=HOST_BRIDGE, property=ECAM_MAPPED)
    return found


def _prefers_ecam(bench: Bench) -> bool:
    """Whether the guest reads what isn't mapped by ECAM, too: nothing serves the ports."""
    guest = bench.guest
    caches = guest.has_property(HOST_BRIDGE, CACHE_ACTIVE)
    return guest.has_property(HOST_BRIDGE, ECAM_MAPPED) and not caches


def ecam_page(base: int, address: str) -> int:
    """Where a function's config space is in the guest's memory, ``base`` being bus 0's."""
    bus, device, function = (int(part, 16) for part in re.split("[:.]", address))
    return base + (bus << 20 | device << 15 | function << 12)


def _counted_pass(bench: Bench, command: str, number: int) -> Exits:
    label = f"{command.replace(' ', '')}-{number}"
    said, exits = bench.traced(label, f"nm-run {command}", deadline_s=_DEADLINE_S)
    _succeeded(said["status"], command)
    return exits


def _timed_pass(bench: Bench, command: str) -> float:
    said = bench.timed(f"nm-run {command}", deadline_s=_DEADLINE_S)
    _succeeded(said["status"], command)
    return float(said["ns"]) / 1000


def _dwords(bench: Bench, found: dict[str, str], window: tuple[int, int]) -> list[Measurement]:
    """One register read again and again: Vendor and Device ID, and the extended one at 0x100.

    A short counted run shows first that the reads really take the path that they stand for.
    """
    rows = []
    targets = [("emulated", min(address for address, kind in found.items() if kind == "0600"))]
    if bench.host.p2p:
        targets += [
            ("assigned", address) for address, kind in sorted(found.items()) if kind == "0108"
        ][:1]
    for kind, address in targets:
        config = f"/sys/bus/pci/devices/{address}/config"
        size = int(bench.guest.shell.run(f"stat -c %s {config}").stdout)
        for path, offset in (("cf8", 0), ("ecam", 0x100)):
            if offset >= size:
                continue
            probe = f"nm-config {config} {offset}"
            _, exits = bench.traced(
                f"dword-{kind}-{path}", f"{probe} {DWORD_PROOF}", deadline_s=_DEADLINE_S
            )
            served = config_exits(exits) if path == "cf8" else exits.mmio_reads(*window)
            expected = DWORD_PROOF * (2 if path == "cf8" else 1)
            if bench.variant != "on" and served != expected:
                raise MeasurementError(
                    f"{served} exits for {DWORD_PROOF} reads of {address} by {path}: "
                    f"expected {expected}"
                )
            said = [
                bench.timed(f"{probe} {DWORD_READS}", deadline_s=_DEADLINE_S) for _ in range(PASSES)
            ]
            nanoseconds = [one["ns"] / one["reads"] for one in said]
            rows.append(bench.row("lspci.dword_ns", nanoseconds, path=path, function=kind))
    return rows


def _succeeded(status: int, command: str) -> None:
    if status != 0:
        raise MeasurementError(f"'{command}' ended with status {status} in the guest")


_PATH: Keys = {"path": ("cf8", "ecam")}
_PASS: Keys = {**_PATH, "pass": ("first", "second")}
_KINDS = ("emulated", "above", "assigned")
_REGISTER: Keys = {
    **_PATH,
    "function": ("emulated", "assigned"),
    "register": ("id", "status", "extended"),
}

METRICS = (
    Metric("lspci.pass_us", "us", "wall time of one lspci pass in the guest", keys=_PASS),
    Metric(
        "lspci.dword_ns",
        "ns",
        "time of one 4-byte config read in the guest",
        keys={**_PATH, "function": ("emulated", "assigned")},
    ),
    Metric("lspci.exits", "exits", "config-access exits of one lspci pass", keys=_PASS),
    Metric(
        "lspci.userspace_exits",
        "exits",
        "config-access exits of one lspci pass that left the kernel for QEMU",
        keys=_PASS,
    ),
    Metric(
        "lspci.userspace_exits_cacheable",
        "exits",
        "those of registers that the PCIe specification allows to be cached",
        keys=_PASS,
    ),
    Metric(
        "lspci.userspace_exits_link_status",
        "exits",
        "those for Link Status of the ports above assigned devices",
        keys=_PASS,
    ),
    Metric(
        "lspci.uncacheable_dwords",
        "dwords",
        "registers of all functions that the PCIe specification does not allow to be cached",
        "equal",
        keys=_PATH,
    ),
    Metric(
        "lspci.byte_mismatches",
        "bytes",
        "config bytes that differ between a pass that KVM serves and one that QEMU serves",
        keys=_PATH,
    ),
    Metric("lspci.bytes_compared", "bytes", "config bytes that were compared", "equal", keys=_PATH),
    Metric(
        "lspci.dword_instructions",
        "instructions",
        "instructions of the host, without the guest's own, for one 4-byte config read",
        keys=_REGISTER,
        needs=(INSTRUCTIONS,),
    ),
    Metric(
        "lspci.dword_instructions_ratio",
        "times",
        "the same of vanilla, divided by the variant's",
        "higher",
        keys=_REGISTER,
        needs=(INSTRUCTIONS,),
        derived=instructions.compared,
    ),
    Metric(
        "exit.kernel_pair_instructions",
        "instructions",
        "the same for two port accesses that KVM serves: the floor of a config read",
        "equal",
        keys={"port": "0x[0-9a-f]+"},
        needs=(INSTRUCTIONS,),
    ),
    Metric(
        "ecam.read_exits",
        "exits",
        "exits for reads of config space by ECAM in one pass of lspci -xxxx",
        keys={"path": ("ecam",), "function": _KINDS},
    ),
    Metric(
        "ecam.functions",
        "functions",
        "functions of the guest, by what provides them",
        "equal",
        keys={"function": _KINDS},
    ),
    Metric(
        "ecam.mapped_functions",
        "functions",
        "functions whose config space QEMU says it maps into the guest",
        "higher",
    ),
)

TEST = Test(
    "lspci",
    "Config reads (lspci)",
    measure,
    METRICS,
    order=10,
    needs=(PCIE,),
    checks=Path(__file__).with_name("checks.yaml"),
)
