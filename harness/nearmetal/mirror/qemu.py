# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan as arguments of QEMU, in groups, each with the reason for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ..pci.config import DOWNSTREAM, ROOT_PORT, UPSTREAM
from .plan import PAGES, Device, Plan, Port, Root

_PORTS = {ROOT_PORT: "pcie-root-port", UPSTREAM: "x3130-upstream", DOWNSTREAM: "xio3130-downstream"}


@dataclass(frozen=True)
class Group:
    """Arguments that belong together, and why they are there; a line holds some of them."""

    why: str
    lines: tuple[tuple[str, ...], ...]


def machine_options(plan: Plan) -> list[str]:
    """The options of the machine by which RAM keeps out of the host's windows."""
    words = []
    if plan.low_mib is not None:
        words.append(f"max-ram-below-4g={plan.low_mib}M")
    if plan.holes:
        words.append("ram-holes=" + ":".join(f"{a:#x}-{b:#x}" for a, b in plan.holes))
    return words


def groups(plan: Plan) -> list[Group]:
    """The arguments; a disk, a network, a firmware and a monitor are the user's."""
    wish = plan.wish
    found = [
        Group(
            "The guest's name, by which 'nearmetal doctor' knows it.",
            (("-name", f"guest={wish.name}"),),
        )
    ]
    accel = "kvm,pmu-passthrough=on" if wish.pmu and plan.maker == "intel" else "kvm"
    options = machine_options(plan)
    why = "q35: functions lie below PCI Express ports."
    if options:
        why += (
            " RAM is kept out of the windows of the host's switches: a direct request for an"
            " address there goes to a peer."
        )
    if accel != "kvm":
        why += " Event selectors are passed through to the CPU (pmu-passthrough)."
    found.append(Group(why, (("-machine", ",".join(["q35", *options])), ("-accel", accel))))
    each = plan.cells[0].cpus[1] + 1
    found.append(
        Group(
            "The host's CPU with all its address bits, for large BARs; a socket a NUMA node.",
            (
                ("-cpu", "host,host-phys-bits=on"),
                ("-smp", f"{wish.cpus},sockets={len(plan.cells)},cores={each},threads=1"),
            ),
        )
    )
    found.append(_memory(plan))
    if wish.globals:
        found.append(
            Group(
                "Reads of config space without exits to QEMU (nearmetal's series).",
                tuple(("-global", word) for word in wish.globals),
            )
        )
    found.append(
        Group(
            "Room for 64-bit BARs: ACPI's window, and that of OVMF, which needs it in MiB"
            " (SeaBIOS finds its own).",
            (
                ("-global", f"q35-pcihost.pci-hole64-size={plan.mmio_mib}M"),
                ("-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={plan.mmio_mib}"),
            ),
        )
    )
    if plan.iommufd:
        why = "DMA is mapped by iommufd"
        why += ", which direct-p2p needs." if any(one.direct for one in plan.devices) else "."
        found.append(Group(why, (("-object", "iommufd,id=iommufd0"),)))
    found += [_root(plan, root) for root in plan.roots]
    return found


def _memory(plan: Plan) -> Group:
    wish = plan.wish
    why = "Memory of each NUMA node"
    if any(cell.host is not None for cell in plan.cells):
        why += ", from the same node of the host"
    if wish.pages != "none":
        why += f", in huge pages of {wish.pages}: fewer entries in the TLBs of CPU and IOMMU"
    lines: list[tuple[str, ...]] = [("-m", f"{wish.memory_mib}M")]
    for cell in plan.cells:
        words = ["memory-backend-memfd", f"id=mem{cell.number}", f"size={cell.memory_mib}M"]
        if wish.pages != "none":
            words += ["hugetlb=on", f"hugetlbsize={PAGES[wish.pages]}M"]
        words += ["share=on", "prealloc=on"]
        if cell.host is not None:
            words += [f"host-nodes={cell.host}", "policy=bind"]
        first, last = cell.cpus
        lines.append(("-object", ",".join(words)))
        lines.append(
            ("-numa", f"node,nodeid={cell.number},cpus={first}-{last},memdev=mem{cell.number}")
        )
    pins = [
        f"vCPUs {cell.cpus[0]}-{cell.cpus[1]} to {cell.host_cpus}"
        for cell in plan.cells
        if cell.host_cpus
    ]
    why += f". Pin {', '.join(pins)}." if pins else ". Pin vCPUs to the CPUs of their nodes."
    return Group(why, tuple(lines))


def _root(plan: Plan, root: Root) -> Group:
    ports = {one.name: one for one in plan.ports}

    def top(bus: str) -> str:
        while bus in ports:
            bus = ports[bus].bus
        return bus

    node = "" if root.cell is None else f",numa_node={root.cell}"
    lines = [
        ("-device", f"pxb-pcie,id={root.name},bus=pcie.0,bus_nr={root.bus_nr:#x}{node}"),
        *(("-device", _port(one)) for one in plan.ports if top(one.bus) == root.name),
        *(("-device", _device(plan, one)) for one in plan.devices if top(one.bus) == root.name),
    ]
    why = f"The tree below the host's bus {root.mirrors}"
    if root.cell is not None:
        why += f", on NUMA node {plan.cells[root.cell].host}"
    why += ", as it is there."
    mine = [one for one in plan.devices if top(one.bus) == root.name]
    if any(one.direct for one in mine):
        why += " Peers below one switch reach each other directly, at the host's addresses."
    if any(one.clique is not None for one in mine):
        why += " NVIDIA's driver takes peers from the clique: it does not know these switches."
    return Group(why, tuple(lines))


def _port(one: Port) -> str:
    words = [_PORTS[one.kind], f"id={one.name}", f"bus={one.bus}", f"addr={one.slot:x}"]
    if one.kind != UPSTREAM:
        words += [f"chassis={one.number}", f"slot={one.number}"]
    return ",".join(words)


def _device(plan: Plan, one: Device) -> str:
    words = ["vfio-pci", f"host={one.host}", f"id={one.name}", f"bus={one.bus}"]
    words.append(f"addr={one.slot:x}.{one.function:x}")
    if one.multifunction:
        words.append("multifunction=on")
    if plan.iommufd:
        words.append("iommufd=iommufd0")
    if one.direct:
        words.append("direct-p2p=on")
    if one.clique is not None:
        words.append(f"x-nv-gpudirect-clique={one.clique}")
    return ",".join(words)


def words(plan: Plan) -> list[str]:
    """The arguments as a list."""
    return [word for group in groups(plan) for line in group.lines for word in line]


def text(plan: Plan) -> str:
    """The arguments as an array of bash, with comments."""
    lines = [
        f"# Guest {plan.wish.name}, by 'nearmetal vm'. Use:",
        '#   . FILE; qemu-system-x86_64 "${args[@]}" -device virtio-blk-pci,bus=pcie.0,... ...',
        "# Devices of yours need bus=pcie.0: QEMU would put them on a pxb-pcie, which takes none.",
    ]
    lines += [f"# First: {step}" for step in plan.steps]
    lines += [f"# Note: {loss}" for loss in plan.losses]
    lines.append("args=(")
    for group in groups(plan):
        lines.append(f"  # {group.why}")
        lines += ["  " + shlex.join(line) for line in group.lines]
    return "\n".join([*lines, ")"]) + "\n"
