# SPDX-License-Identifier: GPL-2.0-or-later
"""Each pair of a guest's functions: how far they are on the host, and in the guest."""

from __future__ import annotations

import itertools

from ..pci import acs
from ..probes import ways
from ..probes.topology import Survey
from .distances import MEANING, distance
from .plan import Plan, host_place


def explain(survey: Survey, plan: Plan) -> list[str]:
    """A line for each pair, and what the words mean.

    The way is that of an untranslated request from the first to the second: by what the guest asks
    for where it has direct-p2p, else by ACS of the host as it is.
    """
    rows = [("function", "function", "host", "guest", "request by")]
    for one, other in itertools.combinations(plan.devices, 2):
        rows.append(
            (
                one.host,
                other.host,
                distance(host_place(survey, one.host), host_place(survey, other.host)),
                distance(plan.place(one), plan.place(other)),
                _way(survey, plan, one.host, other.host),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    used = {word for row in rows[1:] for word in row[2:4]}
    lines += [f"{word}: {MEANING[word]}" for word in MEANING if word in used]
    return lines


def _way(survey: Survey, plan: Plan, one: str, other: str) -> str:
    at = ways.parting(survey, one, other)
    if at is None:
        return "the device" if ways.port_above(survey, (one, other)) else "the root complex"
    direct = {device.host for device in plan.devices if device.direct}
    switches = {survey.functions[each].bridges[-2:-1] for each in (one, other)}
    if {one, other} <= direct and switches == {(at.switch.address,)}:
        return "the switch (direct-p2p)"
    if at.first is None:
        return "the switch"
    return {
        acs.Way.DIRECT: "the switch",
        acs.Way.REDIRECTED: "the IOMMU",
        acs.Way.BLOCKED: "nothing: ACS blocks it",
    }[ways.way(at.first, at.second)]
