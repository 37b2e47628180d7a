# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of a host's PCIe switches; each finding with what to do."""

from __future__ import annotations

from dataclasses import dataclass

from ..pci import acs
from ..probes import obstacles, topology, ways


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``state`` is ok, warn or broken; ``mend`` says what to do."""

    what: str
    state: str
    text: str
    mend: str = ""


def switches(survey: topology.Survey) -> list[Finding]:
    """For each PCIe switch: who reaches whom past the IOMMU, and what a claim would meet."""
    found = []
    if unread := [one for one in survey.functions.values() if one.is_bridge and not one.readable]:
        found.append(
            Finding(
                "switches",
                "warn",
                f"registers of {len(unread)} bridges were not read, of {unread[0].address} first: "
                "what is said about switches is incomplete",
                "run it as root",
            )
        )
    upstreams = survey.switches()
    if not upstreams:
        return found or [Finding("switches", "ok", "no PCIe switch")]
    found.append(Finding("direct-p2p", "ok", topology.allowed(survey)))
    for upstream in upstreams:
        found += _exposures(survey, upstream)
        found += _forwarding(survey, upstream)
        found += _claim(survey, upstream)
    return found


def _exposures(survey: topology.Survey, upstream: topology.Function) -> list[Finding]:
    by_owners: dict[tuple[str, str], list[ways.Exposure]] = {}
    for one in ways.exposed(survey, upstream):
        by_owners.setdefault((min(one.owner, one.reached), max(one.owner, one.reached)), []).append(
            one
        )
    found = []
    for (one_owner, other), every in by_owners.items():
        both = len({one.owner for one in every}) == 2
        text = (
            f"functions of {one_owner} and {other} reach each other without the IOMMU"
            if both
            else f"functions of {every[0].owner} reach those of {every[0].reached}"
            " without the IOMMU"
        )
        entries = {one.entry.address: one.entry for one in every}
        passes = ", ".join(f"{a} (ACS {ways.acs_names(p)})" for a, p in entries.items())
        mend = (
            "ACS P2P Request Redirect is off: look for what switched it off (pci=config_acs=, "
            "disable_acs_redir=, setpci)"
        )
        if all(one.acs is None for one in entries.values()):
            mend = "without ACS all below the switch can only go to one owner"
        elif any((one.acs or 0) & acs.EC for one in entries.values()):
            mend = "its Egress Control Vector lets them pass: a reset clears it to that"
        found.append(
            Finding(
                f"switch {upstream.address}", "broken", f"{text}: not redirected at {passes}", mend
            )
        )
    return found


def _forwarding(survey: topology.Survey, upstream: topology.Function) -> list[Finding]:
    """Where what a switch redirects ends at a port further up."""
    members = [one.address for one in survey.below(upstream.address) if not one.is_bridge]
    here = [
        port
        for port in survey.children(upstream.address)
        if port in ways.ports_between(survey, members) and (port.acs or 0) & acs.RR
    ]
    lost = ways.not_forwarding(survey, upstream)
    if not here or not lost:
        return []
    return [
        Finding(
            f"switch {upstream.address}",
            "warn",
            f"requests for peers that it redirects end at {lost[0].address} (ACS "
            f"{ways.acs_names(lost[0])}): Upstream Forwarding is off there",
            "Linux turns it on by default: look for what switched it off (pci=config_acs=, setpci)"
            if lost[0].acs is not None
            else "use the switch above it, or peers below the switch above",
        )
    ]


def _claim(survey: topology.Survey, upstream: topology.Function) -> list[Finding]:
    what = f"switch {upstream.address}"
    in_the_way = obstacles.obstacles(survey, upstream)
    if obstacles.no_peers(in_the_way):
        return [Finding(what, "ok", f"no direct peer-to-peer: {in_the_way[0].what}")]
    found = []
    direct = [
        one
        for one in obstacles.direct_ports(survey, upstream)
        if one.parent == upstream.address and not ways.exposed(survey, upstream)
    ]
    if direct:
        ports = ", ".join(f"{one.address} (ACS {ways.acs_names(one)})" for one in direct)
        found.append(
            Finding(
                what,
                "warn",
                f"requests for peers pass directly at {ports}",
                "by a claim; if there is none, pci=config_acs=, disable_acs_redir= or setpci: the "
                "kernel refuses claims where its parameters switch redirection off",
            )
        )
    for one in in_the_way:
        text = f"no direct peer-to-peer: {one.address} {one.what} [{one.rule}]"
        found.append(Finding(what, "warn", text, one.mend))
    if not in_the_way:
        found.append(
            Finding(
                what,
                "ok",
                "found no obstacle to direct peer-to-peer",
                "docs/direct-p2p.md says how to switch it on",
            )
        )
    return found
