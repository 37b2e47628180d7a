# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's PCI functions, as sysfs has them: what is below which bridge, and whose it is.

``SURVEY`` is a script that prints it; it writes nothing. All else is pure: what it printed may come
from a host or from a file. Where the ways to functions part is in ``ways``, what a direct
peer-to-peer claim would meet in ``obstacles``, lines for people in ``drawing``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ..core.errors import MeasurementError
from ..machines.shell import Shell
from ..pci.config import UPSTREAM, Registers, registers

SURVEY = r"""
cd /
for d in /sys/bus/pci/devices/*; do
  [ -e "$d/config" ] || continue
  cd -P "$d"; p=$PWD; cd /
  r=${p##*/pci}; r=${r#*/}
  read -r class < "$d/class"; read -r vendor < "$d/vendor"; read -r device < "$d/device"
  echo "function ${d##*/}"
  echo "path $p"
  echo "id $vendor $device $class"
  for l in driver iommu_group physfn; do
    [ -e "$d/$l" ] && cd -P "$d/$l" && echo "$l ${PWD##*/}"
  done
  cd /
  for f in numa_node enable; do
    [ -e "$d/$f" ] && read -r value < "$d/$f" && echo "$f $value"
  done
  [ -e "$d/sriov_numvfs" ] && read -r vfs < "$d/sriov_numvfs" && echo "vfs $vfs"
  for v in "$d"/vfio-dev/*; do [ -e "$v" ] && echo "vfio ${v##*/}"; done
  case $class,$r in
  0x0604*|*,*/*)
    while read -r first last flags; do echo "resource $first $last $flags"; done < "$d/resource"
    echo "config $(od -An -v -tx1 -w4096 "$d/config" | sed 's/\( 00\)*$//')" ;;
  esac
done
for n in /sys/devices/system/node/node[0-9]*; do
  [ -e "$n/cpulist" ] && read -r cpus < "$n/cpulist" && echo "cpus ${n##*/node} $cpus"
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
_HOST_BRIDGE = re.compile(r"^pci[0-9a-f]{4,}:[0-9a-f]{2}$")

_MEM, _MEM_64, _PREFETCH = 0x200, 0x100000, 0x2000
"""IORESOURCE_MEM, IORESOURCE_MEM_64, IORESOURCE_PREFETCH (Linux, include/linux/ioport.h)"""
_GIB4 = 1 << 32
_FIRST_WINDOW = 7
"""Line of a bridge's first window: behind six BARs and the ROM (Linux, sysfs-bus-pci: resource)."""


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
class Function(Registers):
    """A PCI function of the host, with what its registers say.

    ``bridges`` are the addresses of the bridges above it, from the root on. ``vfio`` is its
    character device; ``users`` is who has that open, or that of its group (``by_group``).
    ``node`` is the NUMA node, None where the firmware doesn't say; ``enabled`` whether a driver, or
    somebody by sysfs, has enabled it.
    """

    address: str
    bridges: tuple[str, ...] = ()
    vendor: int = 0
    device: int = 0
    class_code: int = 0
    driver: str | None = None
    group: str | None = None
    node: int | None = None
    vfs: int = 0
    physfn: str | None = None
    enabled: bool = False
    vfio: str | None = None
    users: tuple[str, ...] = ()
    by_group: bool = False
    bars: tuple[Bar, ...] = ()
    windows: tuple[Bar, ...] = ()
    """Of a bridge: what it passes on to the bus below it."""

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
    def is_nvswitch(self) -> bool:
        """Whether it is an NVSwitch: NVIDIA's, with the class of other bridges."""
        return self.vendor == 0x10DE and self.class_code >> 8 == 0x0680

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
    """A host's functions by address, in its order. ``direct_p2p`` is the parameter of
    vfio_pci_core: ``Y``, ``N``, ``absent`` from a kernel without the series, ``unknown``. ``cpus``
    are the CPUs of the NUMA nodes, as ``0-31,64-95``."""

    functions: Mapping[str, Function] = field(default_factory=dict)
    direct_p2p: str = "absent"
    cpus: Mapping[int, str] = field(default_factory=dict)

    def below(self, bridge: str) -> list[Function]:
        """All functions below a bridge, bridges among them, in the order of their addresses."""
        return [one for one in self.functions.values() if bridge in one.bridges]

    def children(self, bridge: str) -> list[Function]:
        """The functions right below a bridge."""
        return [one for one in self.functions.values() if one.parent == bridge]

    def beside(self, upstream: Function) -> list[Function]:
        """The other functions of the device that an Upstream Port belongs to, VFs included.

        A link leads to one device, so these are all that are right below the same bridge.
        """
        if upstream.parent is None:
            return []
        return [one for one in self.children(upstream.parent) if one.address != upstream.address]

    def switches(self) -> list[Function]:
        """The Upstream Ports of switches."""
        return [one for one in self.functions.values() if one.port_type == UPSTREAM]


def survey(shell: Shell) -> Survey:
    """The functions of the host that ``shell`` is on."""
    return parse(shell.run(SURVEY, deadline_s=120).stdout)


def parse(text: str) -> Survey:
    """What ``SURVEY`` prints; lines with a # in front are comments.

    MeasurementError for a line that it would not print, and for a survey that is not whole.
    """
    records: list[dict[str, str]] = []
    resources: dict[str, list[str]] = {}
    users: dict[str, set[str]] = {}
    cpus: dict[int, str] = {}
    direct_p2p = None
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if not key or key.startswith("#"):
            continue
        if key == "function":
            if not _ADDRESS.match(value):
                raise MeasurementError(f"'{value}' is not the address of a PCI function")
            records.append({"function": value})
        elif key == "user":
            pid, path, command = (*value.split(" ", 2), "", "")[:3]
            users.setdefault(path, set()).add(_user(pid, command))
        elif key == "direct-p2p":
            direct_p2p = value
        elif key == "cpus":
            node, _, these = value.partition(" ")
            if not node.isdigit():
                raise MeasurementError(f"'{node}' is not a NUMA node of the survey")
            cpus[int(node)] = these
        elif not records:
            raise MeasurementError(
                "the survey of the host's PCI functions does not begin with a function"
            )
        elif key == "resource":
            resources.setdefault(records[-1]["function"], []).append(value)
        else:
            records[-1][key] = value
    if direct_p2p is None:
        raise MeasurementError("the survey of the host's PCI functions ends early")
    found: dict[str, Function] = {}
    for record in sorted(records, key=lambda one: _place(one["function"])):
        address = record["function"]
        if address in found:
            raise MeasurementError(f"the survey has the PCI function {address} twice")
        try:
            found[address] = _function(record, resources.get(address, []), users)
        except (KeyError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise MeasurementError(
                f"the survey's entry of the PCI function {address} is damaged: {why}"
            ) from None
    for one in found.values():
        if lacks := [bridge for bridge in one.bridges if bridge not in found]:
            raise MeasurementError(
                f"the survey has the PCI function {one.address}, and lacks {lacks[0]} above it"
            )
    return Survey(found, direct_p2p, cpus)


def _place(address: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in re.split("[:.]", address))


def _user(pid: str, command: str) -> str:
    """A process by the name of its guest (QEMU's -name), or by its program."""
    words = command.split()
    name = next((w for w in words if w.startswith("guest=")), "").removeprefix("guest=")
    if not name and "-name" in words[:-1]:
        name = words[words.index("-name") + 1]
    program = words[0].rpartition("/")[2] if words else "a process"
    return f"{name.split(',')[0] or program} (pid {pid})"


def _function(
    record: Mapping[str, str], resources: Sequence[str], users: Mapping[str, set[str]]
) -> Function:
    address = record["function"]
    vendor, device, class_code = (int(word, 16) for word in record["id"].split())
    is_bridge = class_code >> 8 == 0x0604
    bars, windows = [], []
    for number, line in enumerate(resources):
        first, last, flags = (int(word, 16) for word in line.split())
        if not flags & _MEM or last <= first:
            continue
        if number < (2 if is_bridge else 6):
            bars.append(Bar(first, last, flags))
        elif is_bridge and number >= _FIRST_WINDOW:
            windows.append(Bar(first, last, flags))
    group, vfio, node = record.get("iommu_group"), record.get("vfio"), record.get("numa_node")
    by_group = sorted(users.get(f"/dev/vfio/{group}", ())) if vfio is not None else []
    by_device = sorted(users.get(f"/dev/vfio/devices/{vfio}", ()))
    return Function(
        address=address,
        bridges=_bridges(record["path"], address),
        vendor=vendor,
        device=device,
        class_code=class_code,
        driver=record.get("driver"),
        group=group,
        node=None if node is None or int(node) < 0 else int(node),
        vfs=int(record.get("vfs", "0")),
        physfn=record.get("physfn"),
        enabled=int(record.get("enable", "0")) > 0,
        vfio=vfio,
        users=tuple(by_device or by_group),
        by_group=bool(by_group and not by_device),
        bars=tuple(bars),
        windows=tuple(windows),
        **asdict(registers(bytes.fromhex(record.get("config", "")))),
    )


def _bridges(path: str, address: str) -> tuple[str, ...]:
    """The bridges above a function, by its path in sysfs.

    Only those below the last host bridge: the domain of a VMD is below a function of another one.
    """
    parts = path.split("/")
    roots = [index for index, part in enumerate(parts) if _HOST_BRIDGE.match(part)]
    behind = parts[roots[-1] + 1 :] if roots else parts
    return tuple(part for part in behind if _ADDRESS.match(part) and part != address)


def anonymous(text: str) -> str:
    """What ``SURVEY`` printed without the command lines of who uses functions, for keeping."""
    lines = []
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "user":
            pid, path, command = (*value.split(" ", 2), "", "")[:3]
            if words := command.split():
                name = _user(pid, command).rpartition(" (")[0]
                line = f"user {pid} {path} {words[0]} guest={name}"
        lines.append(line)
    return "\n".join(lines) + "\n"


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


def need(survey: Survey, addresses: Iterable[str]) -> list[Function]:
    """The functions of these addresses; MeasurementError for one that the host lacks."""
    found = []
    for address in addresses:
        if address not in survey.functions:
            raise MeasurementError(
                f"the host has no PCI function {address}",
                hint="'lspci -D' on the host has its functions; correct 'functions' of the tool",
            )
        found.append(survey.functions[address])
    return found
