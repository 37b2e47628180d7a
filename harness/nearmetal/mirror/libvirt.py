# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan as domain XML of libvirt, 9.0 or newer.

What libvirt has no element for goes to QEMU by its own namespace: ``qemu:override`` for properties
of functions, ``qemu:commandline`` for the rest.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from ..pci.config import DOWNSTREAM, ROOT_PORT, UPSTREAM
from .plan import MIB, PAGES, Device, Plan
from .qemu import machine_options

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_MODELS = {
    ROOT_PORT: ("pcie-root-port", "pcie-root-port"),
    UPSTREAM: ("pcie-switch-upstream-port", "x3130-upstream"),
    DOWNSTREAM: ("pcie-switch-downstream-port", "xio3130-downstream"),
}


def xml(plan: Plan) -> str:
    """The domain, without disks, networks and consoles."""
    ET.register_namespace("qemu", _QEMU)
    domain = ET.Element("domain", type="kvm")
    ET.SubElement(domain, "name").text = plan.wish.name
    told = [f"First: {step}" for step in plan.steps] + [f"Note: {loss}" for loss in plan.losses]
    if plan.wish.pmu and plan.maker == "intel":
        # a second -accel is another choice, and -global does not reach accelerators
        told.append("Note: libvirt has no way to QEMU's -accel kvm,pmu-passthrough=on")
    if told:
        ET.SubElement(domain, "description").text = "\n".join(["", *told, ""])
    _memory(domain, plan)
    system = ET.SubElement(domain, "os", firmware="efi")
    ET.SubElement(system, "type", arch="x86_64", machine="q35").text = "hvm"
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    _cpu(domain, plan)
    devices = ET.SubElement(domain, "devices")
    buses = _controllers(devices, plan)
    for one in plan.devices:
        _hostdev(devices, one, buses[one.bus])
    ET.SubElement(devices, "memballoon", model="none")
    _words(domain, plan)
    _overrides(domain, plan)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _why(parent: ET.Element, text: str) -> None:
    parent.append(ET.Comment(f" {re.sub('-(?=-)', '- ', text)} "))


def _memory(domain: ET.Element, plan: Plan) -> None:
    wish = plan.wish
    ET.SubElement(domain, "memory", unit="MiB").text = str(wish.memory_mib)
    _why(domain, "Memory from the host's node of each NUMA node, all of it there from the start.")
    backing = ET.SubElement(domain, "memoryBacking")
    if wish.pages != "none":
        pages = ET.SubElement(backing, "hugepages")
        ET.SubElement(pages, "page", size=str(PAGES[wish.pages]), unit="MiB")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")
    ET.SubElement(backing, "allocation", mode="immediate")
    ET.SubElement(domain, "vcpu", placement="static").text = str(wish.cpus)
    if pins := [cell for cell in plan.cells if cell.host_cpus]:
        tune = ET.SubElement(domain, "cputune")
        for cell in pins:
            for vcpu in range(cell.cpus[0], cell.cpus[1] + 1):
                ET.SubElement(tune, "vcpupin", vcpu=str(vcpu), cpuset=str(cell.host_cpus))
    if bound := [cell for cell in plan.cells if cell.host is not None]:
        tune = ET.SubElement(domain, "numatune")
        for cell in bound:
            ET.SubElement(
                tune, "memnode", cellid=str(cell.number), mode="strict", nodeset=str(cell.host)
            )


def _cpu(domain: ET.Element, plan: Plan) -> None:
    _why(domain, "All address bits of the host, for large BARs; a socket for each NUMA node.")
    cpu = ET.SubElement(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
    each = plan.wish.cpus // len(plan.cells)
    ET.SubElement(cpu, "topology", sockets=str(len(plan.cells)), cores=str(each), threads="1")
    ET.SubElement(cpu, "maxphysaddr", mode="passthrough")
    numa = ET.SubElement(cpu, "numa")
    for cell in plan.cells:
        ET.SubElement(
            numa,
            "cell",
            id=str(cell.number),
            cpus=f"{cell.cpus[0]}-{cell.cpus[1]}",
            memory=str(cell.memory_mib),
            unit="MiB",
        )


def _controllers(devices: ET.Element, plan: Plan) -> dict[str, int]:
    """The buses by the names of the plan."""
    root = ET.SubElement(devices, "controller", type="pci", index="0", model="pcie-root")
    _why(root, "Room for 64-bit BARs.")
    ET.SubElement(root, "pcihole64", unit="KiB").text = str(plan.mmio_mib * MIB // 1024)
    _why(devices, "The host's PCI trees: a host bridge for each of its own, on the same NUMA node.")
    buses: dict[str, int] = {}
    for one in plan.roots:
        buses[one.name] = len(buses) + 1
        made = ET.SubElement(
            devices, "controller", type="pci", index=str(buses[one.name]), model="pcie-expander-bus"
        )
        _why(made, f"The host's bus {one.mirrors}.")
        ET.SubElement(made, "model", name="pxb-pcie")
        target = ET.SubElement(made, "target", busNr=str(one.bus_nr))
        if one.cell is not None:
            ET.SubElement(target, "node").text = str(one.cell)
    for port in plan.ports:
        buses[port.name] = len(buses) + 1
        model, name = _MODELS[port.kind]
        made = ET.SubElement(
            devices, "controller", type="pci", index=str(buses[port.name]), model=model
        )
        if port.mirrors:
            _why(made, f"The host's {port.mirrors}.")
        ET.SubElement(made, "model", name=name)
        if port.kind != UPSTREAM:
            ET.SubElement(made, "target", chassis=str(port.number), port=str(port.number))
        _address(made, buses[port.bus], port.slot, 0, False)
    return buses


def _address(parent: ET.Element, bus: int, slot: int, function: int, multifunction: bool) -> None:
    keys = {"type": "pci", "domain": "0x0000", "bus": f"{bus:#04x}"}
    keys |= {"slot": f"{slot:#04x}", "function": f"{function:#x}"}
    if multifunction:
        keys["multifunction"] = "on"
    ET.SubElement(parent, "address", keys)


def _hostdev(devices: ET.Element, one: Device, bus: int) -> None:
    made = ET.SubElement(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
    ET.SubElement(made, "driver", name="vfio")
    source = ET.SubElement(made, "source")
    domain, number, rest = one.host.split(":")
    slot, function = rest.split(".")
    ET.SubElement(
        source,
        "address",
        domain=f"0x{domain}",
        bus=f"0x{number}",
        slot=f"0x{slot}",
        function=f"0x{function}",
    )
    ET.SubElement(made, "alias", name=f"ua-{one.name}")
    _address(made, bus, one.slot, one.function, one.multifunction)


def _words(domain: ET.Element, plan: Plan) -> None:
    words = []
    if options := machine_options(plan):
        words += ["-machine", ",".join(options)]
    for one in plan.wish.globals:
        words += ["-global", one]
    words += ["-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={plan.mmio_mib}"]
    if plan.iommufd:
        words += ["-object", "iommufd,id=iommufd0"]
    _why(
        domain,
        "OVMF's window for 64-bit BARs; of nearmetal's series what was chosen, and with direct-p2p"
        " RAM that keeps out of the windows of the host's switches."
        + (
            " For iommufd add /dev/iommu and /dev/vfio/devices/* to cgroup_device_acl in qemu.conf."
            if plan.iommufd
            else ""
        ),
    )
    line = ET.SubElement(domain, f"{{{_QEMU}}}commandline")
    for word in words:
        ET.SubElement(line, f"{{{_QEMU}}}arg", value=word)


def _overrides(domain: ET.Element, plan: Plan) -> None:
    override = ET.Element(f"{{{_QEMU}}}override")
    for one in plan.devices:
        properties = []
        if plan.iommufd:
            properties.append(("iommufd", "string", "iommufd0"))
        if one.direct:
            properties.append(("direct-p2p", "bool", "true"))
        if one.clique is not None:
            properties.append(("x-nv-gpudirect-clique", "unsigned", str(one.clique)))
        if not properties:
            continue
        device = ET.SubElement(override, f"{{{_QEMU}}}device", alias=f"ua-{one.name}")
        frontend = ET.SubElement(device, f"{{{_QEMU}}}frontend")
        for name, kind, value in properties:
            ET.SubElement(
                frontend, f"{{{_QEMU}}}property", {"name": name, "type": kind, "value": value}
            )
    if len(override):
        _why(domain, "Properties of functions: peers by the switch, cliques of NVIDIA's driver.")
        domain.append(override)
