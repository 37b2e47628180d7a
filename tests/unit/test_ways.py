# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the ways between functions part, and what ACS makes of them there."""

from __future__ import annotations

import dataclasses

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

from nearmetal.core.errors import MeasurementError
from nearmetal.pci import acs
from nearmetal.pci.acs import CR, DT, EC, RR, SV, TB, UF, Way
from nearmetal.probes import ways
from nearmetal.probes.topology import Function, Survey

REDIRECTS = SV | RR | CR | UF
DIRECT = SV | UF


# --- the rules of the specification (PCIe r7.0, 6.12.3) --------------------------------------


@pytest.mark.parametrize(
    ("control", "bit", "way"),
    [
        (None, False, Way.DIRECT),
        (0, False, Way.DIRECT),
        (SV | UF, False, Way.DIRECT),
        (CR, False, Way.DIRECT),
        (RR, False, Way.REDIRECTED),
        (RR, True, Way.REDIRECTED),
        (EC, False, Way.DIRECT),
        (EC, True, Way.BLOCKED),
        (EC | RR, False, Way.DIRECT),
        (EC | RR, True, Way.REDIRECTED),
        (TB, False, Way.DIRECT),
        (DT | RR, False, Way.REDIRECTED),
    ],
)
def test_requests_that_are_not_translated(control: int | None, bit: bool, way: Way) -> None:
    assert acs.untranslated(control, bit) is way


@pytest.mark.parametrize(
    ("control", "bit", "way"),
    [
        (None, False, Way.DIRECT),
        (RR, False, Way.REDIRECTED),
        (RR | DT, False, Way.DIRECT),
        (RR | EC | DT, True, Way.DIRECT),
        (RR | DT | TB, False, Way.BLOCKED),
        (TB, False, Way.BLOCKED),
        (EC, True, Way.BLOCKED),
    ],
)
def test_requests_that_ats_has_translated(control: int | None, bit: bool, way: Way) -> None:
    assert acs.translated(control, bit) is way


# --- where ways part -------------------------------------------------------------------------


def between(survey: Survey, one: str, other: str) -> tuple[str, list[str]] | None:
    found = ways.parting(survey, one, other)
    return None if found is None else (found.switch.address, [one.address for one in found.ports])


def test_functions_part_at_the_ports_of_their_switch() -> None:
    survey = recorded("host")
    assert between(survey, PEER, DISK) == (SWITCH, [PORTS[0], PORTS[1]])
    assert between(survey, DISK, PEER) == (SWITCH, [PORTS[1], PORTS[0]])
    assert between(survey, PEER, "0000:00:01.0") is None
    assert between(survey, PEER, PORTS[0]) is None


@pytest.mark.parametrize(
    ("one", "other", "switch", "ports"),
    [
        ("0000:0f:00.0", "0000:13:00.0", "0000:0b:00.0", ["0000:0c:10.0", "0000:0c:18.0"]),
        ("0000:19:00.0", "0000:1d:00.0", "0000:15:00.0", ["0000:16:00.0", "0000:16:08.0"]),
        ("0000:0f:00.0", "0000:1d:00.0", "0000:09:00.0", ["0000:0a:00.0", "0000:0a:04.0"]),
        ("0000:13:00.0", "0000:19:00.0", "0000:09:00.0", ["0000:0a:00.0", "0000:0a:04.0"]),
    ],
)
def test_a_cascade(one: str, other: str, switch: str, ports: list[str]) -> None:
    survey = reduced("cascade-two-guests")
    assert between(survey, one, other) == (switch, ports)


def test_one_port_above_both() -> None:
    survey = reduced("nic-two-functions")
    assert between(survey, "0000:1b:00.0", "0000:1b:00.1") is None
    above = ways.port_above(survey, ["0000:1b:00.0", "0000:1b:00.1"])
    assert above is survey.functions["0000:1a:00.0"]
    assert ways.port_above(survey, ["0000:18:00.0", "0000:1b:00.1"]) is None


def test_a_vf_whose_bus_is_another() -> None:
    """In sysfs it is where its physical function is."""
    survey = recorded("vfio")
    vf = dataclasses.replace(survey.functions[DISK], address="0000:05:1f.7", physfn=DISK)
    survey = with_(survey, vf)
    assert between(survey, DISK, vf.address) is None
    assert between(survey, PEER, vf.address) == (SWITCH, [PORTS[0], PORTS[1]])
    assert ways.state(survey, [DISK, vf.address])["acs"] == "SV+RR+CR+UF"


def test_a_function_in_the_device_of_the_upstream_port() -> None:
    """Requests for it are decided where they enter the switch."""
    survey = reduced("management-function")
    port = ["0000:02:00.0"]
    assert between(survey, "0000:01:00.1", "0000:03:00.0") == ("0000:01:00.0", port)
    assert between(survey, "0000:03:00.0", "0000:01:00.1") == ("0000:01:00.0", port)


def test_below_a_bridge_to_conventional_pci_no_port_decides() -> None:
    survey = recorded("vfio")
    bridge = Function("0000:03:00.0", (ROOT,), class_code=0x060400, port_type=7, readable=True)
    chain = (ROOT, bridge.address)
    inner = [
        Function(f"0000:04:0{n}.0", chain, class_code=0x060400, readable=True) for n in range(2)
    ]
    leaves = [
        Function(f"0000:0{5 + n}:00.0", (*chain, inner[n].address), readable=True) for n in range(2)
    ]
    functions = [survey.functions[ROOT], bridge, *inner, *leaves]
    survey = Survey({one.address: one for one in functions})
    assert between(survey, "0000:05:00.0", "0000:06:00.0") is None
    assert ways.state(survey, ["0000:05:00.0", "0000:06:00.0"])["acs"] == "no-common-switch"


# --- the state between functions -------------------------------------------------------------


def test_state_is_that_of_the_ports_between() -> None:
    survey = recorded("host")
    assert ways.state(survey, [PEER, DISK]) == {
        "acs": "SV+RR+CR+UF",
        "ats": "absent/on",
        "relaxed_ordering": "off",
        "route": "redirected",
    }
    direct = changed(survey, PORTS[0], acs=SV | UF | TB)
    assert ways.state(direct, [PEER, DISK])["acs"] == "SV+RR+CR+UF/SV+TB+UF"
    assert ways.state(survey, [PEER, "0000:00:01.0"])["acs"] == "no-common-switch"
    none = changed(survey, PORTS[1], acs=None)
    assert ways.state(none, [DISK])["acs"] == "absent"


def test_route_is_what_the_registers_make_of_requests() -> None:
    survey = recorded("host")
    both = [PEER, DISK]
    assert ways.route(survey, [PEER]) == "none"
    assert ways.route(survey, [PEER, "0000:00:01.0"]) == "root-complex"
    # DISK has ATS, and is below the second port
    translated = changed(survey, PORTS[1], acs=SV | RR | CR | UF | DT)
    assert ways.route(translated, both) == "direct-by-ats/redirected"
    assert ways.route(changed(translated, DISK, ats=False), both) == "redirected"
    one = changed(survey, PORTS[0], acs=SV | UF)
    assert ways.route(one, both) == "direct/redirected"
    assert ways.route(changed(one, PORTS[1], acs=SV | UF), both) == "direct"
    assert ways.route(reduced("nic-two-functions"), ["0000:1b:00.0", "0000:1b:00.1"]) == "one-port"


@pytest.mark.parametrize(
    ("name", "functions", "acs_state"),
    [
        ("two-root-ports", "01 02", "no-common-switch"),
        ("two-root-ports", "01", "SV+RR+CR+UF"),
        ("two-root-ports", "02", "SV+UF"),
        ("nic-two-functions", "1b:00.0 1b:00.1", "absent"),
        ("nic-two-functions", "1b:00.0 1b:00.1 1b:00.2", "absent"),
        ("nic-two-functions", "18 1b:00.0", "SV+RR+CR+UF"),
        ("nic-two-functions", "18 1b:00.0 1b:00.1", "SV+RR+CR+UF"),
        ("cascade-two-guests", "0f 13", "SV+RR+CR+UF/SV+UF"),
        ("cascade-two-guests", "13 19", "SV+UF"),
        ("card-with-switch", "75 76", "SV+RR+CR+UF"),
        ("card-with-switch", "75", "absent"),
        ("management-function", "01:00.1 03", "SV+RR+CR+UF"),
        ("vf-of-nobody", "18 19:00.1", "SV+RR+CR+UF"),
    ],
)
def test_state_on_servers(name: str, functions: str, acs_state: str) -> None:
    words = [word if ":" in word else f"{word}:00.0" for word in functions.split()]
    assert ways.state(reduced(name), [f"0000:{word}" for word in words])["acs"] == acs_state


def test_state_of_several_functions_tells_those_that_share_no_switch() -> None:
    survey = recorded("vfio")
    other = Function("0000:00:06.0", class_code=0x060400, port_type=4, readable=True, acs=0)
    far = dataclasses.replace(
        survey.functions[DISK], address="0000:09:00.0", bridges=("0000:00:06.0",)
    )
    survey = with_(survey, other, far)
    assert ways.state(survey, [PEER, DISK, far.address])["acs"] == "SV+RR+CR+UF/no-common-switch"
    assert ways.state(survey, [PEER, far.address])["acs"] == "no-common-switch"


def test_state_of_a_function_that_is_not_there() -> None:
    with pytest.raises(MeasurementError, match=r"no PCI function 0000:99:00\.0"):
        ways.state(recorded("host"), ["0000:99:00.0"])


@pytest.mark.parametrize("address", [DISK, PORTS[1], ROOT])
def test_state_needs_registers(address: str) -> None:
    survey = changed(recorded("host"), address, readable=False)
    with pytest.raises(MeasurementError, match=f"config space of the PCI function {address}"):
        ways.state(survey, [PEER, DISK])


# --- who reaches whom ------------------------------------------------------------------------


def reached(survey: Survey, switch: str = SWITCH) -> set[tuple[str, str]]:
    found = ways.exposed(survey, survey.functions[switch])
    return {(one.owner.partition(" ")[0], one.reached.partition(" ")[0]) for one in found}


def two_guests() -> Survey:
    return changed(claimable(), DISK, users=("vm2 (pid 9)",))


BOTH = {("sleep", "vm2"), ("vm2", "sleep")}


@pytest.mark.parametrize(
    ("first", "second", "who"),
    [
        (REDIRECTS, REDIRECTS, set()),
        (DIRECT, DIRECT, BOTH),
        (DIRECT, REDIRECTS, {("sleep", "vm2")}),
        (REDIRECTS, DIRECT, {("vm2", "sleep")}),
        (None, REDIRECTS, {("sleep", "vm2")}),
        # what the peer's port does with completions changes nothing
        (SV | RR | UF, SV | RR | UF, set()),
        (REDIRECTS | DT, REDIRECTS | DT, set()),
        (REDIRECTS | EC, REDIRECTS | EC, BOTH),
    ],
)
def test_the_port_at_which_a_request_enters_decides(
    first: int | None, second: int | None, who: set[tuple[str, str]]
) -> None:
    survey = changed(changed(two_guests(), PORTS[0], acs=first), PORTS[1], acs=second)
    assert reached(survey) == who


def test_egress_control_goes_by_the_number_of_the_other_port() -> None:
    survey = changed(two_guests(), PORTS[0], acs=REDIRECTS | EC, egress_vector=1 << 9)
    assert reached(changed(survey, PORTS[1], port_number=9)) == set()
    assert reached(changed(survey, PORTS[1], port_number=8)) == {("sleep", "vm2")}
    blocked = changed(survey, PORTS[0], acs=SV | EC, egress_vector=1 << 9)
    assert reached(changed(blocked, PORTS[1], port_number=9)) == set()


def test_functions_of_nobody_do_not_count_and_those_of_the_host_do() -> None:
    survey = changed(claimable(), PORTS[0], acs=DIRECT)
    assert reached(survey) == set()
    assert reached(changed(survey, DISK, vfio=None, driver="nvme")) == {("sleep", "the")}


def test_a_cascade_is_judged_where_ways_part() -> None:
    """The upper ports are direct, those right above the two guests' GPUs redirect."""
    survey = reduced("cascade-two-guests")
    assert reached(survey, "0000:09:00.0") == {("vm1", "vm2"), ("vm2", "vm1")}
    others = [one.address for one in survey.switches() if one.address != "0000:09:00.0"]
    assert all(reached(survey, switch) == set() for switch in others)
    mended = changed(changed(survey, "0000:0a:00.0", acs=REDIRECTS), "0000:0a:04.0", acs=REDIRECTS)
    assert reached(mended, "0000:09:00.0") == set()


def test_a_card_s_own_switch_decides_nothing_for_others() -> None:
    survey = reduced("card-with-switch")
    assert [reached(survey, one.address) for one in survey.switches()] == [set(), set()]
    worse = changed(survey, "0000:72:00.0", acs=DIRECT)
    assert reached(worse, "0000:71:00.0") == {("vm1", "vm2")}


def test_functions_of_one_device_are_not_the_switch_s_matter() -> None:
    survey = changed(reduced("nic-two-functions"), "0000:1b:00.1", users=("vm2 (pid 9)",))
    assert reached(survey, "0000:19:00.0") == set()


def test_what_is_in_the_switch_s_device() -> None:
    survey = reduced("management-function")
    assert reached(survey, "0000:01:00.0") == set()
    direct = changed(survey, "0000:02:00.0", acs=DIRECT)
    assert reached(direct, "0000:01:00.0") == {("vm1", "the")}
    given = changed(survey, "0000:01:00.1", driver="vfio-pci", users=("vm2 (pid 9)",))
    assert reached(given, "0000:01:00.0") == {("vm2", "vm1")}
    # between two of one device it is not the switch that decides
    third = dataclasses.replace(
        given.functions["0000:01:00.1"], address="0000:01:00.2", users=("vm3 (pid 10)",)
    )
    assert reached(with_(given, third), "0000:01:00.0") == {("vm2", "vm1"), ("vm3", "vm1")}


def test_upstream_forwarding() -> None:
    survey = reduced("cascade-two-guests")
    inner = survey.functions["0000:0b:00.0"]
    assert ways.not_forwarding(survey, inner) == []
    without = changed(survey, "0000:0a:00.0", acs=SV | RR | CR)
    assert [one.address for one in ways.not_forwarding(without, inner)] == ["0000:0a:00.0"]
    assert ways.not_forwarding(without, survey.functions["0000:09:00.0"]) == []
