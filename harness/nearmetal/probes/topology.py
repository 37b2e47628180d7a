# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's PCIe switches: who is below each, what its ports' ACS is, and what a direct
peer-to-peer claim there would meet.

``SURVEY`` prints what sysfs has of the functions; nothing is written. All else is pure. The rules
are those of the series direct-p2p (Documentation/driver-api/vfio-pci-direct-p2p.rst in Linux;
docs/direct-p2p.md), registers those of PCIe r7.0 as Linux names them (uapi/linux/pci_regs.h).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import MeasurementError
from ..machines.shell import Shell
from .routes import CR, EC, RR, names

SURVEY = r"""
cd /
for d in /sys/bus/pci/devices/*; do
  [ -e "$d/config" ] || continue
  cd -P "$d"; p=$PWD; r=${p#/sys/devices/pci*/}; cd /
  read -r class < "$d/class"; read -r vendor < "$d/vendor"; read -r device < "$d/device"
  echo "function ${d##*/}"
  echo "path $p"
  echo "id $vendor $device $class"
  for l in driver iommu_group physfn; do
    [ -e "$d/$l" ] && cd -P "$d/$l" && echo "$l ${PWD##*/}"
  done
  cd /
  [ -e "$d/sriov_numvfs" ] && read -r vfs < "$d/sriov_numvfs" && echo "vfs $vfs"
  for v in "$d"/vfio-dev/*; do [ -e "$v" ] && echo "vfio ${v##*/}"; done
  case $class,$r in
  0x0604*|*,*/*)
    while read -r first last flags; do echo "resource $first $last $flags"; done < "$d/resource"
    echo "config $(od -An -v -tx1 -w4096 "$d/config" | sed 's/\( 00\)*$//')" ;;
  esac
done
for f in $(find /proc/[0-9]*/fd -lname '/dev/vfio/*' -printf '%h=%l\n' 2>/dev/null | sort -u); do
  pid=${f#/proc/}; pid=${pid%%/*}
  echo "user $pid ${f#*=} $(tr '\0\n' '  ' < /proc/$pid/cmdline 2>/dev/null | cut -c 1-400)"
done
f=/sys/module/vfio_pci_core/parameters/direct_p2p
if [ -e $f ]; then echo "direct-p2p $(cat $f)"
elif [ -d /sys/module/vfio_pci_core ]; then echo "direct-p2p absent"
else echo "direct-p2p unknown"; fi
"""
"""Registers are read of bridges, and of functions behind one; zeros at their end are left out."""

_ADDRESS = re.compile(r"^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")

_CAP_PCIE, _CAP_ACS, _CAP_ATS = 0x10, 0x0D, 0x0F
_UPSTREAM, _DOWNSTREAM = 5, 6
_REDIRECT = RR | CR

_MEM, _MEM_64, _PREFETCH = 0x200, 0x100000, 0x2000
"""IORESOURCE_MEM, IORESOURCE_MEM_64, IORESOURCE_PREFETCH (Linux, include/linux/ioport.h)"""
_GIB4 = 1 << 32


@dataclass(frozen=True)
class Bar:
    """Addresses that a function, or a bridge itself, answers to."""

    first: int
    last: int
    flags: int

    @property
    def is_high(self) -> bool:
        """Whether it is above 4 GiB."""
        return self.first >= _GIB4

    @property
    def could_be_pinned(self) -> bool:
        """Whether it is a 64-bit prefetchable one, as GPUs' and NICs' memory is."""
        return bool(self.flags & _MEM and self.flags & _MEM_64 and self.flags & _PREFETCH)


@dataclass(frozen=True)
class Function:
    """A PCI function of the host. What its registers would say is None where it lacks them.

    ``bridges`` are the addresses of the bridges above it, from the root on. ``acs_capable`` and
    ``acs`` are ACS Capability and ACS Control, ``ats`` is whether ATS is enabled,
    ``relaxed_ordering`` Enable Relaxed Ordering of Device Control, ``master`` Bus Master Enable.
    ``vfio`` is its character device; ``users`` is who has that open, or that of its group
    (``by_group``).
    """

    address: str
    bridges: tuple[str, ...] = ()
    vendor: int = 0
    device: int = 0
    class_code: int = 0
    driver: str | None = None
    group: str | None = None
    vfs: int = 0
    physfn: str | None = None
    vfio: str | None = None
    users: tuple[str, ...] = ()
    by_group: bool = False
    bars: tuple[Bar, ...] = ()
    port_type: int | None = None
    hotplug: bool = False
    master: bool = False
    acs_capable: int | None = None
    acs: int | None = None
    ats: bool | None = None
    relaxed_ordering: bool | None = None

    @property
    def bus(self) -> str:
        """Domain and bus."""
        return self.address.rpartition(":")[0]

    @property
    def parent(self) -> str | None:
        """The bridge right above it."""
        return self.bridges[-1] if self.bridges else None

    @property
    def is_bridge(self) -> bool:
        """Whether it is a bridge to another bus."""
        return self.class_code >> 8 == 0x0604

    @property
    def ids(self) -> str:
        """Vendor and device as lspci -n writes them."""
        return f"{self.vendor:04x}:{self.device:04x}"

    @property
    def owner(self) -> str:
        """Who has it: ``the host`` (a driver), ``nobody``, or who has opened it by VFIO."""
        if self.users:
            return " and ".join(self.users)
        if self.vfio is not None or self.driver in (None, "pci-stub", "vfio-pci"):
            return NOBODY
        return HOST


HOST, NOBODY = "the host", "nobody"


@dataclass(frozen=True)
class Survey:
    """A host's functions by address. ``direct_p2p`` is the parameter of vfio_pci_core: ``Y``,
    ``N``, ``absent`` from a kernel without the series, ``unknown``."""

    functions: Mapping[str, Function] = field(default_factory=dict)
    direct_p2p: str = "absent"

    def below(self, bridge: str) -> list[Function]:
        """All functions below a bridge, bridges among them, in the order of their addresses."""
        return [one for one in self.functions.values() if bridge in one.bridges]

    def children(self, bridge: str) -> list[Function]:
        """The functions right below a bridge."""
        return [one for one in self.functions.values() if one.parent == bridge]

    def switches(self) -> list[Function]:
        """The Upstream Ports of switches."""
        return [one for one in self.functions.values() if one.port_type == _UPSTREAM]


# --- reading ---------------------------------------------------------------------------------


def survey(shell: Shell) -> Survey:
    """The functions of the host that ``shell`` is on."""
    return parse(shell.run(SURVEY, deadline_s=120).stdout)


def parse(text: str) -> Survey:
    """What ``SURVEY`` prints; MeasurementError for a line that it would not."""
    records: list[dict[str, str]] = []
    resources: dict[str, list[str]] = {}
    users: dict[str, set[str]] = {}
    direct_p2p = None
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "function":
            if not _ADDRESS.match(value):
                raise MeasurementError(f"'{value}' is no address of a PCI function")
            records.append({"function": value})
        elif key == "user":
            pid, path, command = (*value.split(" ", 2), "")[:3]
            users.setdefault(path, set()).add(_user(pid, command))
        elif key == "direct-p2p":
            direct_p2p = value
        elif not records:
            raise MeasurementError("the survey of the host's PCI functions begins with no function")
        elif key == "resource":
            resources.setdefault(records[-1]["function"], []).append(value)
        else:
            records[-1][key] = value
    if direct_p2p is None:
        raise MeasurementError("the survey of the host's PCI functions ends early")
    found = (_function(one, resources.get(one["function"], []), users) for one in records)
    return Survey({one.address: one for one in found}, direct_p2p)


def _user(pid: str, command: str) -> str:
    words = command.split()
    name = next((w for w in words if w.startswith("guest=")), "").removeprefix("guest=")
    program = words[0].rpartition("/")[2] if words else "a process"
    return f"{name.split(',')[0] or program} (pid {pid})"


def _function(
    record: Mapping[str, str], resources: Sequence[str], users: Mapping[str, set[str]]
) -> Function:
    address = record["function"]
    vendor, device, class_code = (int(word, 16) for word in record["id"].split())
    config = bytes.fromhex(record.get("config", ""))
    bridges = tuple(
        part for part in record["path"].split("/") if _ADDRESS.match(part) and part != address
    )
    bars = []
    for line in resources[: 2 if class_code >> 8 == 0x0604 else 6]:
        first, last, flags = (int(word, 16) for word in line.split())
        if flags & _MEM and last > first:
            bars.append(Bar(first, last, flags))
    group, vfio = record.get("iommu_group"), record.get("vfio")
    by_group = sorted(users.get(f"/dev/vfio/{group}", ())) if vfio is not None else []
    by_device = sorted(users.get(f"/dev/vfio/devices/{vfio}", ()))
    return Function(
        address=address,
        bridges=bridges,
        vendor=vendor,
        device=device,
        class_code=class_code,
        driver=record.get("driver"),
        group=group,
        vfs=int(record.get("vfs", "0")),
        physfn=record.get("physfn"),
        vfio=vfio,
        users=tuple(by_device or by_group),
        by_group=bool(by_group and not by_device),
        bars=tuple(bars),
        **registers(config),
    )


@dataclass(frozen=True)
class _Config:
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


def registers(config: bytes) -> dict[str, Any]:
    """What config space says of a function, by the names of ``Function``.

    Empty for a function whose config space was not read, or doesn't answer.
    """
    space = _Config(config.ljust(4096, b"\0"))
    # the first two words of a VF are all ones, too
    if len(config) < 64 or config[:64] == b"\xff" * 64:
        return {}
    found: dict[str, Any] = {"master": bool(space.word(0x04) & 0x04)}
    if (express := space.capability(_CAP_PCIE)) is not None:
        flags = space.word(express + 0x02)
        found["port_type"] = flags >> 4 & 0xF
        found["relaxed_ordering"] = bool(space.word(express + 0x08) & 0x10)
        # Slot Implemented, and Hot-Plug Capable of Slot Capabilities
        found["hotplug"] = bool(flags & 0x100 and space.long(express + 0x14) & 0x40)
    if (acs := space.extended(_CAP_ACS)) is not None:
        found["acs_capable"] = space.word(acs + 0x04)
        found["acs"] = space.word(acs + 0x06)
    if (ats := space.extended(_CAP_ATS)) is not None:
        found["ats"] = bool(space.word(ats + 0x06) & 0x8000)
    return found


# --- what is between functions ---------------------------------------------------------------


def diverge(survey: Survey, one: str, other: str) -> tuple[str, str] | None:
    """The two ports at which the ways to two functions part, or None where they share none."""
    for ours in reversed(survey.functions[one].bridges):
        for theirs in reversed(survey.functions[other].bridges):
            if survey.functions[ours].bus == survey.functions[theirs].bus:
                return (ours, theirs) if ours != theirs else None
    return None


def ports_between(survey: Survey, addresses: Sequence[str]) -> list[str]:
    """The ports at which functions diverge; of one alone the port above it."""
    found: set[str] = set()
    for index, one in enumerate(addresses):
        for other in addresses[:index]:
            found.update(diverge(survey, one, other) or ())
    if not found and len(addresses) == 1:
        found.update(survey.functions[addresses[0]].bridges[-1:])
    return sorted(found)


def state(survey: Survey, addresses: Sequence[str]) -> dict[str, str]:
    """ACS, ATS and relaxed ordering between functions, for the context of a measurement.

    ``acs``: ACS Control of the ports at which they diverge, as ``SV+RR+CR+UF``; ``absent`` for
    ports without, ``no-common-switch`` where they share none. ``ats``, ``relaxed_ordering``:
    ``on``, ``off``, ``absent`` of the functions. Where they differ, all are listed.
    """
    for address in addresses:
        if address not in survey.functions:
            raise MeasurementError(
                f"the host has no PCI function {address}",
                hint="'lspci -D' on the host has its functions; correct 'functions' of the tool",
            )
    chosen = [survey.functions[address] for address in addresses]
    ports = [survey.functions[address] for address in ports_between(survey, addresses)]
    return {
        "acs": _joined(acs_names(port) for port in ports) or "no-common-switch",
        "ats": _joined(_switched(one.ats) for one in chosen),
        "relaxed_ordering": _joined(_switched(one.relaxed_ordering) for one in chosen),
    }


def _joined(words: Iterable[str]) -> str:
    return "/".join(sorted(set(words)))


def _switched(value: bool | None) -> str:
    return "absent" if value is None else "on" if value else "off"


def acs_names(port: Function) -> str:
    """ACS Control of a port in words."""
    return "absent" if port.acs is None else names(port.acs)


# --- direct peer-to-peer ---------------------------------------------------------------------


@dataclass(frozen=True)
class Obstacle:
    """Something in the way of a claim: which function, what it is, and how to mend it."""

    address: str
    what: str
    mend: str


def obstacles(survey: Survey, upstream: Function) -> list[Obstacle]:
    """What the kernel would refuse a claim of a switch for, as far as sysfs shows it.

    Not seen from here: ports that are external or untrusted, and those with device-specific ACS.
    """
    found: list[Obstacle] = []
    below = survey.below(upstream.address)
    siblings = [
        one
        for one in survey.functions.values()
        if one.bus == upstream.bus and one.address != upstream.address and upstream.bridges
    ]
    if not upstream.bridges:
        found.append(
            Obstacle(upstream.address, "has no root port above it", "none: it is on the root bus")
        )
    for one in (upstream, *siblings, *below):
        if one.is_bridge:
            found += _of_bridge(survey, upstream, one)
        else:
            found += _of_function(one)
    functions = [one for one in (*siblings, *below) if not one.is_bridge]
    owners = sorted({one.owner for one in functions} - {NOBODY, HOST})
    if len(owners) > 1:
        found.append(
            Obstacle(
                upstream.address,
                f"is shared by {', '.join(owners)}",
                "give all functions below one switch to one guest",
            )
        )
    members = [one.address for one in below if not one.is_bridge]
    parting = ports_between(survey, members) if len(members) > 1 else []
    for address in parting:
        port = survey.functions[address]
        if port.port_type == _DOWNSTREAM and (port.acs_capable or 0) & _REDIRECT != _REDIRECT:
            found.append(
                Obstacle(address, "is a port without ACS redirection", "none: use another switch")
            )
    if not parting:
        found.append(
            Obstacle(
                upstream.address,
                "has no two functions below different ports",
                "none: peers need a port each",
            )
        )
    return found


def _of_bridge(survey: Survey, upstream: Function, one: Function) -> list[Obstacle]:
    found = []
    if one.port_type not in (_UPSTREAM, _DOWNSTREAM):
        found.append(Obstacle(one.address, "is a bridge but no switch port", "remove it"))
        return found
    if one.address != upstream.address and one.bus == upstream.bus:
        found.append(Obstacle(one.address, "is a second Upstream Port", "none"))
    if one.bars:
        found.append(
            Obstacle(
                one.address,
                "is a port with a BAR of its own, which peers could reach",
                "a setting of the switch's firmware may switch it off",
            )
        )
    if one.port_type == _DOWNSTREAM and one.hotplug and not survey.children(one.address):
        found.append(
            Obstacle(
                one.address,
                "is an empty hotplug slot",
                "fill it, or switch hotplug off for it in the firmware",
            )
        )
    return found


def _of_function(one: Function) -> list[Obstacle]:
    found = []
    if one.port_type is None:
        found.append(Obstacle(one.address, "is no PCI Express function", "remove it"))
    if one.class_code >> 16 == 0x06:
        found.append(Obstacle(one.address, "is a non-transparent bridge", "remove it"))
    if one.owner == HOST:
        found.append(
            Obstacle(
                one.address,
                f"is the host's (driver {one.driver})",
                f"give it to vfio-pci: driverctl set-override {one.address} vfio-pci",
            )
        )
    elif one.owner == NOBODY and one.master:
        found.append(
            Obstacle(
                one.address,
                "masters the bus for nobody",
                "unbind and reset it, or give it to the guest",
            )
        )
    if one.by_group:
        found.append(
            Obstacle(
                one.address,
                f"was opened by its group ({one.owner})",
                "give vfio-pci iommufd=…: a claim takes functions of an iommufd context",
            )
        )
    low = [bar for bar in one.bars if bar.could_be_pinned and not bar.is_high]
    if low:
        found.append(
            Obstacle(
                one.address,
                f"has a 64-bit BAR at {low[0].first:#x}, below 4 GiB",
                "switch on decoding above 4 GiB in the firmware",
            )
        )
    return found


# --- showing it ------------------------------------------------------------------------------

_PARAMETER = {
    "Y": "the kernel allows direct peer-to-peer",
    "N": "the kernel has it and does not allow it: "
    "echo Y > /sys/module/vfio_pci_core/parameters/direct_p2p",
    "absent": "the kernel lacks the series direct-p2p",
    "unknown": "vfio_pci_core shows no parameter direct_p2p: it is not loaded, or the kernel lacks"
    " the series",
}


def allowed(survey: Survey) -> str:
    """What the host's kernel says of direct peer-to-peer."""
    return _PARAMETER.get(survey.direct_p2p, f"vfio_pci_core.direct_p2p is {survey.direct_p2p}")


def drawing(survey: Survey, upstream: Function) -> list[str]:
    """A switch as lines: its ports with ACS, and the functions below with whom they belong to."""
    lines = [f"{upstream.address} {upstream.ids} switch, Upstream Port"]
    _draw(survey, upstream.address, "  ", lines)
    return lines


def _draw(survey: Survey, bridge: str, indent: str, lines: list[str]) -> None:
    for one in survey.children(bridge):
        if one.is_bridge:
            kind = {_UPSTREAM: "switch, Upstream Port", _DOWNSTREAM: "port"}.get(
                one.port_type or 0, "bridge"
            )
            words = [kind]
            if one.port_type == _DOWNSTREAM:
                words.append(f"ACS {acs_names(one)} ({redirection(one)})")
                if not survey.children(one.address):
                    words.append("empty hotplug slot" if one.hotplug else "empty")
        else:
            words = [
                f"class {one.class_code:06x}",
                f"driver {one.driver or 'none'}",
                f"group {one.group or 'none'}",
                f"owner {one.owner}",
                f"ATS {_switched(one.ats)}",
                f"relaxed ordering {_switched(one.relaxed_ordering)}",
            ]
            if one.physfn:
                words.insert(0, f"VF of {one.physfn}")
            if one.vfs:
                words.insert(0, f"{one.vfs} VFs")
        lines.append(f"{indent}{one.address} {one.ids} {', '.join(words)}")
        _draw(survey, one.address, indent + "  ", lines)


def redirection(port: Function) -> str:
    """What a downstream port does with requests for a peer."""
    if port.acs is None:
        return "direct: it has no ACS"
    if port.acs & EC:
        return "egress control"
    redirected = port.acs & _REDIRECT
    if redirected == _REDIRECT:
        return "redirects"
    return "direct" if not redirected else "redirects in part"


def exposed(survey: Survey, upstream: Function) -> list[str]:
    """Owners whose functions reach each other below a switch without the IOMMU, if there are two.

    Only ports that do not redirect requests count, and only owners that are somebody.
    """
    owners: dict[str, bool] = {}
    for one in survey.below(upstream.address):
        port = survey.functions.get(one.parent or "")
        if one.is_bridge or port is None or one.owner == NOBODY:
            continue
        direct = not (port.acs or 0) & RR
        owners[one.owner] = owners.get(one.owner, False) or direct
    return sorted(owners) if len(owners) > 1 and any(owners.values()) else []
