# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's PCI Express hierarchies as lines: NUMA nodes, ports with their ACS, whose what is."""

from __future__ import annotations

from ..pci import acs
from ..pci.acs import Way
from ..pci.config import DOWNSTREAM, ROOT_PORT, UPSTREAM
from .topology import Function, Survey
from .ways import acs_names, switched


def drawing(survey: Survey) -> list[str]:
    """All that is below root ports, and switches; the NUMA nodes in order, if they are known."""
    tops = [one for one in survey.functions.values() if not one.bridges and one.is_bridge]
    tops = [one for one in tops if survey.children(one.address)]
    nodes = sorted({one.node for one in tops}, key=lambda node: (node is None, node or 0))
    lines = []
    for node in nodes:
        indent = ""
        if nodes != [None]:
            lines.append("NUMA node unknown" if node is None else f"NUMA node {node}")
            indent = "  "
        for one in tops:
            if one.node == node:
                _draw(survey, one, indent, lines)
    return lines


def _draw(survey: Survey, one: Function, indent: str, lines: list[str]) -> None:
    words = _bridge(survey, one) if one.is_bridge else _function(survey, one)
    lines.append(f"{indent}{one.address} {one.ids} {', '.join(words)}")
    for child in survey.children(one.address):
        _draw(survey, child, indent + "  ", lines)


_PORTS = {ROOT_PORT: "root port", UPSTREAM: "switch, Upstream Port", DOWNSTREAM: "port"}


def _bridge(survey: Survey, one: Function) -> list[str]:
    if not one.readable:
        return ["bridge, its registers were not read"]
    words = [_PORTS.get(-1 if one.port_type is None else one.port_type, "bridge")]
    if one.port_type == ROOT_PORT:
        words.append(f"ACS {acs_names(one)}")
    if one.port_type == DOWNSTREAM:
        words.append(f"ACS {acs_names(one)} ({redirection(one)})")
        if not survey.children(one.address):
            words.append("empty hotplug slot" if one.hotplug else "empty")
    if one.bars and one.port_type in (UPSTREAM, DOWNSTREAM):
        words.append("with a BAR of its own")
    return words


def _function(survey: Survey, one: Function) -> list[str]:
    words = [
        f"class {one.class_code:06x}",
        f"driver {one.driver or 'none'}",
        f"group {one.group or 'none'}",
        f"owner {one.owner}",
        f"ATS {switched(one.ats)}",
        f"relaxed ordering {switched(one.relaxed_ordering)}",
    ]
    if one.vfs:
        words.insert(0, f"{one.vfs} VFs")
    if one.physfn:
        words.insert(0, f"VF of {one.physfn}")
    if one.is_nvswitch:
        words.insert(0, "NVSwitch")
    if one.parent and any(port.port_type == UPSTREAM for port in survey.children(one.parent)):
        words.insert(0, "in the switch's device")
    return words


def redirection(port: Function) -> str:
    """What a Downstream Port does with requests for a peer."""
    if port.acs is None:
        return "direct: it has no ACS"
    if port.acs & acs.EC:
        return f"egress control, vector {port.egress_vector:#x}"
    redirected = port.acs & acs.REDIRECT
    words = "direct" if not redirected else "redirects in part"
    if redirected == acs.REDIRECT:
        words = "redirects"
        if acs.translated(port.acs) is Way.DIRECT:
            words += ", but translated requests"
    return words
