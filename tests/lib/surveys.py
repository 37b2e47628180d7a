# SPDX-License-Identifier: GPL-2.0-or-later
"""Surveys of hosts, for the tests of what is said of them (data/topology/README.md)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nearmetal.probes import topology
from nearmetal.probes.topology import Function, Survey

DATA = Path(__file__).parents[1] / "unit" / "data" / "topology"
ROOT, SWITCH = "0000:00:05.0", "0000:01:00.0"
PORTS = ("0000:02:00.0", "0000:02:01.0", "0000:02:02.0")
PEER, DISK = "0000:03:00.0", "0000:04:00.0"


def recorded(name: str) -> Survey:
    """The emulated host."""
    return topology.parse((DATA / f"survey-{name}.txt").read_text())


def reduced(name: str) -> Survey:
    """A server."""
    return topology.parse((DATA / f"{name}.txt").read_text())


def changed(survey: Survey, address: str, **changes: Any) -> Survey:
    """A host with one function that differs."""
    one = dataclasses.replace(survey.functions[address], **changes)
    return dataclasses.replace(survey, functions={**survey.functions, address: one})


def with_(survey: Survey, *more: Function) -> Survey:
    """A host with functions added, in the order of addresses."""
    every = {**survey.functions, **{one.address: one for one in more}}
    return dataclasses.replace(survey, functions=dict(sorted(every.items())))


def claimable() -> Survey:
    """The host as it would have to be: both functions with vfio-pci, the third port no slot."""
    return changed(recorded("vfio"), PORTS[2], hotplug=False)
