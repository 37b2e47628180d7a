# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the way of a claim of a switch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from lib.surveys import (
    DISK,
    PEER,
    PORTS,
    ROOT,
    SWITCH,
    changed,
    claimable,
    recorded,
    reduced,
    with_,
)

from nearmetal.pci import acs
from nearmetal.probes import obstacles
from nearmetal.probes.topology import Bar, Function, Survey

BRIDGE = {"class_code": 0x060400, "port_type": 7}
REGISTERS, MEMORY = 0x40200, 0x14220C


def told(survey: Survey, switch: str = SWITCH) -> list[str]:
    """What is in the way, as ``address what``."""
    found = obstacles.obstacles(survey, survey.functions[switch])
    assert all(one.mend and one.rule for one in found)
    return [f"{one.address} {one.what}" for one in found]


def rules(survey: Survey, switch: str) -> dict[str, str]:
    """The rule by which each address is in the way."""
    found = obstacles.obstacles(survey, survey.functions[switch])
    return {one.address: one.rule for one in found}


def test_nothing_in_the_way() -> None:
    assert told(claimable()) == []


def test_what_is_in_the_way_on_the_recorded_host() -> None:
    assert told(recorded("host")) == [
        f"{PORTS[2]} is an empty hotplug slot",
        f"{PEER} is the host's (driver nvme)",
        f"{DISK} is the host's (driver nvme)",
    ]


@pytest.mark.parametrize(
    ("address", "changes", "says", "rule"),
    [
        (
            PORTS[0],
            {"bars": (Bar(0xFE000000, 0xFE00FFFF, REGISTERS),)},
            "a BAR of its own",
            "a port with a BAR",
        ),
        (
            SWITCH,
            {"bars": (Bar(0xFE000000, 0xFE00FFFF, REGISTERS),)},
            "a BAR of its own",
            "a port with a BAR",
        ),
        (
            PORTS[0],
            {"acs_capable": None, "acs": None},
            "without ACS redirection",
            "a port without ACS redirection",
        ),
        (
            PORTS[0],
            {"acs_capable": acs.SV | acs.RR},
            "without ACS redirection",
            "a port without ACS redirection",
        ),
        (PORTS[2], {"hotplug": True}, "empty hotplug slot", "an empty hotplug slot"),
        (PORTS[2], BRIDGE, "no switch port", "a bridge that is not a switch port"),
        (
            PEER,
            {"port_type": None},
            "not a PCI Express function",
            "a function that is not PCI Express",
        ),
        (PEER, {"class_code": 0x068000}, "class 068000", "a non-transparent bridge"),
        (PEER, {"class_code": 0x060900}, "class 060900", "a non-transparent bridge"),
        (PEER, {"group": None}, "has no IOMMU", "not behind an IOMMU"),
        (PEER, {"vfio": "noiommu-vfio0"}, "has no IOMMU", "not behind an IOMMU"),
        (DISK, {"vfio": None, "driver": "nvme"}, "the host's (driver nvme)", "not the user's"),
        (DISK, {"master": True}, "masters the bus for nobody", "enabled for nobody"),
        (DISK, {"enabled": True}, "is enabled for nobody", "enabled for nobody"),
        (DISK, {"vfs": 4}, "has 4 VFs, of which the kernel knows 0", "a VF that is not known"),
        (PEER, {"by_group": True}, "opened by its group", "not the user's"),
        (
            DISK,
            {"users": ("vm2 (pid 9)",)},
            "shared by sleep (pid 190), vm2 (pid 9)",
            "not the user's",
        ),
        (
            PEER,
            {"bars": (Bar(0xC0000000, 0xCFFFFFFF, MEMORY),)},
            "0xc0000000, below 4 GiB",
            "a BAR below 4 GiB",
        ),
    ],
)
def test_each_thing_in_the_way(address: str, changes: dict[str, Any], says: str, rule: str) -> None:
    survey = changed(claimable(), address, **changes)
    (found,) = told(survey)
    assert says in found
    assert set(rules(survey, SWITCH).values()) == {rule}


def test_ports_of_a_switch_below_another_count_where_ways_part() -> None:
    """A switch in the third port, with one function: the ways part at the ports above it."""
    survey = claimable()
    above = survey.functions[PORTS[2]]
    chain = (*above.bridges, above.address)
    inner = dataclasses.replace(survey.functions[SWITCH], address="0000:05:00.0", bridges=chain)
    port = dataclasses.replace(
        survey.functions[PORTS[0]],
        address="0000:06:00.0",
        bridges=(*chain, inner.address),
        acs_capable=None,
        acs=None,
    )
    third = dataclasses.replace(
        survey.functions[DISK], address="0000:07:00.0", bridges=(*port.bridges, port.address)
    )
    nested = with_(survey, inner, port, third)
    assert told(nested) == [f"{PORTS[2]} is a port without ACS redirection"]
    assert told(changed(nested, PORTS[2], acs_capable=0x7F)) == []
    assert len(nested.switches()) == 2


def test_a_spare_function_s_port_counts_only_for_who_could_claim_it() -> None:
    """Two functions of one guest; a third, of nobody, below a port that redirects nothing."""
    survey = changed(claimable(), DISK, users=("sleep (pid 190)",))
    spare = dataclasses.replace(
        survey.functions[PEER],
        address="0000:05:00.0",
        bridges=(ROOT, SWITCH, PORTS[2]),
        users=(),
        vfio="vfio5",
    )
    assert told(with_(survey, spare)) == []
    of_it = dataclasses.replace(spare, users=("sleep (pid 190)",))
    assert told(with_(survey, of_it)) == [f"{PORTS[2]} is a port without ACS redirection"]


def test_a_function_beside_the_upstream_port_counts() -> None:
    """It can be reached as well when redirection is off."""
    beside = Function(
        "0000:01:00.1",
        (ROOT,),
        driver="plx_dma",
        class_code=0x088000,
        port_type=0,
        group="9",
        readable=True,
    )
    assert told(with_(claimable(), beside)) == ["0000:01:00.1 is the host's (driver plx_dma)"]
    second = dataclasses.replace(beside, class_code=0x060400, port_type=5)
    assert told(with_(claimable(), second)) == ["0000:01:00.1 is a second Upstream Port"]


def test_management_functions() -> None:
    """Of the switch's maker, in its device or below it."""
    (found,) = told(reduced("management-function"), "0000:01:00.0")
    assert found == (
        "0000:01:00.1 is a management function of the switch and the host's (driver switchtec)"
    )
    survey = changed(reduced("card-with-switch"), "0000:79:00.0", driver="mpt3sas")
    every = [one for one in told(survey, "0000:71:00.0") if "79:00.0" in one]
    assert every == [
        "0000:79:00.0 is a management function of the switch and the host's (driver mpt3sas)"
    ]
    assert "0000:79:00.0" not in rules(reduced("card-with-switch"), "0000:71:00.0")


def test_a_function_alone_has_no_peer() -> None:
    functions = dict(changed(claimable(), PORTS[1], hotplug=False).functions)
    del functions[DISK]
    survey = Survey(functions)
    assert told(survey) == [f"{SWITCH} does not have two functions below different ports"]
    assert obstacles.no_peers(obstacles.obstacles(survey, survey.functions[SWITCH]))


def test_a_switch_on_the_root_bus() -> None:
    survey = changed(claimable(), SWITCH, bridges=())
    assert told(survey) == [f"{SWITCH} has no root port above it"]


# --- servers ---------------------------------------------------------------------------------


def test_a_vf_that_nobody_uses() -> None:
    survey = reduced("vf-of-nobody")
    (found,) = obstacles.obstacles(survey, survey.functions["0000:16:00.0"])
    assert (found.address, found.rule) == ("0000:19:00.2", "a VF that nobody uses")
    assert "echo 0 > /sys/bus/pci/devices/0000:19:00.0/sriov_numvfs" in found.mend
    used = changed(survey, "0000:19:00.2", users=survey.functions["0000:18:00.0"].users)
    assert told(used, "0000:16:00.0") == []


def test_a_vf_of_the_host() -> None:
    survey = changed(reduced("vf-of-nobody"), "0000:19:00.2", driver="mlx5_core", vfio=None)
    (found,) = obstacles.obstacles(survey, survey.functions["0000:16:00.0"])
    assert (found.address, found.rule) == ("0000:19:00.2", "not the user's")
    assert "sriov_numvfs" in found.mend


def test_a_physical_function_that_the_host_keeps() -> None:
    survey = changed(
        reduced("vf-of-nobody"), "0000:19:00.0", driver="mlx5_core", vfio=None, users=()
    )
    found = obstacles.obstacles(survey, survey.functions["0000:16:00.0"])
    (kept,) = [one for one in found if one.address == "0000:19:00.0"]
    assert kept.rule == "not the user's"
    assert "physical function" in kept.mend


def test_many_vfs_of_nobody_are_told_in_one_line() -> None:
    survey = reduced("vf-of-nobody")
    pattern = survey.functions["0000:19:00.2"]
    more = [dataclasses.replace(pattern, address=f"0000:19:01.{n}") for n in range(8)]
    survey = changed(with_(survey, *more), "0000:19:00.0", vfs=10)
    (found,) = told(survey, "0000:16:00.0")
    assert "is a VF that nobody uses, as are 8 more of 0000:19:00.0" in found


def test_nvswitches() -> None:
    """Those of the guest are no obstacle; they are nobody's, the host's or another guest's else."""
    survey, switch, one = reduced("nvswitches"), "0000:03:00.0", "0000:05:00.0"
    assert set(rules(survey, switch).values()) == {"a port without ACS redirection"}
    redirecting = survey
    for port in survey.children(switch):
        redirecting = changed(redirecting, port.address, acs_capable=0x7F, acs=0x1D)
    assert told(redirecting, switch) == []
    unused = changed(redirecting, one, users=())
    assert told(unused, switch) == [f"{one} is an NVSwitch that nobody uses"]
    of_host = changed(unused, one, driver="nvidia", vfio=None)
    assert told(of_host, switch) == [f"{one} is an NVSwitch and the host's (driver nvidia)"]
    of_other = changed(redirecting, one, users=("vm2 (pid 9)",))
    assert told(of_other, switch) == [f"{switch} is shared by vm1 (pid 376), vm2 (pid 9)"]
    other_maker = changed(redirecting, one, vendor=0x11F8)
    (found,) = told(other_maker, switch)
    assert "a non-transparent bridge" in found


def test_servers_and_rules() -> None:
    cascade = reduced("cascade-two-guests")
    assert rules(cascade, "0000:09:00.0") == {
        **dict.fromkeys(
            ("0000:0d:00.0", "0000:11:00.0", "0000:17:00.0", "0000:1b:00.0"), "a port with a BAR"
        ),
        "0000:09:00.0": "not the user's",
    }
    assert rules(cascade, "0000:0b:00.0") == dict.fromkeys(
        ("0000:0d:00.0", "0000:11:00.0"), "a port with a BAR"
    )
    assert rules(cascade, "0000:0d:00.0") == {"0000:0d:00.0": "no switch in common"}
    nic = reduced("nic-two-functions")
    assert rules(nic, "0000:16:00.0") == {}
    assert rules(nic, "0000:19:00.0") == {"0000:19:00.0": "no switch in common"}
    card = reduced("card-with-switch")
    assert rules(card, "0000:71:00.0") == {
        "0000:73:00.0": "a port with a BAR",
        "0000:71:00.0": "not the user's",
    }


def test_ports_that_are_direct_already() -> None:
    survey = claimable()
    upstream = survey.functions[SWITCH]
    assert obstacles.direct_ports(survey, upstream) == []
    open_ = changed(survey, PORTS[1], acs=acs.SV | acs.UF)
    assert [one.address for one in obstacles.direct_ports(open_, upstream)] == [PORTS[1]]
    unable = changed(survey, PORTS[1], acs=None, acs_capable=None)
    assert obstacles.direct_ports(unable, upstream) == []
