# SPDX-License-Identifier: GPL-2.0-or-later
"""Series direct-p2p in the emulated host: what a peer that doesn't answer does to the host.

Nothing. While a peer's memory decoding is off or it is being reset, another one writes to it
without a pause: the claim is suspended, the bytes go to the root complex, where the IOMMU drops
them, and no error is reported. What is sent to addresses that nobody has is lost silently. All
functions have AER here, and Linux has told them to report Unsupported Requests.

The kernel isn't asked whether it did right: ACS Control, Device Control and AER's mask are read
from config space, the routes from the emulator's counters, and errors from the kernel's log.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from errno import EBADF, EBUSY, EINVAL, EPERM

import pytest
import test_direct_p2p as isolation
from test_direct_p2p import (
    BYTES,
    ENABLE,
    MASTER,
    MEMORY,
    PCI,
    Place,
    Program,
    claim,
    flags,
    open_both,
    release,
    start_traffic,
    wait_for,
    word,
    write_to_peer,
)

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.host import count_iommu_faults, reported_errors
from nearmetal.probes import routes

pytestmark = pytest.mark.testbed

EXTRA = (
    *isolation.BELOW,
    *("-global", "nvme.pcie-aer=on"),
    *("-device", "xio3130-downstream,bus=up0,acs=on,id=dn4,port=5,chassis=15,slot=15"),
)
"""An empty hotplug slot is below the switch, too."""
SUSPENDED, EVENTFD = 4, 8
"""VFIO_PCI_DIRECT_P2P_SUSPENDED, VFIO_PCI_DIRECT_P2P_EVENTFD"""
COMMAND = 4
AER_ID = 0x01
URRE = 8
"""Unsupported Request Reporting Enable, of Device Control (PCIe r7.0, 7.5.3.4)."""
UNSUPPORTED = 1 << 20
"""Unsupported Request Error, of AER's Uncorrectable registers (PCIe r7.0, 7.8.4)."""
BRIDGE_OTHER = 0x0680
"""The class of an NVSwitch, and of non-transparent bridges."""

REPORTED = "an error was reported"
REACHED = "a peer that decodes nothing is reached directly"
NOT_MASKED = "Unsupported Requests are not masked"
NOT_UNMASKED = "what decides about reports is not as it was"
OVERTAKING = "redirection went off while a request could be overtaken"
UNOWNED = "claimed, although an NVSwitch below belongs to nobody"
"""What proofs say when they fail: tests/mutants holds each mutant against its proof's."""


@pytest.fixture(scope="module")
def machine(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    logs = tmp_path_factory.mktemp("logs")
    config = isolation.patched_config(conf)
    with isolation.place_for(conf, cache, config, logs, EXTRA) as place:
        yield place


@pytest.fixture
def place(machine: Place) -> Iterator[Place]:
    with isolation.settled(machine):
        yield machine


def no_error_since(place: Place, log: int) -> None:
    # the message is an interrupt, and a thread prints what it means
    time.sleep(0.5)
    found = reported_errors(place.host.kernel_log(log).lines)
    assert not found, f"{REPORTED}: {found[:3]}"


def state(place: Place, program: Program) -> tuple[int, int]:
    """The claim's flags, and how often it was suspended."""
    found = program.do("get", place.functions["disk"])
    return int(found["flags"]), int(found["suspends"])


def claim_with_events(place: Place, program: Program, *peers: int) -> None:
    words = ("set", place.functions["disk"], ENABLE | EVENTFD, len(peers), 0, *peers)
    wait_for(lambda: program.ask(*words)["errno"] == 0)


def events(program: Program) -> int:
    return int(program.do("events")["count"])


def command(place: Place, program: Program, name: str, clear: int = 0, add: int = 0) -> None:
    """The user of a function changes its Command register."""
    address = place.functions[name]
    found = int(program.do("config", address, COMMAND, 2)["value"])
    program.do("config", address, COMMAND, 2, found & ~clear | add)


def routed_while_it_floods(place: Place, program: Program, times: int = 20) -> routes.Routed:
    """The routes that the bytes of some commands take."""
    # one is on its way
    start = int(program.do("flooded")["flooded"])
    wait_for(lambda: program.do("flooded")["flooded"] > start)
    before = place.routes()
    start = int(program.do("flooded")["flooded"])
    wait_for(lambda: program.do("flooded")["flooded"] >= start + times)
    return place.routes().total - before.total


def flooded_claim(place: Place, program: Program) -> int:
    """A claim, and the disk writes to the peer for ever; the log's end before it."""
    peer = open_both(place, program)
    start_traffic(place, program)
    log = place.host.kernel_log().last
    claim_with_events(place, program, peer)
    assert state(place, program) == (ENABLE, 0)
    program.do("flood", place.functions["disk"], hex(place.bus_address("peer")))
    seen = routed_while_it_floods(place, program)
    assert seen.direct > 0
    assert seen.redirected == 0
    return log


def test_a_peer_that_decodes_nothing_is_not_reached_directly(place: Place) -> None:
    owner = place.program()
    log = flooded_claim(place, owner)
    for times in range(1, 4):
        command(place, owner, "peer", clear=MEMORY)
        assert place.redirects("peer"), REACHED
        assert place.redirects("disk"), REACHED
        place.is_restored()
        assert state(place, owner) == (ENABLE | SUSPENDED, times)
        assert events(owner) == 1
        seen = routed_while_it_floods(place, owner)
        # vfio has taken the mapping away: what is redirected ends at the IOMMU
        assert seen.direct == 0, f"{REACHED}: {seen}"
        assert seen.unsupported == 0, f"{REACHED}: {seen}"
        # as one with two functions can't be overtaken by another: it comes back at once
        command(place, owner, "peer", add=MEMORY)
        assert state(place, owner) == (ENABLE, times)
        assert events(owner) == 1
        seen = routed_while_it_floods(place, owner)
        assert seen.direct > 0
        assert seen.redirected == 0
    assert count_iommu_faults(place.host.kernel_log(log).lines) > 0
    no_error_since(place, log)
    release(place, owner)
    assert events(owner) == 1
    place.is_restored()


def test_a_peer_in_reset_is_not_reached_directly(place: Place) -> None:
    owner = place.program()
    log = flooded_claim(place, owner)
    peer = place.functions["peer"]
    ways: tuple[Callable[[], object], ...] = (
        lambda: owner.do("reset", peer),
        lambda: owner.do("hot-reset", peer),
        lambda: place.sh(f"echo 1 > {PCI}/{peer}/reset"),
        lambda: owner.do("reset", peer),
    )
    for times, reset in enumerate(ways, start=1):
        reset()
        assert state(place, owner) == (ENABLE, times), REACHED
        assert events(owner) == 2
        seen = routed_while_it_floods(place, owner)
        assert seen.direct > 0
        assert seen.redirected == 0
    assert count_iommu_faults(place.host.kernel_log(log).lines) > 0, REACHED
    no_error_since(place, log)
    # the whole switch: its ports have what they should have, and the claim goes on
    place.sh(f"echo 1 > {PCI}/{place.root_port}/reset_subordinate")
    # what was on its way is lost, so nothing can be overtaken
    assert state(place, owner) == (ENABLE, times + 1), REACHED
    no_error_since(place, log)


def test_a_peer_that_sleeps_is_not_reached_directly(place: Place) -> None:
    owner = place.program()
    log = flooded_claim(place, owner)
    peer = place.functions["peer"]
    at = capability(config_of(place, peer), 0x01) + 4
    ways: tuple[tuple[Callable[[], object], Callable[[], object]], ...] = (
        (
            lambda: owner.do("config", peer, at, 2, 3),
            lambda: owner.do("config", peer, at, 2, 0),
        ),
        (lambda: owner.do("low-power", peer, 1), lambda: owner.do("low-power", peer, 0)),
    )
    for times, (sleep, wake) in enumerate(ways, start=1):
        sleep()
        assert state(place, owner) == (ENABLE | SUSPENDED, times), REACHED
        assert routed_while_it_floods(place, owner).direct == 0, REACHED
        wake()
        assert state(place, owner) == (ENABLE, times)
        assert routed_while_it_floods(place, owner).direct > 0
    no_error_since(place, log)


def test_a_claim_may_begin_before_a_peer_decodes(place: Place) -> None:
    """As a VMM's, before its firmware has run."""
    owner = place.program()
    peer = open_both(place, owner)
    command(place, owner, "peer", clear=MEMORY)
    command(place, owner, "disk", clear=MEMORY)
    claim_with_events(place, owner, peer)
    assert state(place, owner) == (ENABLE | SUSPENDED, 1)
    place.is_restored()
    command(place, owner, "disk", add=MEMORY | MASTER)
    assert state(place, owner) == (ENABLE | SUSPENDED, 1)
    place.is_restored()
    assert events(owner) == 0
    command(place, owner, "peer", add=MEMORY)
    assert state(place, owner) == (ENABLE, 1)
    assert events(owner) == 1
    assert not place.redirects("peer")
    assert not place.redirects("disk")
    owner.do("close", place.functions["peer"])
    assert events(owner) == 1
    assert flags(place, owner) == 0
    place.is_restored()


def test_nothing_is_overtaken_when_it_comes_back(place: Place) -> None:
    """While one of three is off, the others exchange what may be on its way for long."""
    owner = place.program()
    peer = open_both(place, owner)
    third = int(owner.do("open", place.functions["third"])["id"])
    start_traffic(place, owner)
    claim_with_events(place, owner, peer, third)
    assert state(place, owner) == (ENABLE, 0)
    command(place, owner, "third", clear=MEMORY)
    assert state(place, owner) == (ENABLE | SUSPENDED, 1)
    assert write_to_peer(place, owner).redirected == 4 * BYTES
    command(place, owner, "third", add=MEMORY)
    assert state(place, owner) == (ENABLE | SUSPENDED, 1), OVERTAKING
    assert place.redirects("peer"), OVERTAKING
    assert write_to_peer(place, owner).redirected == 4 * BYTES
    # nothing is sent any more: what was has arrived
    command(place, owner, "disk", clear=MASTER)
    assert state(place, owner) == (ENABLE, 1)
    command(place, owner, "disk", add=MASTER)
    assert write_to_peer(place, owner).direct == 4 * BYTES
    assert events(owner) == 2


# -- what is masked


def config_of(place: Place, address: str) -> bytes:
    return base64.b64decode(place.sh(f"base64 -w 0 {PCI}/{address}/config"))


def capability(config: bytes, wanted: int) -> int:
    """Offset of a capability."""
    at = config[0x34]
    while at and config[at] != wanted:
        at = config[at + 1]
    assert at, f"there is no capability {wanted:#x}"
    return at


def below(place: Place) -> list[str]:
    """All functions and ports that a claim concerns."""
    upstream = place.sh(f"basename $(dirname $(readlink -f {PCI}/{place.ports['disk']}))")
    found = place.sh(f"find $(readlink -f {PCI}/{upstream}) -name config -printf '%h\\n'")
    return sorted(path.rsplit("/", 1)[1] for path in found.splitlines() if ":pcie" not in path)


def reporting(place: Place) -> dict[str, tuple[int, int]]:
    """Device Control and AER's uncorrectable mask of each."""
    found = {}
    for address in below(place):
        config = config_of(place, address)
        aer = isolation.extended_capability(config, AER_ID)
        express = capability(config, 0x10)
        found[address] = (word(config, express + 8, 2), word(config, aer + 8, 4))
    return found


def test_what_nobody_answers_is_reported_to_nobody(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    place.stay_awake("third")
    third = hex(place.bus_address("third"))
    before, log = reporting(place), place.host.kernel_log().last
    assert len(before) == 10
    assert all(control & URRE for control, mask in before.values()), "nothing reports them"
    assert not any(mask & UNSUPPORTED for control, mask in before.values())
    assert claim(place, owner, peer) == 0
    masked = {key: (control & ~URRE, mask | UNSUPPORTED) for key, (control, mask) in before.items()}
    # what the device must do, and not only what its registers say, is proved below
    seen = reporting(place)
    for words in (
        ("write", place.functions["disk"], third, 4),
        ("read", place.functions["disk"], third),
    ):
        at = place.routes()
        owner.ask(*words)
        assert (place.routes().total - at.total).unsupported > 0
    no_error_since(place, log)
    assert seen == masked, NOT_MASKED
    # nor does the user get at it; a reset doesn't either
    address = place.functions["peer"]
    config = config_of(place, address)
    control, mask = capability(config, 0x10) + 8, isolation.extended_capability(config, AER_ID) + 8
    for _ in range(2):
        wanted, others = before[address]
        owner.do("config", address, control, 2, wanted)
        owner.do("config", address, mask, 4, others)
        assert owner.do("config", address, control, 2)["value"] == wanted
        assert owner.do("config", address, mask, 4)["value"] & UNSUPPORTED == 0
        assert reporting(place) == masked, NOT_MASKED
        owner.do("reset", address)
        assert reporting(place) == masked, NOT_MASKED
    release(place, owner)
    assert reporting(place) == before, NOT_UNMASKED
    # what the user wanted meanwhile comes with the end, and no trace of errors remains
    assert claim(place, owner, peer) == 0
    owner.do("config", address, mask, 4, others | UNSUPPORTED)
    release(place, owner)
    assert reporting(place)[address] == (wanted, others | UNSUPPORTED), NOT_UNMASKED
    owner.do("config", address, mask, 4, others)
    for one in below(place):
        config = config_of(place, one)
        aer = isolation.extended_capability(config, AER_ID)
        assert word(config, aer + 4, 4) & UNSUPPORTED == 0, one
    no_error_since(place, log)


# -- what is new in the interface


def test_bad_eventfds_are_refused(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    disk = place.functions["disk"]
    for code, words in (
        (EINVAL, (EVENTFD, 0, 0)),
        (EINVAL, (EVENTFD, 1, 0, peer)),
        (EINVAL, (ENABLE | SUSPENDED, 1, 0, peer)),
        (EINVAL, (ENABLE | EVENTFD, 0, 0)),
    ):
        assert owner.ask("set", disk, *words)["errno"] == code, words
    assert owner.ask("events")["errno"] in (0, EBADF)
    place.is_restored()


def test_an_nvswitch_needs_an_owner(place: Place) -> None:
    """It comes by hotplug, during a claim, and is added only after its end."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    # an empty slot whose port redirects is in nobody's way
    assert claim(place, owner, peer) == 0
    words = {"class": BRIDGE_OTHER << 8, "vendor-id": 0x10DE, "device-id": 0x22A3}
    place.qmp("device_add", driver="pcie-testdev", bus="dn4", id="nvswitch", **words)

    def address() -> str:
        return place.sh(f"lspci -Dn -d ::{BRIDGE_OTHER:04x} | cut -d' ' -f1")

    try:
        time.sleep(3)
        assert not address(), f"{isolation.ADDED}: {address()}"
        assert flags(place, owner) == ENABLE
        release(place, owner)
        wait_for(lambda: place.sh("echo 1 > /sys/bus/pci/rescan") == "" and address() != "")
        found = address()
        assert claim(place, owner, peer) == EBUSY, UNOWNED
        place.is_restored()
        place.host.bind_vfio(found)
        assert claim(place, owner, peer) == EBUSY, UNOWNED
        other.do("open", found)
        assert claim(place, owner, peer) == EPERM
        other.do("close", found)
        owner.do("open", found)
        assert claim(place, owner, peer) == 0
        owner.do("close", found)
        assert flags(place, owner) == 0
    finally:
        isolation.end_programs(place)
        place.qmp("device_del", id="nvswitch")
        wait_for(lambda: not address(), 60)
