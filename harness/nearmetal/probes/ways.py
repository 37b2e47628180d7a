# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways between functions of a host: where they part, and what ACS makes of them there.

Which way a request for a peer takes is decided at one place: at the switch in which the ways to the
two functions part, by the Downstream Port through which the request enters it. Ports further down
only pass it upwards, whatever their ACS is; ports further up don't see it, or forward it if it was
redirected (Upstream Forwarding).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import MeasurementError
from ..pci import acs
from ..pci.acs import Way
from ..pci.config import DOWNSTREAM, UPSTREAM
from .topology import HOST, NOBODY, Function, Survey, need

NO_SWITCH = "no-common-switch"


@dataclass(frozen=True)
class Parting:
    """A switch at which the ways to two functions part: its Upstream Port, and for each of the two
    the Downstream Port that it is below. None for one in the device of the Upstream Port."""

    switch: Function
    first: Function | None
    second: Function | None

    @property
    def ports(self) -> list[Function]:
        """The Downstream Ports."""
        return [port for port in (self.first, self.second) if port is not None]


def parting(survey: Survey, one: str, other: str) -> Parting | None:
    """Where the ways to two functions part, None where that is no switch.

    That is so for functions below different root ports or host bridges, and for those right below
    one port (``port_above``).
    """
    ours, theirs = ((*survey.functions[each].bridges, each) for each in (one, other))
    common = _common(ours, theirs)
    if not common or len(common) in (len(ours), len(theirs)):
        return None
    bridge = survey.functions[common[-1]]
    first, second = survey.functions[ours[len(common)]], survey.functions[theirs[len(common)]]
    if bridge.port_type == UPSTREAM:
        ports = [port if port.port_type == DOWNSTREAM else None for port in (first, second)]
        return Parting(bridge, *ports)
    # a link leads to one device: to that of an Upstream Port, which may have other functions
    for upstream, chain, is_first in ((first, ours, True), (second, theirs, False)):
        if upstream.port_type == UPSTREAM and len(chain) > len(common) + 1:
            port = survey.functions[chain[len(common) + 1]]
            entry = port if port.port_type == DOWNSTREAM else None
            return Parting(upstream, entry, None) if is_first else Parting(upstream, None, entry)
    return None


def _common(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    found = []
    for mine, its in zip(ours, theirs, strict=False):
        if mine != its:
            break
        found.append(mine)
    return found


def port_above(survey: Survey, addresses: Sequence[str]) -> Function | None:
    """The port that all these functions are right below, None where there is none such."""
    above = {survey.functions[address].parent for address in addresses}
    (parent,) = above if len(above) == 1 else (None,)
    return None if parent is None else survey.functions[parent]


def ports_between(survey: Survey, addresses: Sequence[str]) -> list[Function]:
    """The Downstream Ports at which the ways between functions part, by address."""
    # functions right below one port are alike, and there may be hundreds: VFs
    alike = {survey.functions[address].bridges: address for address in addresses}
    found: dict[str, Function] = {}
    for one, other in itertools.combinations(alike.values(), 2):
        if at := parting(survey, one, other):
            found.update({port.address: port for port in at.ports})
    return [found[address] for address in sorted(found)]


def state(survey: Survey, addresses: Sequence[str]) -> dict[str, str]:
    """ACS, ATS and relaxed ordering between functions, for the context of a measurement.

    ``acs``: ACS Control of the ports at which their ways part, as ``SV+RR+CR+UF``; ``absent`` for
    ports without, ``no-common-switch`` for two functions that have no switch in common. Of
    functions that are all right below one port, and of one alone, that port's. ``ats``,
    ``relaxed_ordering``: ``on``, ``off``, ``absent`` of the functions. ``route`` is what the
    registers make of requests between them (``route``). Where they differ, all are listed.
    """
    chosen = need(survey, addresses)
    for one in chosen:
        _readable(survey, one)
    if (port := port_above(survey, addresses)) is not None:
        words = {acs_names(port)}
    else:
        words = {acs_names(port) for port in ports_between(survey, addresses)}
        pairs = itertools.combinations(addresses, 2)
        if not words or any(_apart(survey, one, two) for one, two in pairs):
            words.add(NO_SWITCH)
    return {
        "acs": _joined(words),
        "ats": _joined(switched(one.ats) for one in chosen),
        "relaxed_ordering": _joined(switched(one.relaxed_ordering) for one in chosen),
        "route": route(survey, addresses),
    }


ROOT_COMPLEX, BY_ATS, ONE_PORT, ALONE = "root-complex", "direct-by-ats", "one-port", "none"


def route(survey: Survey, addresses: Sequence[str]) -> str:
    """The ways of requests between functions, by the registers: all that there are, with ``/``.

    ``direct``, ``redirected`` and ``blocked`` are decided by ACS of the port at which a request
    enters the switch where the ways part. ``direct-by-ats``: only translated requests are direct,
    and the sender has ATS enabled. ``root-complex``: there is no switch in common; ``one-port``:
    both are right below one port; ``none``: there is one function alone.
    """
    found = {_route(survey, one, other) for one, other in itertools.permutations(addresses, 2)}
    return _joined(found or {ALONE})


def _route(survey: Survey, source: str, target: str) -> str:
    at = parting(survey, source, target)
    if at is None:
        return ONE_PORT if port_above(survey, (source, target)) else ROOT_COMPLEX
    if at.first is None:
        return Way.DIRECT
    plain = way(at.first, at.second)
    if plain is not Way.DIRECT and survey.functions[source].ats:
        vector_bit = _vector_bit(at.first, at.second)
        if acs.translated(at.first.acs, vector_bit) is Way.DIRECT:
            return BY_ATS
    return plain


def _readable(survey: Survey, function: Function) -> None:
    """MeasurementError if registers of a function below a port, or above it, were not read."""
    above = [survey.functions[address] for address in function.bridges]
    for one in (*above, *((function,) if above else ())):
        if not one.readable:
            raise MeasurementError(
                f"the config space of the PCI function {one.address} cannot be read",
                hint="it needs root; if it was root, the function may not respond",
            )


def _apart(survey: Survey, one: str, other: str) -> bool:
    """Whether two functions have neither a switch in common nor a port right above both."""
    return parting(survey, one, other) is None and port_above(survey, (one, other)) is None


def _joined(words: Iterable[str]) -> str:
    return "/".join(sorted(set(words)))


def switched(value: bool | None) -> str:
    """``on``, ``off``, or ``absent`` for what a function lacks."""
    return "absent" if value is None else "on" if value else "off"


def acs_names(port: Function) -> str:
    """ACS Control of a port in words."""
    return "absent" if port.acs is None else acs.names(port.acs)


# --- requests --------------------------------------------------------------------------------


def way(entry: Function, egress: Function | None) -> Way:
    """The way of a request that was not translated, from below one port of a switch.

    ``egress`` is the port that its target is below, None if that is in the Upstream Port's device.
    """
    return acs.untranslated(entry.acs, _vector_bit(entry, egress))


def _vector_bit(entry: Function, egress: Function | None) -> bool:
    number = None if egress is None else egress.port_number
    return number is not None and bool(entry.egress_vector >> number & 1)


def not_forwarding(survey: Survey, upstream: Function) -> list[Function]:
    """The Downstream Ports above a switch that don't forward what it has redirected.

    Without Upstream Forwarding such a request comes back to the port from which it came, and ends
    there as an Unsupported Request.
    """
    above = (survey.functions[address] for address in upstream.bridges)
    return [port for port in above if port.port_type == DOWNSTREAM and not (port.acs or 0) & acs.UF]


@dataclass(frozen=True)
class Exposure:
    """Requests of one owner that reach functions of another without the IOMMU.

    ``entry`` is where they enter the switch: a Downstream Port, or a function in the device of the
    Upstream Port, which sends them from there. ``egress`` is where they leave it, alike.
    """

    owner: str
    reached: str
    entry: Function
    egress: Function


def exposed(survey: Survey, upstream: Function) -> list[Exposure]:
    """Who reaches whom past the IOMMU through a switch, of all whose ways part at it.

    Owners that are nobody count neither as one nor as the other. What the host's drivers have in
    the device of the Upstream Port, as a switch's management function, is no danger to guests.
    """
    inside = {
        port.address: {
            one.owner for one in (port, *survey.below(port.address)) if not one.is_bridge
        }
        for port in survey.children(upstream.address)
    }
    beside = {one.address: {one.owner} for one in survey.beside(upstream) if not one.is_bridge}
    owners = {**inside, **beside}
    found = []
    for source, senders in owners.items():
        for target, receivers in owners.items():
            if source == target or (source in beside and target in beside):
                continue
            entry, egress = survey.functions[source], survey.functions[target]
            if way(entry, egress if target in inside else None) is not Way.DIRECT:
                continue
            found += [
                Exposure(owner, reached, entry, egress)
                for owner in sorted(senders - ({NOBODY, HOST} if source in beside else {NOBODY}))
                for reached in sorted(receivers - {NOBODY, owner})
            ]
    return found
