# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest that mirrors a host, for some of its functions: pure, from a survey.

For each host bridge that a function is below the guest has a pxb-pcie on the same NUMA node, and
below it the root ports and switches that are above the function on the host. So two functions
are as far from each other as they are there. What cannot work is refused, all at once; what
works worse than it could is told (``Plan.losses``), as is what must be done first
(``Plan.steps``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import UsageError
from ..core.text import nearest
from ..pci.config import DOWNSTREAM, ROOT_PORT, UPSTREAM
from ..probes import obstacles
from ..probes.topology import HOST, NOBODY, Bar, Function, Survey
from .distances import Place

MIB, GIB = 1 << 20, 1 << 30
PAGES = {"1G": 1024, "2M": 2, "none": 1}
"""Sizes of huge pages, in MiB; without them memory has a granularity of 1 MiB."""

_FIRST_BUS = 0x20
"""Bus of the first pxb-pcie: those below are for what is on the guest's bus 0."""
_BUSES = 256
_NVIDIA, _DISPLAY = 0x10DE, 0x03
_CLIQUES = 16
"""Cliques have four bits (QEMU, hw/vfio/pci-quirks.c)."""
_INTEL, _AMD = 0x8086, 0x1022


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    ``direct_p2p``: on where it can be; ``must_direct_p2p``: refuse if it can be nowhere.
    ``pages`` is a key of ``PAGES``. With QEMU's series: ``globals`` are words for -global,
    ``guest_series`` what the guest's kernel needs for these, ``pmu`` passes event selectors.
    """

    functions: tuple[str, ...]
    name: str = "vm"
    cpus: int = 16
    memory_mib: int = 64 * 1024
    pages: str = "1G"
    direct_p2p: bool = False
    must_direct_p2p: bool = False
    iommufd: bool = False
    globals: tuple[str, ...] = ()
    guest_series: tuple[str, ...] = ()
    pmu: bool = False


@dataclass(frozen=True)
class Cell:
    """A NUMA node of the guest, and that of the host which it stands for.

    ``cpus`` are the first and the last of its vCPUs, ``host_cpus`` those of the host's node as
    Linux lists them, if they are known.
    """

    number: int
    host: int | None
    cpus: tuple[int, int]
    memory_mib: int
    host_cpus: str | None = None


@dataclass(frozen=True)
class Root:
    """A pxb-pcie: a host bridge of the guest. ``cell`` is its node, ``mirrors`` the host's bus."""

    name: str
    bus_nr: int
    cell: int | None
    mirrors: str


@dataclass(frozen=True)
class Port:
    """A port of the guest: ``kind`` is ROOT_PORT, UPSTREAM or DOWNSTREAM; ``mirrors`` the host's,
    None for one that the host lacks."""

    name: str
    kind: int
    bus: str
    slot: int
    number: int
    mirrors: str | None


@dataclass(frozen=True)
class Device:
    """An assigned function; ``clique`` is that of NVIDIA GPUs which may reach each other."""

    name: str
    host: str
    bus: str
    slot: int
    function: int
    multifunction: bool
    direct: bool = False
    clique: int | None = None


@dataclass(frozen=True)
class Plan:
    """A guest. ``holes`` are addresses without RAM, ``low_mib`` where RAM below 4 GiB ends."""

    wish: Wish
    cells: tuple[Cell, ...]
    roots: tuple[Root, ...]
    ports: tuple[Port, ...]
    devices: tuple[Device, ...]
    iommufd: bool
    holes: tuple[tuple[int, int], ...]
    low_mib: int | None
    mmio_mib: int
    maker: str | None
    losses: tuple[str, ...]
    steps: tuple[str, ...]

    def place(self, device: Device) -> Place:
        """Where the guest has a function."""
        ports = {one.name: one for one in self.ports}
        chain, bus = [], device.bus
        while bus in ports:
            chain.append(bus)
            bus = ports[bus].bus
        root = next(one for one in self.roots if one.name == bus)
        return Place(root.name, root.cell, tuple(reversed(chain)))


def host_bridge(function: Function) -> str:
    """The host bridge above a function: domain and bus of what is on its root bus."""
    top = function.bridges[0] if function.bridges else function.address
    return top.rpartition(":")[0]


def host_place(survey: Survey, address: str) -> Place:
    """Where the host has a function."""
    one = survey.functions[address]
    return Place(host_bridge(one), one.node, one.bridges)


def plan(survey: Survey, wish: Wish) -> Plan:
    """The guest for a wish; UsageError that names all that cannot work."""
    chosen = _chosen(survey, wish)
    if wrong := [text for one in chosen for text in _refused(survey, one, wish)]:
        raise UsageError(
            wrong[0][0] if len(wrong) == 1 else f"{len(wrong)} things cannot work",
            hint=wrong[0][1] if len(wrong) == 1 else None,
            detail=None if len(wrong) == 1 else "\n".join(f"{a}; {b}" for a, b in wrong),
        )
    losses: list[str] = []
    steps = [step for one in chosen for step in _steps(one, wish)]
    cells = _cells(survey, chosen, wish, losses)
    roots, ports, devices = _tree(survey, chosen, cells, losses)
    devices = _cliques(survey, devices, losses)
    direct = _direct(survey, chosen, wish, losses) if wish.direct_p2p else {}
    devices = [
        dataclasses.replace(one, direct=any(one.host in peers for peers in direct.values()))
        for one in devices
    ]
    if wish.must_direct_p2p and not direct:
        raise UsageError(
            "direct-p2p can be on below no switch", hint="see why", detail="\n".join(losses)
        )
    holes, low = _windows(survey, list(direct), losses)
    iommufd = wish.iommufd or bool(direct)
    if iommufd and not wish.iommufd and not all(one.direct for one in devices):
        losses.append("all functions are mapped by iommufd, since direct-p2p needs it for some")
    if direct:
        losses.append(
            "direct-p2p: the guest cannot be migrated, nor get functions by hotplug there"
        )
        if survey.direct_p2p != "Y":
            steps.append("echo Y > /sys/module/vfio_pci_core/parameters/direct_p2p")
    if any(survey.functions[one.host].is_nvswitch for one in devices):
        losses.append("NVSwitches: start Fabric Manager in the guest before any CUDA program")
    elif any(_is_gpu(one) for one in chosen) and any(
        one.is_nvswitch for one in survey.functions.values()
    ):
        losses.append(
            "the host has NVSwitches and the guest has none: no NVLink, unless Fabric Manager runs"
            " in its shared mode on the host, or in a service VM"
        )
    maker = _maker(survey)
    if wish.pmu and maker != "intel":
        losses.append(
            "event selectors are passed through on Intel's CPUs only; on AMD's the mediated PMU is"
            " all there is to switch on (kvm_amd.enable_mediated_pmu=Y)"
        )
    elif wish.pmu:
        steps.append("load kvm_intel with enable_mediated_pmu=Y")
    steps += [f"the guest's kernel needs the series {name}" for name in wish.guest_series]
    if wish.pages == "none":
        losses.append("without huge pages the IOMMU's and the CPU's TLBs miss more often")
    else:
        steps += _page_steps(cells, wish)
    return Plan(
        wish,
        tuple(cells),
        tuple(roots),
        tuple(ports),
        tuple(devices),
        iommufd,
        holes,
        low,
        _mmio_mib(chosen),
        maker,
        tuple(losses),
        tuple(dict.fromkeys(steps)),
    )


# --- what is asked for -----------------------------------------------------------------------


def _chosen(survey: Survey, wish: Wish) -> list[Function]:
    if not wish.functions:
        raise UsageError("no function is named", hint="name those of 'nearmetal doctor'")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", wish.name):
        raise UsageError(
            f"'{wish.name}' is no name of a guest", hint="use letters, digits, '.', '_' and '-'"
        )
    ends = [one.address for one in survey.functions.values() if not one.is_bridge]
    found: dict[str, Function] = {}
    for word in wish.functions:
        address = word if word.count(":") == 2 else f"0000:{word}"
        one = survey.functions.get(address.lower())
        if one is None:
            raise UsageError(
                f"the host has no PCI function {word}",
                hint=nearest(address, ends) if ends else "the survey has no functions",
            )
        if one.address in found:
            raise UsageError(f"{one.address} is named twice", hint="name each function once")
        found[one.address] = one
    return [found[address] for address in survey.functions if address in found]


def _refused(survey: Survey, one: Function, wish: Wish) -> list[tuple[str, str]]:
    """What is wrong with giving a function to the guest, each with what to do."""
    me = one.address
    if one.is_bridge:
        below = [each.address for each in survey.below(me) if not each.is_bridge]
        return [
            (
                f"{me} is a bridge, and cannot be given to a guest",
                f"name what is below it: {', '.join(below) or 'nothing is'}",
            )
        ]
    found = []
    if one.group is None or (one.vfio or "").startswith("noiommu"):
        found.append(
            (f"{me} has no IOMMU", "boot the host with intel_iommu=on, or turn it on in firmware")
        )
    if one.vfs:
        found.append(
            (
                f"{me} has {one.vfs} VFs, and VFIO gives it away only with a token",
                f"give VFs of it, or remove them: echo 0 > /sys/bus/pci/devices/{me}/sriov_numvfs",
            )
        )
    for address in one.bridges:
        bridge = survey.functions[address]
        if not bridge.readable:
            found.append(
                (f"registers of {address} above {me} were not read", "make the survey as root")
            )
        elif bridge.port_type not in (ROOT_PORT, UPSTREAM, DOWNSTREAM):
            found.append(
                (f"{me} is below {address}, which is no PCI Express port", "leave it to the host")
            )
    if one.parent and any(each.port_type == UPSTREAM for each in survey.children(one.parent)):
        found.append(
            (
                f"{me} is in the device of a switch's Upstream Port, which no guest can have",
                "leave it out: nobody needs to have it",
            )
        )
    for other in survey.functions.values():
        if one.group is None or other.group != one.group or other.is_bridge:
            continue
        if other.address in {me, *_addresses(wish)}:
            continue
        if other.owner != NOBODY and not _is_mine(other, wish):
            found.append(
                (
                    f"{me} shares IOMMU group {one.group} with {other.address} of {other.owner}",
                    f"give {other.address} to the guest too, or to vfio-pci; or turn on ACS of the"
                    " ports above",
                )
            )
    return found


def _addresses(wish: Wish) -> set[str]:
    return {(word if word.count(":") == 2 else f"0000:{word}").lower() for word in wish.functions}


def _is_mine(one: Function, wish: Wish) -> bool:
    return all(user.rpartition(" (")[0] == wish.name for user in one.users) and bool(one.users)


def _steps(one: Function, wish: Wish) -> list[str]:
    """What must be done with a function before the guest starts."""
    if one.users and not _is_mine(one, wish):
        return [f"{one.address} is in use by {one.owner}: end that first"]
    if one.driver != "vfio-pci" and not one.users:
        return [f"driverctl --nosave set-override {one.address} vfio-pci"]
    return []


# --- memory and CPUs -------------------------------------------------------------------------


def _cells(survey: Survey, chosen: Sequence[Function], wish: Wish, losses: list[str]) -> list[Cell]:
    nodes = sorted({one.node for one in chosen if one.node is not None})
    if not nodes:
        losses.append(
            "the host's firmware names no NUMA node for these functions: memory is not bound"
        )
    elif any(one.node is None for one in chosen):
        losses.append("some functions have no NUMA node on the host, and none in the guest")
    hosts: list[int | None] = [*nodes] or [None]
    if wish.pages not in PAGES:
        raise UsageError(
            f"there are no huge pages of {wish.pages}", hint=nearest(wish.pages, PAGES)
        )
    step = PAGES[wish.pages]
    many = len(hosts)
    if wish.cpus < 1 or wish.cpus % many:
        raise UsageError(
            f"{wish.cpus} vCPUs cannot be shared evenly by {many} NUMA nodes",
            hint=f"ask for {max(many, wish.cpus // many * many)}",
        )
    if wish.memory_mib < 1 or wish.memory_mib % (many * step):
        least = max(1, round(wish.memory_mib / (many * step))) * many * step
        raise UsageError(
            f"{wish.memory_mib} MiB cannot be shared evenly by {many} NUMA nodes in pages of"
            f" {wish.pages}",
            hint=f"ask for {least} MiB",
        )
    each = wish.cpus // many
    return [
        Cell(
            number,
            host,
            (number * each, (number + 1) * each - 1),
            wish.memory_mib // many,
            survey.cpus.get(host) if host is not None else None,
        )
        for number, host in enumerate(hosts)
    ]


def _page_steps(cells: Sequence[Cell], wish: Wish) -> list[str]:
    step = PAGES[wish.pages]
    found = []
    for cell in cells:
        where = "mm" if cell.host is None else f"devices/system/node/node{cell.host}"
        path = f"/sys/{'kernel/' if cell.host is None else ''}{where}/hugepages"
        found.append(
            f"echo {cell.memory_mib // step} > {path}/hugepages-{step * 1024}kB/nr_hugepages"
        )
    return found


# --- the tree --------------------------------------------------------------------------------


def _tree(
    survey: Survey, chosen: Sequence[Function], cells: Sequence[Cell], losses: list[str]
) -> tuple[list[Root], list[Port], list[Device]]:
    by_node = {cell.host: cell.number for cell in cells if cell.host is not None}
    bridges: dict[str, list[Function]] = {}
    for one in chosen:
        bridges.setdefault(host_bridge(one), []).append(one)
    roots: list[Root] = []
    ports: list[Port] = []
    devices: list[Device] = []
    bus_nr = _FIRST_BUS
    for number, (bus, below) in enumerate(bridges.items()):
        nodes = {one.node for one in below}
        node = next(iter(nodes)) if len(nodes) == 1 else None
        cell = by_node.get(node) if node is not None else None
        root = Root(f"pxb{number}", bus_nr, cell, bus)
        before = len(ports)
        roots.append(root)
        made: dict[str, str] = {}
        for one in below:
            at = root.name
            chain = list(one.bridges)
            top = chain[0] if chain else one.address
            if not chain or survey.functions[top].port_type == UPSTREAM:
                # QEMU takes nothing but ports and bridges on a pxb-pcie
                at = _port(ports, made, f"above {top[:-2]}", None, ROOT_PORT, at)
            for address in chain:
                kind = survey.functions[address].port_type
                assert kind is not None
                at = _port(ports, made, address, address, kind, at)
            devices.append(_device(len(devices), one, at, devices, losses))
        bus_nr += 1 + len(ports) - before
    if bus_nr > _BUSES:
        raise UsageError(
            f"the guest would need {bus_nr} buses, and has {_BUSES}",
            hint="give it fewer functions",
        )
    shared: dict[str, int] = {}
    for device in devices:
        shared[device.bus] = shared.get(device.bus, 0) + 1
    devices = [
        dataclasses.replace(one, multifunction=shared[one.bus] > 1 and one.function == 0)
        for one in devices
    ]
    return roots, ports, devices


def _port(
    ports: list[Port], made: dict[str, str], key: str, mirrors: str | None, kind: int, bus: str
) -> str:
    if key in made:
        return made[key]
    prefix = {ROOT_PORT: "rp", UPSTREAM: "up", DOWNSTREAM: "dn"}[kind]
    same = sum(one.kind == kind for one in ports)
    slot = 0 if kind == UPSTREAM else sum(one.bus == bus for one in ports)
    if slot > 31:
        raise UsageError(f"more than 32 ports below {bus}", hint="give the guest fewer functions")
    name = f"{prefix}{same}"
    ports.append(Port(name, kind, bus, slot, len(ports) + 1, mirrors))
    made[key] = name
    return name


def _device(
    number: int, one: Function, bus: str, devices: Sequence[Device], losses: list[str]
) -> Device:
    there = [each for each in devices if each.bus == bus]
    if len(there) == 8:
        raise UsageError(
            f"more than 8 functions are below the port of {one.address}",
            hint="give the guest at most 8 functions of one device",
        )
    function = len(there)
    if function != int(one.address[-1]):
        losses.append(f"{one.address} is function {function} of its device in the guest")
    return Device(f"hostdev{number}", one.address, bus, 0, function, False)


def _is_gpu(one: Function) -> bool:
    return one.vendor == _NVIDIA and one.class_code >> 16 == _DISPLAY


def _cliques(survey: Survey, devices: Sequence[Device], losses: list[str]) -> list[Device]:
    below: dict[str, list[str]] = {}
    for device in devices:
        one = survey.functions[device.host]
        if _is_gpu(one) and len(one.bridges) > 1:
            below.setdefault(one.bridges[0], []).append(one.address)
    groups = [members for members in below.values() if len(members) > 1]
    if len(groups) > _CLIQUES:
        losses.append(f"GPUs of {len(groups) - _CLIQUES} roots have no clique: there are 16")
    clique = {
        address: number for number, members in enumerate(groups[:_CLIQUES]) for address in members
    }
    gpus = [device for device in devices if _is_gpu(survey.functions[device.host])]
    if len(gpus) > 1 and (alone := [one.host for one in gpus if one.host not in clique]):
        losses.append(
            f"{', '.join(alone)}: no clique, as no other GPU is below the same root; between GPUs"
            " of different roots NCCL goes by the host's memory, or by NVLink"
        )
    # GeForce and RTX have the class of a VGA controller, those of servers that of a 3D controller
    vga = [one for one in clique if survey.functions[one].class_code >> 8 == 0x0300]
    if vga:
        losses.append(
            f"{', '.join(sorted(vga))}: GeForce GPUs in one clique were reported to give wrong data"
            " silently (NVIDIA/nccl issue 2335): check data before you use it"
        )
    return [dataclasses.replace(one, clique=clique.get(one.host)) for one in devices]


# --- direct peer-to-peer ---------------------------------------------------------------------


def _direct(
    survey: Survey, chosen: Sequence[Function], wish: Wish, losses: list[str]
) -> dict[str, set[str]]:
    """The switches below which it can be on, and the functions below each."""
    after = _with_guest(survey, chosen, wish)
    below: dict[str, set[str]] = {}
    for one in chosen:
        # QEMU takes the switch whose port is right above (hw/vfio/direct-p2p.c, find_switch)
        if len(one.bridges) < 3 or survey.functions[one.bridges[-2]].port_type != UPSTREAM:
            losses.append(f"no direct-p2p for {one.address}: it is below no switch")
            continue
        below.setdefault(one.bridges[-2], set()).add(one.address)
    found: dict[str, set[str]] = {}
    for switch, peers in below.items():
        if len(peers) == 1:
            losses.append(
                f"no direct-p2p for {next(iter(peers))}: the guest has nothing else right below the"
                f" switch {switch}"
            )
            continue
        why = obstacles.obstacles(after, after.functions[switch])
        if why:
            losses.append(
                f"no direct-p2p below {switch}: "
                + "; ".join(f"{one.address} {one.what} ({one.mend})" for one in why)
            )
        elif not survey.functions[switch].windows:
            losses.append(
                f"no direct-p2p below {switch}: the survey lacks the windows of the switch; save a"
                " new one"
            )
        else:
            found[switch] = peers
    return found


def _with_guest(survey: Survey, chosen: Sequence[Function], wish: Wish) -> Survey:
    """The host with the guest at work, as the rules of a claim see it."""
    functions = dict(survey.functions)
    for one in chosen:
        functions[one.address] = dataclasses.replace(
            one,
            driver="vfio-pci",
            vfio=one.vfio or "vfio",
            users=(wish.name,),
            by_group=False,
        )
    return dataclasses.replace(survey, functions=functions)


def _windows(
    survey: Survey, switches: Sequence[str], losses: list[str]
) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """What RAM must be kept out of: ranges above 4 GiB, and where it ends below (MiB)."""
    ranges: list[Bar] = []
    for switch in switches:
        one = survey.functions[switch]
        ranges += one.windows
        for other in (one, *survey.beside(one)):
            ranges += other.bars
    # in whole GiB, so that no RAM behind one is off from the pages of 1 GiB that it is made of
    high = sorted(
        (max(one.first // GIB * GIB, 4 * GIB), -(-(one.last + 1) // GIB) * GIB - 1)
        for one in ranges
        if one.is_high
    )
    low = [one.first for one in ranges if not one.is_high]
    joined: list[tuple[int, int]] = []
    for first, last in high:
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    if not low:
        return tuple(joined), None
    # QEMU's q35 ends RAM at 2 GiB or 2.75 GiB without it; a whole GiB keeps pages large
    end = min(2048, min(low) // MIB)
    end = end // 1024 * 1024 if end >= 1024 else end
    if end < 1:
        raise UsageError("a window of the switch begins below 1 MiB", hint="use another switch")
    return tuple(joined), end


def _mmio_mib(chosen: Sequence[Function]) -> int:
    """Room for 64-bit BARs: twice what they have, as alignment costs, and a power of two."""
    size = sum(bar.last - bar.first + 1 for one in chosen for bar in one.bars if bar.is_high)
    need = max(2 * size, 32 * GIB)
    power: int = 1 << (need - 1).bit_length()
    return power // MIB


def _maker(survey: Survey) -> str | None:
    """Whose CPU it is, by its root ports."""
    makers = {one.vendor for one in survey.functions.values() if one.port_type == ROOT_PORT}
    if makers & {_INTEL, _AMD} == {_INTEL}:
        return "intel"
    return "amd" if makers & {_INTEL, _AMD} == {_AMD} else None


__all__ = ["HOST", "Cell", "Device", "Plan", "Port", "Root", "Wish", "host_place", "plan"]
