# SPDX-License-Identifier: GPL-2.0-or-later
"""Access Control Services: what a switch does with a request from one of its ports for another.

Rules are those of PCIe r7.0, 6.12.3 ("ACS P2P Control Interactions"), registers those of 7.7.11
(Linux: include/uapi/linux/pci_regs.h).
"""

from __future__ import annotations

from enum import StrEnum

SV, TB, RR, CR, UF, EC, DT = (1 << bit for bit in range(7))
"""ACS Control: Source Validation, Translation Blocking, P2P Request Redirect, P2P Completion
Redirect, Upstream Forwarding, P2P Egress Control, Direct Translated P2P. ACS Capability has the
same bits."""

REDIRECT = RR | CR


class Way(StrEnum):
    """The way of a request for a peer below another port of the switch."""

    DIRECT = "direct"
    """To the peer, past the IOMMU."""
    REDIRECTED = "redirected"
    """Up to the root complex, where the IOMMU checks it."""
    BLOCKED = "blocked"
    """Nowhere: an ACS Violation."""


def untranslated(control: int | None, vector_bit: bool = False) -> Way:
    """The way of a request with an untranslated address.

    ``control`` is ACS Control of the port at which it enters the switch, None if that has no ACS;
    ``vector_bit`` is the bit of that port's Egress Control Vector for the port at which it would
    leave the switch.
    """
    if control is None:
        return Way.DIRECT
    if control & EC:
        if not vector_bit:
            return Way.DIRECT
        return Way.REDIRECTED if control & RR else Way.BLOCKED
    return Way.REDIRECTED if control & RR else Way.DIRECT


def translated(control: int | None, vector_bit: bool = False) -> Way:
    """The way of a request whose address was translated by ATS; arguments as above.

    Translation Blocking precedes Direct Translated P2P.
    """
    if control is not None and control & TB:
        return Way.BLOCKED
    if control is not None and control & DT:
        return Way.DIRECT
    return untranslated(control, vector_bit)


def names(control: int) -> str:
    """The bits of an ACS Control Register by name, as ``SV+RR+CR+UF``; ``none`` for none."""
    bits = {SV: "SV", TB: "TB", RR: "RR", CR: "CR", UF: "UF", EC: "EC", DT: "DT"}
    return "+".join(name for bit, name in bits.items() if control & bit) or "none"
