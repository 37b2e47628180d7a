# SPDX-License-Identifier: GPL-2.0-or-later
"""How far functions are from each other, in the words of ``nvidia-smi topo -m``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PIX, PXB, PHB, NODE, SYS = "PIX", "PXB", "PHB", "NODE", "SYS"
MEANING = {
    PIX: "one switch at most between them",
    PXB: "several switches, and no host bridge",
    PHB: "a host bridge",
    NODE: "host bridges of one NUMA node",
    SYS: "NUMA nodes",
}
"""The legend that nvidia-smi prints, shortened."""


@dataclass(frozen=True)
class Place:
    """Where a function is: the host bridge that it is below, the NUMA node of that, and from the
    root on the bridges above it."""

    host_bridge: str
    node: int | None
    bridges: Sequence[str]


def distance(one: Place, other: Place) -> str:
    """The distance of two functions. Two nodes that the firmware doesn't name count as one."""
    if one.node != other.node:
        return SYS
    if one.host_bridge != other.host_bridge:
        return NODE
    common = 0
    for mine, its in zip(one.bridges, other.bridges, strict=False):
        if mine != its:
            break
        common += 1
    if not common:
        return PHB
    # behind the bridge at which the ways part there is one port each, or the function itself
    return PIX if max(len(one.bridges), len(other.bridges)) - common <= 1 else PXB
