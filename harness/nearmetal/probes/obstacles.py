# SPDX-License-Identifier: GPL-2.0-or-later
"""What a claim of direct peer-to-peer below a switch would be refused for, as far as sysfs shows.

The rules are those of the series direct-p2p: drivers/pci/direct-p2p.c and
drivers/vfio/pci/vfio_pci_direct_p2p.c in Linux, hw/vfio/direct-p2p.c in QEMU
(Documentation/driver-api/vfio-pci-direct-p2p.rst; docs/direct-p2p.md). Not seen from here: ports
that are external or untrusted, those with device-specific ACS, functions removed by sysfs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..pci import acs
from ..pci.config import DOWNSTREAM, UPSTREAM
from . import ways
from .topology import HOST, NOBODY, Function, Survey


@dataclass(frozen=True)
class Obstacle:
    """Something in the way of a claim: which function, what it is, and what to do.

    ``rule`` is the reason by which the kernel's log names it ("direct P2P: refused: ..."), or QEMU.
    """

    address: str
    rule: str
    what: str
    mend: str


def obstacles(survey: Survey, upstream: Function) -> list[Obstacle]:
    """What is in the way of a claim of this switch."""
    if not upstream.bridges:
        return [
            Obstacle(
                upstream.address,
                "no switch in common",
                "has no root port above it",
                "use a switch below a root port",
            )
        ]
    reachable = (upstream, *survey.beside(upstream), *survey.below(upstream.address))
    peers = _peers(reachable)
    parting = ways.ports_between(survey, [one.address for one in peers])
    if not parting:
        return [
            Obstacle(
                upstream.address,
                "no switch in common",
                "does not have two functions below different ports",
                "each peer needs a port of its own",
            )
        ]
    found: list[Obstacle] = []
    for one in reachable:
        if one.is_bridge:
            found += _of_bridge(survey, upstream, one)
        else:
            found += _of_function(survey, upstream, one)
    found += _unused_vfs(reachable)
    owners = sorted({one.owner for one in reachable if not one.is_bridge} - {NOBODY, HOST})
    if len(owners) > 1:
        found.append(
            Obstacle(
                upstream.address,
                "not the user's",
                f"is shared by {', '.join(owners)}",
                "give all functions below one switch to one guest",
            )
        )
    for port in parting:
        found += _of_parting(port)
    return found


def direct_ports(survey: Survey, upstream: Function) -> list[Function]:
    """The ports between those who would claim the switch that could redirect, and don't."""
    reachable = (*survey.beside(upstream), *survey.below(upstream.address))
    peers = _peers(reachable)
    return [
        port
        for port in ways.ports_between(survey, [one.address for one in peers])
        if (port.acs_capable or 0) & acs.REDIRECT == acs.REDIRECT
        and (port.acs or 0) & acs.REDIRECT != acs.REDIRECT
    ]


def no_peers(found: list[Obstacle]) -> bool:
    """Whether nothing can be claimed at a switch, because nobody's ways part there."""
    return [one.rule for one in found] == ["no switch in common"]


def _peers(reachable: Sequence[Function]) -> list[Function]:
    """Who would reach each other by a claim: a guest's functions, or all if it has no two yet."""
    functions = [one for one in reachable if not one.is_bridge]
    guests = {one.owner for one in functions} - {NOBODY, HOST}
    if len(guests) == 1:
        owned = [one for one in functions if one.owner in guests]
        if len({one.parent for one in owned}) > 1:
            return owned
    return functions


def _of_bridge(survey: Survey, upstream: Function, one: Function) -> Iterator[Obstacle]:
    if one.port_type not in (UPSTREAM, DOWNSTREAM):
        yield Obstacle(
            one.address,
            "a bridge that is not a switch port",
            "is a bridge but no switch port",
            "move the card that it is on to another switch",
        )
        return
    if one.address != upstream.address and one.bus == upstream.bus:
        yield Obstacle(
            one.address,
            "a second Upstream Port",
            "is a second Upstream Port",
            "use another switch; this one connects two hosts, or is partitioned",
        )
    if one.bars:
        inner = one.port_type == UPSTREAM and one.address != upstream.address
        yield Obstacle(
            one.address,
            "a port with a BAR",
            "is a port with a BAR of its own, which peers could reach",
            "it is a port of a card's own switch: move the card to another switch, or use the "
            "others without direct peer-to-peer"
            if inner
            else "look for a setting of the switch's firmware that turns the BAR off",
        )
    if one.port_type == DOWNSTREAM and one.hotplug and not survey.children(one.address):
        yield Obstacle(
            one.address,
            "an empty hotplug slot",
            "is an empty hotplug slot",
            "fill it, or turn hotplug off for it in the firmware",
        )


def _of_parting(port: Function) -> Iterator[Obstacle]:
    if (port.acs_capable or 0) & acs.REDIRECT != acs.REDIRECT:
        yield Obstacle(
            port.address,
            "a port without ACS redirection",
            "is a port without ACS redirection",
            "no claim is needed: this port always passes requests for peers directly; all below "
            "it can only go to one guest",
        )


def _of_function(survey: Survey, upstream: Function, one: Function) -> Iterator[Obstacle]:
    if one.readable and one.port_type is None:
        yield Obstacle(
            one.address,
            "a function that is not PCI Express",
            "is not a PCI Express function",
            "move the card that it is on to another switch",
        )
    if one.group is None or (one.vfio or "").startswith("noiommu"):
        yield Obstacle(
            one.address,
            "not behind an IOMMU",
            "has no IOMMU",
            "boot with intel_iommu=on or amd_iommu=on, without vfio's unsafe no-IOMMU mode",
        )
    if one.class_code >> 16 == 0x06 and not one.is_nvswitch:
        yield Obstacle(
            one.address,
            "a non-transparent bridge",
            f"is a non-transparent bridge (class {one.class_code:06x}) with devices behind it",
            "turn it off in the switch's firmware, or remove the card",
        )
    if one.owner == HOST:
        yield _of_host(upstream, one)
    elif one.owner == NOBODY and one.physfn is None:
        yield from _of_nobody(one)
    if one.vfs and one.vfs != (there := _vfs(survey, one)):
        yield Obstacle(
            one.address,
            "a VF that is not known",
            f"has {one.vfs} VFs, of which the kernel knows {there}",
            f"remove and recreate them: echo 0 > /sys/bus/pci/devices/{one.address}/sriov_numvfs",
        )
    if one.by_group:
        yield Obstacle(
            one.address,
            "not the user's",
            f"was opened by its group ({one.owner})",
            "give vfio-pci iommufd=…: a claim takes functions of an iommufd context",
        )
    low = [bar for bar in one.bars if bar.could_be_pinned and not bar.is_high]
    if low:
        yield Obstacle(
            one.address,
            "a BAR below 4 GiB",
            f"has a 64-bit BAR at {low[0].first:#x}, below 4 GiB",
            "turn on decoding above 4 GiB in the firmware",
        )


_MANAGEMENT = (0x0107, 0x0580, 0x0880)
"""Classes that endpoints inside a switch have, by which it is managed: SAS (Broadcom's), memory
controller (Microchip's), system peripheral (PLX's)."""


def _of_host(upstream: Function, one: Function) -> Obstacle:
    kind = ""
    mend = f"give it to vfio-pci: driverctl --nosave set-override {one.address} vfio-pci"
    if one.is_nvswitch:
        kind = "an NVSwitch and "
        mend += "; the guest then needs Fabric Manager"
    elif one.vendor == upstream.vendor and one.class_code >> 8 in _MANAGEMENT:
        kind = "a management function of the switch and "
        mend += "; it needs no user, and the switch's management tools do without it meanwhile"
    elif one.physfn:
        mend = f"give it to the guest, or remove the VFs: {_no_vfs(one.physfn)}"
    elif one.vfs:
        mend = (
            "a claim needs the physical function, too: give it to the guest as a whole, without "
            f"VFs ({_no_vfs(one.address)}), or use a NIC below another switch"
        )
    return Obstacle(
        one.address, "not the user's", f"is {kind}the host's (driver {one.driver})", mend
    )


def _of_nobody(one: Function) -> Iterator[Obstacle]:
    if one.is_nvswitch:
        yield Obstacle(
            one.address,
            "a non-transparent bridge",
            "is an NVSwitch that nobody uses",
            "give it to the guest that has the GPUs",
        )
    elif one.master or one.enabled:
        yield Obstacle(
            one.address,
            "enabled for nobody",
            "masters the bus for nobody" if one.master else "is enabled for nobody",
            "unbind and reset it, or give it to the guest",
        )


_MANY = 8
"""VFs of one function that are told one by one."""


def _unused_vfs(reachable: Sequence[Function]) -> Iterator[Obstacle]:
    unused: dict[str, list[Function]] = {}
    for one in reachable:
        if one.physfn is not None and one.owner == NOBODY:
            unused.setdefault(one.physfn, []).append(one)
    for physfn, vfs in unused.items():
        told, rest = (vfs[:1], len(vfs) - 1) if len(vfs) > _MANY else (vfs, 0)
        more = f", as are {rest} more of {physfn}" if rest else ""
        for one in told:
            yield Obstacle(
                one.address,
                "a VF that nobody uses",
                f"is a VF that nobody uses{more}: VFs decode addresses for as long as they exist",
                f"give it to the guest, or remove the VFs: {_no_vfs(physfn)}",
            )


def _no_vfs(physfn: str) -> str:
    return f"echo 0 > /sys/bus/pci/devices/{physfn}/sriov_numvfs"


def _vfs(survey: Survey, one: Function) -> int:
    return sum(1 for other in survey.functions.values() if other.physfn == one.address)
