# SPDX-License-Identifier: GPL-2.0-or-later
"""imc: the memory controllers' PMU (Ice Lake-SP) in a guest: what it counts, and what reads cost.

Registers are those of Linux' intel_uncore (arch/x86/events/intel/uncore_snbep.c, icx_uncore_imc
and icx_uncore_imc_free_running). Counted is in lines of 64 bytes. What a CPU reads and writes is
counted by hardware, too, so the counts are held against DMA of a known size: on the testbed,
where nothing else is counted, exactly; on a server it is the least that must be seen.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from ...core.errors import MeasurementError
from ...core.model import Measurement
from ...machines.equipment import ARRANGED, PCIE, Equipment
from ...machines.guest import GuestParts
from ...machines.host import Host, find_function
from ...machines.shell import Shell
from .. import p2p
from ..api import Metric, Setup, Test, Unit
from ..bench import Bench

LINE = 64
BYTES = 64 << 20
"""What a transfer moves; the testbed's disk has twice as much. What is on p2p's disk is lost."""
RUNS = 3
READS = 1000

CONTROLLERS, CHANNELS = 4, 3
"""PMUs of one die: uncore_imc_0 to 11, uncore_imc_free_running_0 to 3."""
CAS_READ, CAS_WRITE = "event=0x04,umask=0x0f", "event=0x04,umask=0x30"
"""icx_uncore_imc's cas_count_read and cas_count_write, without their scale to MiB."""
FREE_READ, FREE_WRITE = "event=0xff,umask=0x20", "event=0xff,umask=0x21"

MMIO_BASE, MEMORY_CONTROLLER = 0xD0, 0xD8
FREE_RUNNING_READ, CHANNEL_0, COUNTER_0 = 0x2290, 0x22800, 0x08
"""Offsets of registers at a memory controller."""
CHANNEL_STRIDE = 0x4000
PAGE = 4096
CHANNEL_PAGE = CHANNEL_0 & -PAGE
BOX = CHANNEL_0 - CHANNEL_PAGE
"""Where the PMU's registers begin in the page of a channel."""
BOX_SIZE = 0x58
CONTROL_0, CONTROL_2, COUNTER_2 = 0x40, 0x48, 0x18
"""Offsets in a channel's box."""
ENABLE, OVERFLOW = 1 << 22, 1 << 20
"""Bits of a control: the counter counts; its overflow interrupts, which is the host's business."""
MODULE = "vfio_icx_imc"
DRIVER = f"{MODULE}.icx_imc"
"""The driver's name on the auxiliary bus."""

FUNCTION = (0x8086, 0x3451)
"""Vendor and device of the function (SNR_MC_DEVICE_ID)."""

_DEADLINE_S = 300.0


def events(*kinds: str) -> list[str]:
    """perf's events for all of a die's programmable counters, or free-running ones."""
    return [
        f"{pmu}/{kind}/"
        for kind in kinds
        for pmu in (
            [f"uncore_imc_free_running_{number}" for number in range(CONTROLLERS)]
            if kind in (FREE_READ, FREE_WRITE)
            else [f"uncore_imc_{number}" for number in range(CONTROLLERS * CHANNELS)]
        )
    ]


def perf_command(command: str) -> str:
    """``command`` while all of them count; the counts go to standard output, one a line."""
    wanted = ",".join(events(CAS_READ, CAS_WRITE, FREE_READ, FREE_WRITE))
    return f"perf stat -x, -a -e {wanted} -- {command} 2>&1 >/dev/null"


def parse_perf(text: str) -> dict[str, int]:
    """The sum over all PMUs by kind of event, of what ``perf_command`` prints (perf stat -x,).

    A line is ``count,unit,event,run time,percentage``. Raises MeasurementError where an event
    was not counted all the time, or one is missing.
    """
    sums: dict[str, int] = {}
    left = set(events(CAS_READ, CAS_WRITE, FREE_READ, FREE_WRITE))
    for line in text.splitlines():
        name = next((one for one in left if f",{one}," in line), None)
        if name is None:
            continue
        left.discard(name)
        count, _, rest = line.partition(",")
        share = rest.partition(f"{name},")[2].split(",")
        if not count.isdigit() or len(share) < 2 or float(share[1]) != 100.0:
            raise MeasurementError(f"perf did not count {name}", detail=line)
        kind = name.split("/")[1]
        sums[kind] = sums.get(kind, 0) + int(count)
    if left:
        raise MeasurementError(f"perf did not report {sorted(left)[0]}", detail=text[-1000:])
    return sums


def addresses(config: bytes) -> list[int]:
    """Where the memory controllers' registers are, by function 8086:3451's config space.

    As snr_uncore_mmio_map() finds them. Raises MeasurementError for a config space that is short.
    """
    if len(config) < MEMORY_CONTROLLER + 4 * CONTROLLERS:
        raise MeasurementError(f"{len(config)} bytes of config space: it needs root")

    def dword(at: int) -> int:
        return int.from_bytes(config[at : at + 4], "little")

    base = (dword(MMIO_BASE) & 0x1FFFFFFF) << 23
    return [
        base | (dword(MEMORY_CONTROLLER + 4 * number) & 0x7FF) << 12
        for number in range(CONTROLLERS)
    ]


def error_pct(counted: int, bytes_: int = BYTES) -> float:
    """How far a count of lines is off, in percent."""
    lines = bytes_ // LINE
    return abs(counted - lines) / lines * 100


def transfers(disk: str) -> Mapping[str, str]:
    """Commands that have a disk write ``BYTES`` to memory, or read them, by what is counted."""
    count = BYTES >> 20
    return {
        "write": f"dd if={disk} of=/dev/null bs=1M count={count} iflag=direct status=none",
        "read": f"dd if=/dev/zero of={disk} bs=1M count={count} oflag=direct status=none",
    }


def controllers(shell: Shell) -> list[int]:
    """Where the machine that ``shell`` is on has each memory controller's registers.

    Raises MeasurementError for one that has no such function.
    """
    function = find_function(shell, *FUNCTION)
    if function is None:
        raise MeasurementError(
            f"{shell.name} has no function 8086:3451, which is that of memory controllers"
        )
    text = shell.run(f"base64 /sys/bus/pci/devices/{function}/config").stdout
    return addresses(base64.b64decode(text))


def measure(bench: Bench) -> list[Measurement]:
    """All rows: what counts are off for DMA of p2p's disk in the guest, and the exits of a read."""
    shell = bench.guest.shell
    first = controllers(shell)[0]
    disk, _ = p2p.find(shell.run(p2p.FIND).stdout)
    rows = [*counted(bench, disk), *exits(bench, first)]
    if ARRANGED in bench.host.equipment.has:
        rows += protected(bench, first)
    bench.guest.check()
    return rows


def counted(bench: Bench, disk: str) -> list[Measurement]:
    """How far programmable counters are off, and free-running ones in a row of their own."""
    found: dict[tuple[str, str], list[float]] = {}
    for way, command in transfers(disk).items():
        for number in range(RUNS):
            said = bench.guest.shell.run(perf_command(command), deadline_s=_DEADLINE_S).stdout
            (bench.logs / f"{bench.label}-imc-{way}-{number}.perf").write_text(said)
            sums = parse_perf(said)
            programmed, free = (CAS_READ, FREE_READ) if way == "read" else (CAS_WRITE, FREE_WRITE)
            found.setdefault((way, "programmed"), []).append(error_pct(sums[programmed]))
            found.setdefault((way, "free-running"), []).append(error_pct(sums[free]))
    return [
        bench.row(f"imc.cas_{way}_error_pct", values, counter=counter)
        for (way, counter), values in found.items()
    ]


def exits(bench: Bench, controller: int) -> list[Measurement]:
    """Exits for a read of a counter of a memory controller, by who answers.

    They are told by their address: a guest whose CPU says that there is no hypervisor has timers
    and clocks that exit meanwhile.
    """
    rows = []
    for counter, at in (
        ("free-running", FREE_RUNNING_READ),
        ("programmed", CHANNEL_0 + COUNTER_0),
    ):
        address = controller + at
        page = address & -PAGE
        command = f"nm-mmio read {address:#x} 64 {READS}"
        seen = [
            bench.traced(f"imc-{counter}-{number}", command, deadline_s=_DEADLINE_S)[1]
            for number in range(RUNS)
        ]
        total = [one.mmio_reads(page, page + PAGE) / READS for one in seen]
        user = [one.mmio_reads_userspace(page, page + PAGE) / READS for one in seen]
        rows.append(bench.row("imc.read_exits", total, counter=counter))
        rows.append(bench.row("imc.read_userspace_exits", user, counter=counter))
    return rows


def registers(shell: Shell, address: int, length: int) -> dict[int, int]:
    """The dwords of a range that are not zero, by offset."""
    said = shell.run(f"nm-mmio scan {address:#x} {length:#x}").stdout
    return {int(at, 16): value for at, value in json.loads(said)["dwords"].items()}


def write(shell: Shell, *values: tuple[int, int, int]) -> None:
    """Write registers: addresses, values, and how many bits."""
    shell.run("; ".join(f"nm-mmio write {at:#x} {bits} {value:#x}" for at, value, bits in values))


def others(page: Mapping[int, int]) -> dict[int, int]:
    """The registers of a channel's page that are not the PMU's: those for RAS."""
    return {at: value for at, value in page.items() if not BOX <= at < BOX + BOX_SIZE}


def protected(bench: Bench, controller: int) -> list[Measurement]:
    """What the guest can read and change that is not the PMU's, and who else can have it.

    At the end counters hold something, so that ``nothing_left`` can see that they are reset. Not
    on a server: RAS registers are written.
    """
    guest, host = bench.guest.shell, bench.host.shell
    there = controllers(host)[0] + CHANNEL_PAGE
    here = controller + CHANNEL_PAGE
    before = others(registers(host, there, PAGE))
    if not before:
        raise MeasurementError("the host's memory controllers have no RAS registers to protect")
    seen = others(registers(guest, here, PAGE))
    write(guest, *((here + at, 0, 32) for at in before))
    after = others(registers(host, there, PAGE))
    control = here + BOX + CONTROL_0
    write(guest, (control, OVERFLOW | ENABLE | 4, 32))
    taken = registers(host, there + BOX, BOX_SIZE).get(CONTROL_0, 0)
    if taken & ~OVERFLOW != ENABLE | 4:
        raise MeasurementError(f"the guest's write of a control came out as {taken:#x}")
    second = host.run(f"sh -c {shlex.quote(OPEN)} sh {bench.host.auxiliary('imc')}", check=False)
    if second.status and "busy" not in second.stdout:
        raise MeasurementError("the device cannot be opened again", detail=second.stdout)
    box = controller + CHANNEL_0
    write(guest, (box + CONTROL_2, ENABLE | 0x3004, 32), (box + COUNTER_2, 0x123456, 64))
    return [
        bench.row("imc.ras_registers_read", [float(len(seen))]),
        bench.row(
            "imc.ras_registers_changed",
            [float(sum(after.get(at) != value for at, value in before.items()))],
        ),
        bench.row("imc.overflows_enabled", [float(bool(taken & OVERFLOW))]),
        bench.row("imc.second_users", [float(second.status == 0)]),
    ]


OPEN = "exec 2>&1 3<> /dev/vfio/$(basename $(readlink -f $1/iommu_group))"
"""Opens the vfio group of the device ``$1``."""


def nothing_left(host: Host) -> None:
    """Raise MeasurementError if a register of a channel is not zero when the guest is gone."""
    if ARRANGED not in host.equipment.has:
        return
    for controller in controllers(host.shell):
        for channel in range(CHANNELS):
            box = controller + CHANNEL_0 + channel * CHANNEL_STRIDE
            left = registers(host.shell, box, BOX_SIZE)
            if left:
                raise MeasurementError(
                    f"the guest has left {left} in the registers at {box:#x} of {host.name}"
                )


def trapped(host: Host, parts: GuestParts) -> GuestParts:
    """The guest of the variant, with no register mapped."""
    extra = tuple(word.replace("mmap-read=on", "mmap-read=off") for word in parts.extra)
    return dataclasses.replace(parts, extra=extra)


TRAP = Setup("trap", modules={MODULE: {"map": "N"}}, shape=trapped, after=nothing_left)
"""KVM answers each access."""
MAP = Setup("map", after=nothing_left)
"""The guest reads pages that are mapped; as the variant alone says."""


def lacks(equipment: Equipment, unit: Unit) -> str | None:
    """What a host has not that the test needs: the function, and p2p's disk."""
    if "imc" not in equipment.functions:
        return "the host has no memory controllers for it (inventory: functions: imc)"
    return p2p.lacks(equipment, unit)


_COUNTER = {"counter": ("programmed", "free-running")}

TEST = Test(
    "imc",
    "Memory controllers (imc)",
    measure,
    (
        Metric(
            "imc.read_exits",
            "exits",
            "exits for one read of a memory controller's counter in the guest",
            keys=_COUNTER,
            variants=("on",),
        ),
        Metric(
            "imc.read_userspace_exits",
            "exits",
            "those of them that went to QEMU",
            keys=_COUNTER,
            variants=("on",),
        ),
        Metric(
            "imc.cas_read_error_pct",
            "%",
            "error of the guest's counts for a known number of bytes that a device read",
            keys=_COUNTER,
            variants=("on",),
        ),
        Metric(
            "imc.cas_write_error_pct",
            "%",
            "the same for bytes that it wrote",
            keys=_COUNTER,
            variants=("on",),
        ),
        Metric(
            "imc.ras_registers_read",
            "registers",
            "registers of a memory controller that are not its counters', and that the guest reads",
            variants=("on",),
            needs=(ARRANGED,),
        ),
        Metric(
            "imc.ras_registers_changed",
            "registers",
            "those that are other than before when the guest has written them",
            variants=("on",),
            needs=(ARRANGED,),
        ),
        Metric(
            "imc.overflows_enabled",
            "controls",
            "controls by which the guest could have an overflow interrupt the host",
            variants=("on",),
            needs=(ARRANGED,),
        ),
        Metric(
            "imc.second_users",
            "users",
            "users beside the guest that the host's kernel lets in",
            variants=("on",),
            needs=(ARRANGED,),
        ),
    ),
    order=40,
    setups=(TRAP, MAP),
    needs=(PCIE,),
    lacks=lacks,
    opt_in=True,
    functions=("imc",),
    checks=Path(__file__).with_name("checks.yaml"),
)
