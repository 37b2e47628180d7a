# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host has for tests: functions, tools, other machines, and what its emulator can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .inventory import Server, Tool
from .shell import Address

INSTRUCTIONS = "instructions"
"""A plugin of the emulator counts the instructions of each CPU of the host."""
ROUTES = "routes"
"""The emulated switch counts which way the bytes between its functions went."""
PCIE = "pcie"
"""The host has PCI Express."""
ARRANGED = "arranged"
"""The harness boots the host, with the IOMMU on or off, and may load modules anew."""

SERVER_HAS = frozenset({PCIE})
SERVER_LACKS: Mapping[str, str] = MappingProxyType(
    {
        INSTRUCTIONS: "only the testbed's emulated hardware can tell",
        ROUTES: "only the testbed's emulated hardware can tell",
        ARRANGED: "a server is measured as it is set up",
    }
)


@dataclass(frozen=True)
class Equipment:
    """What a host has. ``lacks`` are the reasons, by capability, for what it has not."""

    p2p: Mapping[str, str] = field(default_factory=dict)
    """PCI addresses for the p2p test: ``peer`` (with a controller memory buffer), ``disk``."""
    cascade: Mapping[str, str] = field(default_factory=dict)
    """The same for a second pair, of which the peer is one switch deeper than the disk; or none."""
    serials: Mapping[str, str] = field(default_factory=dict)
    """Serial numbers of both pairs' functions by PCI address; a guest sees the same."""
    assign: tuple[str, ...] = ()
    """PCI addresses of further functions for the guest."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """PCI addresses of functions that have a driver of their own for guests, by name."""
    machines: Mapping[str, Address] = field(default_factory=dict)
    """Other machines that tools run on."""
    tools: tuple[Tool, ...] = ()
    """Tools of others to measure with."""
    guest_cpus: int = 1
    guest_memory_mib: int = 1024
    guest_cpu: str = "host"
    """The model of a guest's CPUs, by QEMU's name."""
    testbed: str | None = None
    """The name of the emulator (machines.emulators), None on a server."""
    has: frozenset[str] = SERVER_HAS
    """Its capabilities."""
    lacks: Mapping[str, str] = field(default_factory=lambda: SERVER_LACKS)

    @property
    def has_nvme_pair(self) -> bool:
        """Whether it has what the p2p test moves data between by itself."""
        return "peer" in self.p2p and "disk" in self.p2p

    @property
    def assigned(self) -> list[str]:
        """PCI addresses of all functions that a guest gets."""
        pair = [self.p2p[key] for key in ("peer", "disk") if key in self.p2p]
        return list(dict.fromkeys((*pair, *self.assign)))

    def missing(self, needs: tuple[str, ...]) -> str | None:
        """The reason why it has not all of the capabilities, or None."""
        absent = [one for one in needs if one not in self.has]
        return self.lacks.get(absent[0], f"this host has no {absent[0]}") if absent else None


@dataclass(frozen=True)
class GuestShape:
    """What guests have otherwise than their host says; None: as it says."""

    cpus: int | None = None
    memory_mib: int | None = None
    cpu: str | None = None
    """The model of the CPUs, by QEMU's name."""

    @property
    def label(self) -> str:
        """All that is otherwise, such as ``cpus=2,memory=2048``; empty: nothing."""
        every = {"cpus": self.cpus, "memory": self.memory_mib, "cpu": self.cpu}
        return ",".join(f"{key}={value}" for key, value in every.items() if value is not None)

    def on(self, equipment: Equipment) -> Equipment:
        """A host's equipment with guests of this shape."""
        return replace(
            equipment,
            guest_cpus=self.cpus or equipment.guest_cpus,
            guest_memory_mib=self.memory_mib or equipment.guest_memory_mib,
            guest_cpu=self.cpu or equipment.guest_cpu,
        )


def of_server(server: Server) -> Equipment:
    """What the inventory says of a server."""
    return Equipment(
        p2p=server.p2p,
        assign=server.assign,
        functions=server.functions,
        machines=server.machines,
        tools=server.tools,
        guest_cpus=server.guest_cpus,
        guest_memory_mib=server.guest_memory_mib,
    )
