# SPDX-License-Identifier: GPL-2.0-or-later
"""Which way peer-to-peer bytes went: counters and ACS of the ports of an emulated switch.

The counters are in a vendor-specific extended capability of the downstream ports, so they are
read inside the host (docs/testbed.md; testbed series pcie-acs-routing, hw/pci/pcie_route.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..core.errors import MeasurementError
from ..machines.shell import Shell
from ..pci.acs import CR as CR
from ..pci.acs import DT as DT
from ..pci.acs import EC as EC
from ..pci.acs import RR as RR
from ..pci.acs import SV as SV
from ..pci.acs import TB as TB
from ..pci.acs import UF as UF
from ..pci.acs import names as names

_FIRST = 0x10
"""Offset of the first of the 64-bit counters in the capability."""


@dataclass(frozen=True)
class Routed:
    """Bytes of peer-to-peer requests by the way that they took, and of completions."""

    direct: int
    redirected: int
    translated: int
    violation: int
    unsupported: int
    completions_direct: int
    completions_redirected: int

    def __sub__(self, other: Routed) -> Routed:
        return Routed(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))

    def __add__(self, other: Routed) -> Routed:
        return Routed(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


NOTHING = Routed(*(0 for _ in fields(Routed)))


@dataclass(frozen=True)
class Ports:
    """The downstream ports of a switch that counts: ACS Control and counters by address."""

    acs: Mapping[str, int]
    routed: Mapping[str, Routed]

    @property
    def total(self) -> Routed:
        """The counters of all ports together."""
        return sum(self.routed.values(), NOTHING)


_REGISTERS = " ".join(
    f"ECAP0023+{_FIRST + 8 * number + half:x}.L" for number in range(7) for half in (4, 0)
)
_READ = """
for p in $(lspci -D -d 104c:8233 | cut -d' ' -f1); do
  found=$(setpci -s $p ECAP_ACS+6.W {registers} 2>/dev/null) || continue
  set -- $found
  echo $p $1 $2$3 $4$5 $6$7 $8$9 ${10}${11} ${12}${13} ${14}${15}
done
""".replace("{registers}", _REGISTERS)
"""One program a port: each setpci looks at all functions of the host first."""


def parse(listing: str) -> Ports:
    """What ``_READ`` prints: address, ACS Control and seven counters a port, all hexadecimal."""
    acs: dict[str, int] = {}
    routed: dict[str, Routed] = {}
    for line in listing.splitlines():
        words = line.split()
        if len(words) != 2 + len(fields(Routed)):
            raise MeasurementError("a port's counters cannot be read", detail=line)
        acs[words[0]] = int(words[1], 16)
        routed[words[0]] = Routed(*(int(word, 16) for word in words[2:]))
    return Ports(acs, routed)


def read(shell: Shell) -> Ports:
    """The ports of the host's switch; MeasurementError where none counts."""
    ports = parse(shell.run(_READ, deadline_s=60).stdout)
    if not ports.acs:
        raise MeasurementError(
            "no port of the emulated switch has routing counters",
            hint="the emulator lacks the testbed series pcie-acs-routing",
        )
    return ports


def set_acs(shell: Shell, ports: Ports, control: int) -> None:
    """Write ACS Control of every port; for set-ups of the testbed, never for a product."""
    for address in ports.acs:
        shell.run(f"setpci -s {address} ECAP_ACS+6.W={control:x}")
