# SPDX-License-Identifier: GPL-2.0-or-later
"""imc: the memory controllers' PMU (Ice Lake-SP) in a guest: what it counts, and what reads cost.

Registers are those of Linux' intel_uncore (arch/x86/events/intel/uncore_snbep.c, icx_uncore_imc
and icx_uncore_imc_free_running). Counted is in lines of 64 bytes. What a CPU reads and writes is
counted by hardware, too, so the counts are held against DMA of a known size: on the testbed,
where nothing else is counted, exactly; on a server it is the least that must be seen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from ...core.errors import MeasurementError
from ...core.model import Measurement
from ...machines.equipment import PCIE, Equipment
from ...machines.host import find_function
from ...machines.shell import Shell
from .. import p2p
from ..api import Metric, Test, Unit
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
PAGE = 4096

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
    ),
    order=40,
    needs=(PCIE,),
    lacks=lacks,
    opt_in=True,
    functions=("imc",),
    checks=Path(__file__).with_name("checks.yaml"),
)
