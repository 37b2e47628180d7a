# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's switches, on what an emulated one printed: data/topology/README.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from nearmetal.cli import doctor
from nearmetal.core.errors import MeasurementError
from nearmetal.probes import routes, topology
from nearmetal.probes.topology import Bar, Function, Survey

DATA = Path(__file__).parent / "data" / "topology"
ROOT, SWITCH = "0000:00:05.0", "0000:01:00.0"
PORTS = ("0000:02:00.0", "0000:02:01.0", "0000:02:02.0")
PEER, DISK = "0000:03:00.0", "0000:04:00.0"


def recorded(name: str) -> Survey:
    return topology.parse((DATA / f"survey-{name}.txt").read_text())


def changed(survey: Survey, address: str, **changes: Any) -> Survey:
    one = dataclasses.replace(survey.functions[address], **changes)
    return Survey({**survey.functions, address: one}, survey.direct_p2p)


def told(survey: Survey) -> list[str]:
    """What is in the way, as ``address what``."""
    found = topology.obstacles(survey, survey.functions[SWITCH])
    return [f"{one.address} {one.what}" for one in found]


def claimable() -> Survey:
    """The host as it would have to be: both functions with vfio-pci, the third port no slot."""
    return changed(recorded("vfio"), PORTS[2], hotplug=False)


# --- registers -------------------------------------------------------------------------------


def lspci() -> dict[str, tuple[str, bytes]]:
    """Of each function lspci's words, and its registers."""
    found = {}
    for block in re.split(r"\n\n", (DATA / "lspci.txt").read_text()):
        words = [line for line in block.splitlines() if not re.match(r"^[0-9a-f]+: ", line)]
        dump = [line for line in block.splitlines() if re.match(r"^[0-9a-f]+: ", line)]
        data = bytes.fromhex("".join(line.partition(": ")[2] for line in dump))
        found[words[0].split()[0]] = ("\n".join(words), data.ljust(4096, b"\0"))
    return found


_ACS_WORDS = {
    "SrcValid": routes.SV,
    "TransBlk": routes.TB,
    "ReqRedir": routes.RR,
    "CmpltRedir": routes.CR,
    "UpstreamFwd": routes.UF,
    "EgressCtrl": routes.EC,
    "DirectTrans": routes.DT,
}


def acs_of(words: str, which: str) -> int | None:
    line = re.search(rf"{which}:\t(.*)", words)
    if line is None:
        return None
    return sum(bit for word, bit in _ACS_WORDS.items() if f"{word}+" in line[1])


@pytest.mark.parametrize("address", [ROOT, SWITCH, *PORTS, PEER, DISK])
def test_registers_say_what_lspci_says(address: str) -> None:
    words, data = lspci()[address]
    found = topology.registers(data)
    kind = re.search(r"Express \(v2\) ([A-Za-z ]+?)[ ,(]*(?:\(Slot([+-])\))?, IntMsg", words)
    assert kind
    types = {"Endpoint": 0, "Root Port": 4, "Upstream Port": 5, "Downstream Port": 6}
    assert found["port_type"] == types[kind[1].strip()]
    assert found["hotplug"] == (kind[2] == "+" and "HotPlug+" in words)
    assert found["master"] == ("BusMaster+" in words)
    assert found["relaxed_ordering"] == ("RlxdOrd+" in words)
    assert found.get("acs_capable") == acs_of(words, "ACSCap")
    assert found.get("acs") == acs_of(words, "ACSCtl")
    ats = re.search(r"ATSCtl:\tEnable([+-])", words)
    assert found.get("ats") == (None if ats is None else ats[1] == "+")


def test_the_sample_has_something_to_tell() -> None:
    """Else the test above would compare nothing with nothing."""
    every = [topology.registers(data) for _, data in lspci().values()]
    assert {one.get("acs") for one in every} == {None, 0x1D}
    assert {one.get("ats") for one in every} == {None, True}
    assert {one["hotplug"] for one in every} == {True, False}
    assert {one["master"] for one in every} == {True, False}


def test_bits_that_the_sample_lacks() -> None:
    data = bytearray(lspci()[PORTS[0]][1])
    express = data.index(0x10, 0x90)
    data[express + 8] |= 0x10
    assert topology.registers(bytes(data))["relaxed_ordering"] is True
    data = bytearray(lspci()[DISK][1])
    data[0x107] &= 0x7F
    assert topology.registers(bytes(data))["ats"] is False


def test_config_space_that_does_not_answer_says_nothing() -> None:
    assert topology.registers(b"") == {}
    assert topology.registers(b"\xff" * 4096) == {}
    # as users other than root see it
    assert topology.registers(lspci()[PORTS[0]][1][:64]) == {"master": True}


def test_a_vf_answers_with_ones_for_its_ids() -> None:
    data = b"\xff\xff\xff\xff" + lspci()[DISK][1][4:]
    assert topology.registers(data)["ats"] is True


def test_zeros_at_the_end_may_be_left_out() -> None:
    for _, data in lspci().values():
        assert topology.registers(data.rstrip(b"\0")) == topology.registers(data)


def test_capability_lists_that_go_round_end() -> None:
    data = bytearray(4096)
    data[0:4], data[6], data[0x34] = b"\x86\x80\x01\x00", 0x10, 0x40
    data[0x40:0x42] = b"\x01\x40"
    data[0x100:0x104] = (0x1001_0003).to_bytes(4, "little")
    assert topology.registers(bytes(data)) == {"master": False}


# --- the survey ------------------------------------------------------------------------------


def test_survey() -> None:
    survey = recorded("host")
    disk = survey.functions[DISK]
    assert disk.bridges == (ROOT, SWITCH, PORTS[1])
    assert (disk.ids, disk.class_code, disk.driver, disk.group) == (
        "1b36:0010",
        0x010802,
        "nvme",
        "13",
    )
    assert [one.address for one in survey.switches()] == [SWITCH]
    assert [one.address for one in survey.children(SWITCH)] == list(PORTS)
    assert [one.first for one in survey.functions[PEER].bars] == [0xFE800000, 0x240000000]
    assert survey.functions[ROOT].bars
    assert not survey.functions[SWITCH].bars
    assert survey.direct_p2p == "unknown"


def test_owners() -> None:
    """The survey saw who has the character device open."""
    assert {recorded("host").functions[one].owner for one in (PEER, DISK)} == {"the host"}
    survey = recorded("vfio")
    assert survey.functions[PEER].owner == "sleep (pid 190)"
    assert survey.functions[DISK].owner == "nobody"


USERS = """\
function 0000:03:00.0
path /sys/devices/pci0000:00/0000:00:05.0/0000:03:00.0
id 0x10de 0x20b0 0x030200
driver vfio-pci
iommu_group 12
vfio vfio3
user 77 /dev/vfio/{device} /usr/bin/qemu-system-x86_64 -name guest=vm1,debug-threads=on -m 4G
user 78 /dev/vfio/vfio /usr/bin/other
direct-p2p N
"""


@pytest.mark.parametrize(("device", "by_group"), [("devices/vfio3", False), ("12", True)])
def test_a_guest_is_told_by_its_name(device: str, by_group: bool) -> None:
    (one,) = topology.parse(USERS.format(device=device)).functions.values()
    assert (one.owner, one.by_group) == ("vm1 (pid 77)", by_group)


@pytest.mark.parametrize(
    "driver", ["mlx5_vfio_pci", "nvgrace_gpu_vfio_pci", "vfio-pci", "pci-stub"]
)
def test_functions_that_wait_for_a_guest_are_nobody_s(driver: str) -> None:
    text = USERS.format(device="devices/vfio9").replace("driver vfio-pci", f"driver {driver}")
    if driver == "pci-stub":
        text = text.replace("vfio vfio3\n", "")
    (one,) = topology.parse(text).functions.values()
    assert one.owner == "nobody"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends early"),
        ("function 0000:03:00.0\npath /x\nid 0x1 0x2 0x3\n", "ends early"),
        ("path /x\n", "begins with no function"),
        ("function nonsense\n", "'nonsense' is no address"),
    ],
)
def test_survey_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(MeasurementError, match=says):
        topology.parse(text)


# --- the state between functions -------------------------------------------------------------


def test_functions_part_at_the_ports_of_their_switch() -> None:
    survey = recorded("host")
    assert topology.diverge(survey, PEER, DISK) == (PORTS[0], PORTS[1])
    assert topology.diverge(survey, PEER, "0000:00:01.0") is None
    assert topology.ports_between(survey, [DISK]) == [PORTS[1]]


def test_state_is_that_of_the_ports_between() -> None:
    survey = recorded("host")
    assert topology.state(survey, [PEER, DISK]) == {
        "acs": "SV+RR+CR+UF",
        "ats": "absent/on",
        "relaxed_ordering": "off",
    }
    direct = changed(survey, PORTS[0], acs=routes.SV | routes.UF | routes.TB)
    assert topology.state(direct, [PEER, DISK])["acs"] == "SV+RR+CR+UF/SV+TB+UF"
    assert topology.state(survey, [PEER, "0000:00:01.0"])["acs"] == "no-common-switch"
    none = changed(survey, PORTS[1], acs=None)
    assert topology.state(none, [DISK])["acs"] == "absent"


def test_state_of_a_function_that_is_not_there() -> None:
    with pytest.raises(MeasurementError, match=r"no PCI function 0000:99:00\.0"):
        topology.state(recorded("host"), ["0000:99:00.0"])


# --- direct peer-to-peer ---------------------------------------------------------------------


def test_nothing_in_the_way() -> None:
    assert told(claimable()) == []


def test_what_is_in_the_way_on_the_recorded_host() -> None:
    assert told(recorded("host")) == [
        f"{PORTS[2]} is an empty hotplug slot",
        f"{PEER} is the host's (driver nvme)",
        f"{DISK} is the host's (driver nvme)",
    ]


BRIDGE = {"class_code": 0x060400, "port_type": 7}
REGISTERS, MEMORY = 0x40200, 0x14220C


@pytest.mark.parametrize(
    ("address", "changes", "says"),
    [
        (PORTS[0], {"bars": (Bar(0xFE000000, 0xFE00FFFF, REGISTERS),)}, "a BAR of its own"),
        (SWITCH, {"bars": (Bar(0xFE000000, 0xFE00FFFF, REGISTERS),)}, "a BAR of its own"),
        (PORTS[0], {"acs_capable": None, "acs": None}, "without ACS redirection"),
        (PORTS[0], {"acs_capable": routes.SV | routes.RR}, "without ACS redirection"),
        (PORTS[2], {"hotplug": True}, "empty hotplug slot"),
        (PORTS[2], BRIDGE, "no switch port"),
        (PEER, {"port_type": None}, "no PCI Express function"),
        (PEER, {"class_code": 0x068000}, "non-transparent bridge"),
        (DISK, {"vfio": None, "driver": "nvme"}, "the host's (driver nvme)"),
        (DISK, {"master": True}, "masters the bus for nobody"),
        (PEER, {"by_group": True}, "opened by its group"),
        (DISK, {"users": ("vm2 (pid 9)",)}, "shared by sleep (pid 190), vm2 (pid 9)"),
        (PEER, {"bars": (Bar(0xC0000000, 0xCFFFFFFF, MEMORY),)}, "0xc0000000, below 4 GiB"),
    ],
)
def test_each_thing_in_the_way(address: str, changes: dict[str, Any], says: str) -> None:
    (found,) = told(changed(claimable(), address, **changes))
    assert says in found


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
    more = {one.address: one for one in (inner, port, third)}
    nested = Survey({**survey.functions, **more})
    assert told(nested) == [f"{PORTS[2]} is a port without ACS redirection"]
    assert told(changed(nested, PORTS[2], acs_capable=0x7F)) == []
    assert len(nested.switches()) == 2


def test_a_function_beside_the_upstream_port_counts() -> None:
    """It can be reached as well when redirection is off."""
    survey = claimable()
    beside = Function("0000:01:00.1", (ROOT,), driver="plx_dma", class_code=0x088000, port_type=0)
    more = Survey({**survey.functions, beside.address: beside}, "Y")
    assert told(more) == ["0000:01:00.1 is the host's (driver plx_dma)"]
    second = dataclasses.replace(beside, class_code=0x060400, port_type=5)
    more = Survey({**survey.functions, beside.address: second}, "Y")
    assert told(more) == ["0000:01:00.1 is a second Upstream Port"]


def test_a_function_alone_has_no_peer() -> None:
    functions = dict(changed(claimable(), PORTS[1], hotplug=False).functions)
    del functions[DISK]
    assert told(Survey(functions)) == [f"{SWITCH} has no two functions below different ports"]


def test_owners_that_reach_each_other_are_told() -> None:
    """Two owners below ports that do not redirect: nobody's functions do not count."""
    survey = claimable()
    switch = survey.functions[SWITCH]
    two = changed(survey, DISK, users=("vm2 (pid 9)",))
    assert topology.exposed(two, switch) == []
    open_ = changed(two, PORTS[1], acs=routes.SV | routes.UF)
    assert topology.exposed(open_, switch) == ["sleep (pid 190)", "vm2 (pid 9)"]
    assert topology.exposed(changed(open_, DISK, users=()), switch) == []
    found = doctor.switches(open_)
    assert [one.state for one in found if "without the IOMMU" in one.text] == ["broken"]


def test_drawing() -> None:
    survey = recorded("vfio")
    assert topology.drawing(survey, survey.functions[SWITCH]) == [
        "0000:01:00.0 104c:8232 switch, Upstream Port",
        "  0000:02:00.0 104c:8233 port, ACS SV+RR+CR+UF (redirects)",
        "    0000:03:00.0 1b36:0010 class 010802, driver vfio-pci, group 12, "
        "owner sleep (pid 190), ATS absent, relaxed ordering off",
        "  0000:02:01.0 104c:8233 port, ACS SV+RR+CR+UF (redirects)",
        "    0000:04:00.0 1b36:0010 class 010802, driver vfio-pci, group 13, owner nobody, "
        "ATS on, relaxed ordering off",
        "  0000:02:02.0 104c:8233 port, ACS absent (direct: it has no ACS), empty hotplug slot",
    ]


@pytest.mark.parametrize(
    ("acs", "says"),
    [
        (None, "direct: it has no ACS"),
        (routes.SV | routes.UF | routes.TB, "direct"),
        (routes.SV | routes.RR, "redirects in part"),
        (routes.RR | routes.CR, "redirects"),
        (routes.EC, "egress control"),
    ],
)
def test_redirection(acs: int | None, says: str) -> None:
    assert topology.redirection(Function(PORTS[0], acs=acs)) == says


def test_doctor_on_a_host_without_switches() -> None:
    assert [one.text for one in doctor.switches(Survey())] == ["no PCIe switch"]


def test_doctor_says_how_to_go_on() -> None:
    found = doctor.switches(claimable())
    assert [one.state for one in found] == ["ok", "ok"]
    assert "direct-p2p.md" in found[1].mend
    found = doctor.switches(recorded("host"))
    assert [one.state for one in found] == ["ok", "warn", "warn", "warn"]
    assert all(one.mend for one in found[1:])
