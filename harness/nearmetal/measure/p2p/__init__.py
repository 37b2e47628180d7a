# SPDX-License-Identifier: GPL-2.0-or-later
"""p2p: an NVMe moves data to and from another NVMe's controller memory buffer.

Stock p2pdma. Broken peer-to-peer is silent: success means that every byte was compared, both
ways, and that the host's IOMMU logged no fault. In the testbed the switch also counts which
way the bytes went.

The testbed has two pairs of functions, told apart by ``context.topology``: ``flat``, both below one
switch, and ``cascade``, the target one switch deeper than the initiator, as on DGX A100. The second
is measured in the set-ups ``iommufd`` and ``direct``, in the same guest; while bytes of the one
pair move, the other's functions are idle, so that the switches' counters are the one's.

Set-ups (``context.setup``): ``iommu`` is a guest with both functions assigned by the type1
container, behind IOMMU and ACS redirection. In the testbed two more are measured on ``vanilla``,
each on a host of its own: ``bare``, the host itself without IOMMU, and ``ats``, a guest whose
initiator has ATS, with ACS Direct Translated. ``direct`` and ``iommufd`` prove the series
direct-p2p: in the one the guest's peers reach each other directly, and windows of the host's switch
lie inside the range of its RAM; the other is its control, with iommufd too and all else off.

While the peer's bytes are moved a last time, the initiator also moves pages of ordinary memory.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import MeasurementError
from ...core.model import Measurement
from ...machines.equipment import ARRANGED, PCIE, ROUTES, Equipment
from ...machines.guest import Guest, GuestParts
from ...machines.host import Host, count_iommu_faults, reported_errors
from ...machines.shell import Shell
from ...pci.layout import Layout, Range, around, windows
from ...probes import routes, topology, ways
from ..api import Better, Keys, Metric, Setup, Test, Unit
from ..bench import Bench, Row

RUNS = {"flat": 3, "cascade": 1}
"""Timed transfers by topology; one more of each is not timed. A cascade is for its routes."""
BYTES = 8 << 20
BLOCK = 256 << 10
_DEADLINE_S = 300.0

FIND = r"""
for c in /sys/class/nvme/nvme*; do
  [ -e "$c" ] || continue
  d=$(readlink -f "$c/device")
  n=$(ls -d "$c"/nvme*n* "/sys/block/$(basename "$c")"n* 2>/dev/null | head -n 1)
  p=; [ -e "$d/p2pmem/allocate" ] && p="$d/p2pmem/allocate"
  s=$(cat "$c/serial" 2>/dev/null)
  echo "$(basename "$c")|$(basename "${n:-}")|$p|$(basename "$d")|${s%% *}"
done
"""


def find(listing: str, serials: Sequence[str] = ()) -> tuple[str, str]:
    """The disk to use and the peer's ``allocate`` file, never of the same function.

    ``serials`` are those of the peer and of the disk, where there may be others.
    """
    rows = [line.split("|") for line in listing.strip().splitlines() if line.count("|") == 4]
    wanted = tuple(serials) or (None, None)
    for _, _, allocate, peer, of_peer in rows:
        for _, disk, _, address, of_disk in rows:
            if wanted != (None, None) and wanted != (of_peer, of_disk):
                continue
            if allocate and disk and address != peer:
                return f"/dev/{disk}", allocate
    raise MeasurementError(
        "the guest has no NVMe disk beside an NVMe with peer memory",
        detail=listing or "no NVMe controller",
        hint="needs CONFIG_PCI_P2PDMA in the guest and a controller memory buffer on the peer",
    )


def bandwidth(line: dict[str, float]) -> float:
    """MiB a second of one transfer."""
    return (line["bytes"] / (1 << 20)) / (line["ns"] / 1e9)


@dataclass(frozen=True)
class Way:
    """The way that bytes must take in a set-up: ACS Control of every downstream port.

    ``expect`` of ``mask`` must read back before anything is moved: a switch whose ACS is off
    by itself would carry all bytes directly, and prove nothing.
    """

    name: str
    mask: int
    expect: int
    direct: bool = False
    """Whether the guest's functions have their memory where the host has it."""


REDIRECT = routes.RR | routes.CR
BARE = Way("bare", REDIRECT | routes.DT, 0)
IOMMU = Way("iommu", REDIRECT | routes.DT, REDIRECT)
ATS = Way("ats", REDIRECT | routes.DT, REDIRECT | routes.DT)
IOMMUFD = Way("iommufd", REDIRECT | routes.DT, REDIRECT)
DIRECT = Way("direct", REDIRECT | routes.DT, 0, direct=True)
BOTH = (IOMMUFD, DIRECT)
"""Ways that the bytes of all pairs of the host are moved by."""
WAYS = {way.name: way for way in (BARE, IOMMU, ATS, IOMMUFD, DIRECT)}
FLAT, CASCADE = "flat", "cascade"
ANYWHERE: Mapping[str, Range] = {"anywhere": Range(0, (1 << 52) - 1)}
"""Where RAM is moved from and to beside the peer's: x86 has 52 address bits at most."""
ATS_CONTROL = routes.SV | routes.RR | routes.CR | routes.UF | routes.DT
"""0x5d, as NVIDIA recommends for VMs with ATS"""

_MEMORY_BARS = r"""
while read start end flags; do
  [ $((flags & 0x200)) -ne 0 ] && echo $start $end
done < /sys/bus/pci/devices/%s/resource
true
"""


def peer_memory(resource: str) -> int:
    """Where the largest memory BAR starts, the controller memory buffer of the testbed's peer.

    ``resource`` has first and last address of a BAR in each line.
    """
    found = [tuple(int(word, 16) for word in line.split()) for line in resource.splitlines()]
    if not found:
        raise MeasurementError("the peer has no memory BAR")
    return max(found, key=lambda bar: bar[1] - bar[0])[0]


OUTERMOST = "$(readlink -f %s | cut -d/ -f1-6)/resource"
"""The file with the windows of the highest switch above a function, by its path in sysfs.

In front of that port are /sys/devices, the root bus and the root port.
"""


@dataclass(frozen=True)
class Pair:
    """Two functions of the host: ``disk`` moves bytes to and from the memory of ``peer``."""

    topology: str
    peer: str
    disk: str
    serials: tuple[str, ...] = ()
    """Of the peer and of the disk, where the host has other pairs."""


def pairs(host: Host) -> tuple[Pair, ...]:
    """All that the host has, the flat one first."""
    found = []
    for topology_, names in ((FLAT, host.p2p), (CASCADE, host.cascade)):
        if "peer" in names and "disk" in names:
            both = (names["peer"], names["disk"])
            serials = host.equipment.serials
            known = tuple(serials[one] for one in both if one in serials)
            found.append(Pair(topology_, *both, known if len(known) == 2 else ()))
    return tuple(found)


def parting(shell: Shell, pair: Pair) -> tuple[str, ...]:
    """The downstream ports of the host at which the ways to the two functions part.

    They are those whose redirection decides about requests between the two: a switch that is
    above the one, and below the other's, passes on what it is given.
    """
    device = "/sys/bus/pci/devices"
    text = shell.run(f"readlink -f {device}/{pair.peer} {device}/{pair.disk}").stdout
    peer, disk = (line.split("/") for line in text.split())
    return next((one, other) for one, other in zip(peer, disk, strict=False) if one != other)


def layout(host: Host, every: Sequence[Pair] = ()) -> Layout:
    """RAM of a guest around the windows of the highest switches above pairs (the flat one)."""
    found: list[Range] = []
    for pair in every or pairs(host)[:1]:
        device = f"/sys/bus/pci/devices/{pair.peer}"
        text = host.shell.run(f"cat {OUTERMOST % shlex.quote(device)}").stdout
        found += windows(text)
    return around(found, host.equipment.guest_memory_mib)


def check_redirected(ports: routes.Ports) -> None:
    """MeasurementError unless all ports redirect: as they are before and after a direct set-up."""
    for address, control in ports.acs.items():
        if control & REDIRECT != REDIRECT:
            raise MeasurementError(
                f"ACS Control of {address} is {routes.names(control)}, without a guest"
            )


def beside(
    lines: list[dict[str, Any]], ranges: Mapping[str, Range]
) -> dict[str, tuple[float, float]]:
    """Bytes moved and corrupt by name of the range, as nm-p2p tells them."""
    found = {
        (line["first"], line["last"]): (line["bytes"], line["corrupt"])
        for line in lines
        if line["memory"] == "beside"
    }
    if set(found) != {(one.first, one.last) for one in ranges.values()}:
        raise MeasurementError(
            "nm-p2p did not report the transfers beside", detail=json.dumps(lines)
        )
    return {name: found[one.first, one.last] for name, one in ranges.items()}


def measure(bench: Bench) -> list[Measurement]:
    """All rows of one set-up, in its guest or, if it is bare, on the host itself."""
    host = bench.host
    way = WAYS[bench.setup.name or IOMMU.name]
    if way is ATS:
        routes.set_acs(host.shell, routes.read(host.shell), ATS_CONTROL)
    every = pairs(host) if way in BOTH else pairs(host)[:1]
    ranges = ANYWHERE
    if way.direct:
        around_it = layout(host, every)
        ranges = {"below-window": around_it.below, "behind-window": around_it.behind}
    where = host if bench.setup.bare else bench.guest
    return [
        row
        for pair in every
        for row in transfers(host, where, way, bench.row, bench.logs, bench.label, ranges, pair)
    ]


def transfers(
    host: Host,
    where: Guest | Host,
    way: Way,
    row: Row,
    logs: Path,
    label: str,
    ranges: Mapping[str, Range] = ANYWHERE,
    pair: Pair | None = None,
) -> list[Measurement]:
    """The rows of bytes that take one way; they move in ``where``, the switch is the host's.

    ``ranges`` are where RAM is moved beside the peer's bytes, by names for the report; ``pair``
    are the functions, those of the flat one by themselves.
    """
    pair = pair or pairs(host)[0]
    disk, allocate = find(where.shell.run(FIND).stdout, pair.serials)
    context = {
        "block": str(BLOCK),
        **_acs(host, way, pair),
        **_bars(host, where, way, allocate, pair),
    }
    before = host.kernel_log().last
    moved = _Moved()
    runs = RUNS[pair.topology]
    for number in range(runs + 1):
        words = ["nm-p2p", disk, allocate, str(BYTES), str(BLOCK), str(1000 + number)]
        last = number == runs
        if last:
            words += map(str, ranges.values())
        counted = routes.read(host.shell).total if host.can(ROUTES) else routes.NOTHING
        out = where.shell.run(shlex.join(words), deadline_s=_DEADLINE_S).stdout
        where.check()
        if host.can(ROUTES):
            moved.ways.append(routes.read(host.shell).total - counted)
        moved.add(out, timed=not last)
        if last:
            moved.beside = beside(moved.lines, ranges)
    kept = {"transfers": moved.lines, "routes": [repr(one) for one in moved.ways]}
    (logs / f"{label}-p2p-{pair.topology}.json").write_text(json.dumps(kept, indent=1))
    said = host.kernel_log(before).lines
    return moved.rows(row, context, count_iommu_faults(said), len(reported_errors(said)))


def _acs(host: Host, way: Way, pair: Pair) -> dict[str, str]:
    """Topology, and ACS Control of the ports that decide about requests between the two.

    Only where it can be seen. MeasurementError if a port's is not the way's: where peers reach
    each other directly, all ports redirect but those at which the ways to a pair part.
    """
    if not host.can(ROUTES):
        if not host.can(PCIE):
            return {}
        state = ways.state(topology.survey(host.shell), [pair.peer, pair.disk])
        return {key: state[key] for key in ("acs", "route")}
    ports = routes.read(host.shell)
    mine = parting(host.shell, pair)
    others = {port for one in pairs(host) if one != pair for port in parting(host.shell, one)}
    for address, control in ports.acs.items():
        mask, expect = way.mask, way.expect
        if way.direct and address not in mine:
            mask, expect = (0, 0) if address in others else (REDIRECT, REDIRECT)
        if control & mask != expect:
            raise MeasurementError(
                f"ACS Control of {address} is {routes.names(control)}, and the set-up"
                f" '{way.name}' needs {routes.names(expect)}"
            )
    names = {routes.names(ports.acs[address]) for address in mine}
    return {"acs": "/".join(sorted(names)), "topology": pair.topology}


def _bars(host: Host, where: Guest | Host, way: Way, allocate: str, pair: Pair) -> dict[str, str]:
    """Whether the peer's memory has the host's address in the guest, as the way wants it or not.

    Raises MeasurementError otherwise: with the same address by chance, peer-to-peer would come out
    right without translation.
    """
    if where is host or not (host.can(ROUTES) or way.direct):
        return {}
    peer = allocate.split("/")[-3]
    there = peer_memory(where.shell.run(_MEMORY_BARS % peer).stdout)
    here = peer_memory(host.shell.run(_MEMORY_BARS % pair.peer).stdout)
    if way.direct and there != here:
        raise MeasurementError(
            f"the peer's memory is at {there:#x} in the guest and at {here:#x} on the host"
        )
    if there == here and not way.direct:
        raise MeasurementError(
            f"the peer's memory has the address {here:#x} in the guest and on the host, so"
            " that peer-to-peer would come out right without translation"
        )
    return {"bars": "as-on-host" if way.direct else "moved"}


@dataclass
class _Moved:
    """What nm-p2p said of all runs, and which ways the switch saw."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    speeds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    corrupt: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})
    ways: list[routes.Routed] = field(default_factory=list)
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, out: str, *, timed: bool) -> None:
        """Add what one run printed; raises MeasurementError where a transfer is not told of."""
        every = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        self.lines += every
        found = [line for line in every if line["memory"] != "beside"]
        kinds = {(line["direction"], line["memory"]) for line in found}
        if kinds != {(way, memory) for way in ("read", "write") for memory in ("ram", "peer")}:
            raise MeasurementError("nm-p2p did not report all transfers", detail=out[-1000:])
        for line in found:
            if timed:
                key = (line["direction"], line["memory"])
                self.speeds.setdefault(key, []).append(bandwidth(line))
            if line["memory"] == "peer":
                self.corrupt[line["direction"]].append(line["corrupt"])
            elif line["corrupt"]:
                raise MeasurementError(
                    f"{line['corrupt']} bytes differ with ordinary memory: the disk is broken"
                )

    def rows(
        self, row: Row, context: Mapping[str, str], faults: int, errors: int
    ) -> list[Measurement]:
        """All rows."""
        found = [
            row("p2p.read_mib_s", self.speeds["read", "peer"], **context),
            row("p2p.write_mib_s", self.speeds["write", "peer"], **context),
        ]
        for way in ("read", "write"):
            speeds = self.speeds[way, "ram"]
            found.append(row("p2p.host_ram_mib_s", speeds, direction=way, **context))
            found.append(row("p2p.corrupt_bytes", self.corrupt[way], direction=way, **context))
        found.append(row("p2p.iommu_faults", [faults], **context))
        found.append(row("p2p.errors_reported", [errors], **context))
        for place, (size, wrong) in self.beside.items():
            found.append(row("p2p.ram_bytes", [size], ram=place, **context))
            found.append(row("p2p.ram_corrupt_bytes", [wrong], ram=place, **context))
        if self.ways:
            for kind in ("direct", "redirected", "translated"):
                values = [getattr(one, kind) for one in self.ways]
                found.append(row(f"p2p.bytes_{kind}", values, **context))
        return found


def beside_windows(host: Host, parts: GuestParts) -> GuestParts:
    """A guest with BARs at the host's addresses, and RAM around the windows of the switch.

    Raises MeasurementError where the switch does not redirect before it has that guest.
    """
    found = layout(host, pairs(host))
    check_ports(host)
    return dataclasses.replace(
        with_all_pairs(host, parts),
        memory_mib=found.memory_mib,
        machine=found.machine(),
        host_addresses=True,
    )


def with_all_pairs(host: Host, parts: GuestParts) -> GuestParts:
    """A guest with the cascade's functions, too, where the host has one."""
    more = tuple(one for pair in pairs(host) for one in (pair.peer, pair.disk))
    return dataclasses.replace(parts, assigned=tuple(dict.fromkeys((*parts.assigned, *more))))


def check_ports(host: Host) -> None:
    """MeasurementError unless all ports redirect, where that can be seen."""
    if host.can(ROUTES):
        check_redirected(routes.read(host.shell))


def lacks(equipment: Equipment, unit: Unit) -> str | None:
    """What a host has not that the test needs."""
    if not equipment.has_nvme_pair:
        return "the host has no devices for p2p (inventory: p2p)"
    return None


PLAIN = Setup(IOMMU.name)
IN_IOMMUFD = Setup(IOMMUFD.name, iommufd=True, control=True, shape=with_all_pairs)
IN_DIRECT = Setup(DIRECT.name, iommufd=True, shape=beside_windows, after=check_ports)
SETUPS = (
    Setup(BARE.name, variants=("vanilla",), needs=(ARRANGED,), iommu=False, bare=True),
    Setup(ATS.name, variants=("vanilla",), needs=(ARRANGED,), ats=True),
    IN_IOMMUFD,
    IN_DIRECT,
)

_CONTEXT: Keys = {
    "block": "[0-9]+",
    "acs": ".*",
    "bars": ("moved", "as-on-host"),
    "route": ".*",
    "topology": (FLAT, CASCADE),
}
_DIRECTION: Keys = {**_CONTEXT, "direction": ("read", "write")}
_RAM: Keys = {**_CONTEXT, "ram": ("anywhere", "below-window", "behind-window", "in-window")}


def _metric(
    name: str,
    unit: str,
    meaning: str,
    better: Better = "lower",
    keys: Keys = _CONTEXT,
    needs: tuple[str, ...] = (),
) -> Metric:
    return Metric(name, unit, meaning, better, keys=keys, needs=needs)


METRICS = (
    _metric("p2p.read_mib_s", "MiB/s", "NVMe reads into the peer's memory", "higher"),
    _metric("p2p.write_mib_s", "MiB/s", "NVMe writes from the peer's memory", "higher"),
    _metric(
        "p2p.host_ram_mib_s", "MiB/s", "the same transfers with guest RAM", "higher", _DIRECTION
    ),
    _metric("p2p.corrupt_bytes", "bytes", "bytes that differ after a transfer", keys=_DIRECTION),
    _metric(
        "p2p.ram_bytes",
        "bytes",
        "bytes of RAM that the initiator moved while it moved the peer's",
        "equal",
        _RAM,
    ),
    _metric("p2p.ram_corrupt_bytes", "bytes", "bytes of these that differ afterwards", keys=_RAM),
    _metric(
        "p2p.bytes_direct",
        "bytes",
        "peer-to-peer bytes that the switch routed directly to the peer",
        "equal",
        needs=(ROUTES,),
    ),
    _metric(
        "p2p.bytes_redirected",
        "bytes",
        "peer-to-peer bytes that ACS redirected to the root complex",
        "equal",
        needs=(ROUTES,),
    ),
    _metric(
        "p2p.bytes_translated",
        "bytes",
        "peer-to-peer bytes routed directly to the peer as translated requests (ATS)",
        "equal",
        needs=(ROUTES,),
    ),
    _metric("p2p.iommu_faults", "faults", "DMA faults that the host's IOMMU logged"),
    _metric("p2p.errors_reported", "messages", "messages of the host's kernel on reported errors"),
)

TEST = Test(
    "p2p",
    "Peer-to-peer DMA (p2p)",
    measure,
    METRICS,
    order=30,
    plain=PLAIN,
    setups=SETUPS,
    needs=(PCIE,),
    lacks=lacks,
    checks=Path(__file__).with_name("checks.yaml"),
)
