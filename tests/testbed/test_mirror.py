# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``nearmetal vm`` writes, used as it is: a guest on the emulated host.

Without series and with all of them. The guest has the host's tree above its functions, and with
direct-p2p the bytes between them go by the host's switch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_direct_p2p_guest import SUBJECT, Place, on_config, place_for

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.measure import bench, p2p
from nearmetal.mirror import qemu
from nearmetal.mirror.distances import distance
from nearmetal.mirror.plan import Plan, Wish, host_place, plan
from nearmetal.probes import topology
from nearmetal.probes.topology import Survey

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

GLOBALS = ("q35-pcihost.config-cache=on", "q35-pcihost.ecam-map=on")


def _plan(survey: Survey, place: Place, **more: object) -> Plan:
    wish = Wish(
        tuple(place.parts.assigned), name="nearmetal-mirror", cpus=2, memory_mib=1024, pages="none"
    )
    return plan(survey, dataclasses.replace(wish, **more))  # type: ignore[arg-type]


def _above(survey: Survey, address: str) -> list[str]:
    """The ids of a function and of all bridges above it, from the root on."""
    one = survey.functions[address]
    return [survey.functions[each].ids for each in (*one.bridges, address)]


def _same_tree(host: Survey, made: Plan, guest: Guest) -> None:
    inside = topology.survey(guest.shell)
    (guest.console.path.parent / "lspci-tv").write_text(guest.shell.run("lspci -tv").stdout)
    nvmes = [one.address for one in inside.functions.values() if one.class_code >> 8 == 0x0108]
    ours = [one.host for one in made.devices]
    assert [_above(inside, one) for one in nvmes] == [_above(host, one) for one in ours]
    assert distance(*(host_place(inside, one) for one in nvmes)) == distance(
        *(host_place(host, one) for one in ours)
    )


def test_the_mirror_has_the_hosts_tree(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    config = on_config(conf)
    with place_for(conf, cache, config, tmp_path) as place:
        survey = topology.survey(place.host.shell)
        made = _plan(survey, place)
        parts = dataclasses.replace(place.parts, arguments=tuple(qemu.words(made)), extra=())
        with running_guest(place.host, parts, logs=tmp_path, label="plain") as guest:
            _same_tree(survey, made, guest)


def test_peers_in_the_mirror_reach_each_other_directly(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    config = on_config(conf)
    with place_for(conf, cache, config, tmp_path) as place:
        survey = topology.survey(place.host.shell)
        made = _plan(survey, place, direct_p2p=True, must_direct_p2p=True, globals=GLOBALS)
        parts = dataclasses.replace(place.parts, arguments=tuple(qemu.words(made)), extra=())
        row = bench.rows(place.host, SUBJECT)
        with running_guest(place.host, parts, logs=tmp_path, label="direct") as guest:
            _same_tree(survey, made, guest)
            rows = p2p.transfers(place.host, guest, p2p.DIRECT, row, tmp_path, "on")
    values = {one.name: one.values for one in rows}
    assert all(one.context["bars"] == "as-on-host" for one in rows)
    assert set(values["p2p.bytes_direct"]) == {2.0 * p2p.BYTES}
    assert set(values["p2p.bytes_redirected"]) == {0.0}
