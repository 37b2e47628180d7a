# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's hierarchies as lines."""

from __future__ import annotations

import pytest
from lib.surveys import PORTS, ROOT, changed, recorded, reduced, with_

from nearmetal.pci import acs
from nearmetal.probes import obstacles, ways
from nearmetal.probes.drawing import drawing, redirection
from nearmetal.probes.topology import Function

SERVERS = (
    "cascade-two-guests",
    "card-with-switch",
    "vf-of-nobody",
    "nvswitches",
    "nic-two-functions",
    "two-root-ports",
    "management-function",
)


def test_the_recorded_host() -> None:
    assert drawing(recorded("vfio")) == [
        "0000:00:05.0 1b36:000c root port, ACS SV+RR+CR+UF",
        "  0000:01:00.0 104c:8232 switch, Upstream Port",
        "    0000:02:00.0 104c:8233 port, ACS SV+RR+CR+UF (redirects)",
        "      0000:03:00.0 1b36:0010 class 010802, driver vfio-pci, group 12, "
        "owner sleep (pid 190), ATS absent, relaxed ordering off",
        "    0000:02:01.0 104c:8233 port, ACS SV+RR+CR+UF (redirects)",
        "      0000:04:00.0 1b36:0010 class 010802, driver vfio-pci, group 13, owner nobody, "
        "ATS on, relaxed ordering off",
        "    0000:02:02.0 104c:8233 port, ACS absent (direct: it has no ACS), empty hotplug slot",
    ]


def test_numa_nodes() -> None:
    """Each root port below its node, in the nodes' order; unknown ones at the end."""
    survey = changed(recorded("vfio"), ROOT, node=1)
    extra = []
    for number, node in ((6, None), (7, 0)):
        root = Function(
            f"0000:00:0{number}.0", class_code=0x060400, port_type=4, node=node, readable=True
        )
        extra += [root, Function(f"0000:0{number}:00.0", (root.address,), class_code=0x020000)]
    lines = drawing(with_(survey, *extra))
    heads = [(at, line) for at, line in enumerate(lines) if not line.startswith(" ")]
    assert [line for _, line in heads] == ["NUMA node 0", "NUMA node 1", "NUMA node unknown"]
    tops = [lines[at + 1].split()[0] for at, _ in heads]
    assert tops == ["0000:00:07.0", ROOT, "0000:00:06.0"]
    assert f"    {'0000:01:00.0'} 104c:8232 switch, Upstream Port" in lines


def test_several_domains_are_drawn_apart() -> None:
    survey = recorded("vfio")
    root = Function("0001:00:05.0", class_code=0x060400, port_type=4, readable=True)
    gpu = Function("0001:01:00.0", (root.address,), vendor=0x10DE, class_code=0x030200)
    lines = drawing(with_(survey, root, gpu))
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [ROOT, root.address]
    assert lines[-1].startswith("  0001:01:00.0 10de:0000 class 030200")


def test_what_kind_of_function_it_is() -> None:
    lines = "\n".join(drawing(reduced("management-function")))
    assert "\n  0000:01:00.1 11f8:4028 in the switch's device, class 058000" in lines
    assert lines.count("in the switch's device") == 1
    lines = "\n".join(drawing(reduced("nvswitches")))
    assert lines.count("10de:22a3 NVSwitch, class 068000") == 4
    lines = "\n".join(drawing(reduced("vf-of-nobody")))
    assert "0000:19:00.0 15b3:101b 2 VFs, class 020700" in lines
    assert "0000:19:00.2 15b3:101c VF of 0000:19:00.0, class 020700" in lines
    lines = "\n".join(drawing(reduced("cascade-two-guests")))
    assert lines.count("switch, Upstream Port, with a BAR of its own") == 4


@pytest.mark.parametrize("name", SERVERS)
def test_whatever_is_spoken_of_is_drawn_once(name: str) -> None:
    survey = reduced(name)
    drawn = [line.split()[0] for line in drawing(survey)]
    assert sorted(drawn) == sorted(survey.functions)
    for switch in survey.switches():
        for one in obstacles.obstacles(survey, switch):
            assert one.address in drawn
        for each in ways.exposed(survey, switch):
            assert {each.entry.address, each.egress.address} <= set(drawn)


def test_registers_that_were_not_read() -> None:
    lines = drawing(changed(recorded("vfio"), PORTS[0], readable=False, port_type=None))
    assert "    0000:02:00.0 104c:8233 bridge, its registers were not read" in lines


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (None, "direct: it has no ACS"),
        (acs.SV | acs.UF | acs.TB, "direct"),
        (acs.SV | acs.RR, "redirects in part"),
        (acs.RR | acs.CR, "redirects"),
        (acs.RR | acs.CR | acs.DT, "redirects, but translated requests"),
        (acs.RR | acs.CR | acs.DT | acs.TB, "redirects"),
        (acs.EC, "egress control, vector 0x6"),
    ],
)
def test_redirection(control: int | None, says: str) -> None:
    assert redirection(Function(PORTS[0], acs=control, egress_vector=6)) == says
