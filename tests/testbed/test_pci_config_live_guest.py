# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-live with a guest: KVM shows what QEMU would, of every function, at any time.

Where KVM reads config space live, neither the ports nor ECAM are a way around it. What is right
comes from QEMU, with ``config-live-active`` switched off, or, while everything changes, from reads
of 8 bytes, which KVM always leaves to QEMU (guest-images/probes/nm-fuzz.c, option -q).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pci_config_cache_guest import (
    CHANGES,
    EDU,
    LONG,
    NOBODYS_VFS,
    OPERATIONS,
    PF,
    PORT,
    REBOOTS,
    VFS,
    addresses,
    driven,
    empty_port,
    make_vfs,
    physical_function,
    plug,
    prepare,
    random_program,
    unplug,
)
from test_pci_ecam_guest import Place, counted, kinds

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.patches import series, variants
from nearmetal.pci.registers import parse_dump

pytestmark = pytest.mark.testbed

BOUND = "config-live-bound"
"""Where QEMU lists the functions that it told KVM of."""
WIDE = "-q"
POLLER = "/run/poller"
RESETS = 20
DIFFERS = "differs from what QEMU says"
GONE = "the guest found a device that is gone"
NOT_BOUND = "QEMU is wrong about"
EXITS = "exits for Link Status"


def on_config(conf: Settings) -> variants.Config:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    return next(one for one in plan if one.series == "pci-config-live")


@contextmanager
def place_for(conf: Settings, cache: Cache, config: variants.Config, logs: Path) -> Iterator[Place]:
    """A host with another physical function, whose two NVMe functions are with vfio-pci."""
    made = Lab.build(conf, cache, [config])
    with cache.lock("testbed"), made.host(config, logs, extra=PF) as host:
        host.load_kvm(config.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(config, host, assigned)
        parts = dataclasses.replace(parts, extra=(*parts.extra, *PORT, *PF))
        with host.vfio(assigned):
            yield Place(host, parts, logs)


@contextmanager
def booted(place: Place, label: str = "live") -> Iterator[Guest]:
    """A guest with two assigned NVMe functions that nobody uses, and an empty root port."""
    with running_guest(place.host, place.parts, logs=place.logs, label=label) as guest:
        prepare(guest)
        yield guest


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    logs = tmp_path_factory.mktemp("logs")
    with place_for(conf, cache, on_config(conf), logs) as made:
        yield made


@pytest.fixture(scope="module")
def guest(place: Place) -> Iterator[Guest]:
    with booted(place) as made:
        yield made


def bound(guest: Guest) -> set[str]:
    """The functions that QEMU says KVM reads."""
    listed: list[str] = guest.qmp("qom-get", path=lspci.HOST_BRIDGE, property=BOUND)
    assert len(listed) == len(set(listed))
    return set(listed)


def switch(guest: Guest, on: bool) -> None:
    guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.LIVE_ACTIVE, value=on)


def all_bytes(guest: Guest) -> dict[str, bytes]:
    """All of config space, by the ports and, above 256, by ECAM."""
    return parse_dump(guest.shell.run("lspci -D -xxxx", deadline_s=300).stdout)


def bytes_are_those_of_qemu(guest: Guest) -> dict[str, bytes]:
    """All bytes are those of QEMU, which is asked with KVM switched off."""
    live = all_bytes(guest)
    switch(guest, on=False)
    try:
        plain = all_bytes(guest)
    finally:
        switch(guest, on=True)
    assert live.keys() == plain.keys()
    wrong = [
        f"{address}+{offset:#x}"
        for address, data in plain.items()
        for offset, byte in enumerate(data)
        if live[address][offset] != byte
    ]
    assert not wrong, f"{wrong[:20]} {DIFFERS}"
    return plain


def every_function_is_bound(guest: Guest) -> None:
    wrong = bound(guest) ^ set(kinds(guest))
    assert not wrong, f"{NOT_BOUND} {wrong}"


def only_link_status_exits(place: Place, guest: Guest) -> None:
    """Of all registers of all functions, twice as many as of one function."""
    exits = counted(place, guest, "lspci -xxxx")
    above = sum(kind == "above" for kind in kinds(guest).values())
    window = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    assert exits.mmio_reads_userspace(*window) == 0
    found = lspci.config_exits_userspace(exits)
    assert above > 0
    assert found == above, f"{found} {EXITS} of {above} ports, and nothing else"


def plugged_functions_come_and_go(guest: Guest) -> None:
    port = empty_port(guest)
    before = bound(guest)
    for _ in range(2):
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}")
        edu = plug(guest)
        wrong = bound(guest) ^ before ^ {edu.removeprefix("0000:")}
        assert not wrong, f"{NOT_BOUND} {wrong}"
        bytes_are_those_of_qemu(guest)
        unplug(guest)
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}"), GONE
        assert bound(guest) == before, f"{NOT_BOUND} {bound(guest) ^ before}"


def sees_what_qemu_has(guest: Guest, operations: int = OPERATIONS) -> dict[str, int]:
    said = random_program(guest, operations, WIDE)
    bytes_are_those_of_qemu(guest)
    return said


def test_every_function_is_bound(guest: Guest) -> None:
    assert sorted(kinds(guest).values()).count("assigned") == 2
    every_function_is_bound(guest)


def test_only_link_status_exits(place: Place, guest: Guest) -> None:
    only_link_status_exits(place, guest)


def test_bytes_are_those_of_qemu(guest: Guest) -> None:
    assert len(bytes_are_those_of_qemu(guest)) > 10


def test_reads_of_8_bytes_go_to_qemu(place: Place, guest: Guest) -> None:
    """Else they would prove nothing in the random program."""
    window = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    exits = counted(place, guest, f"nm-fuzz {WIDE} 1 200 {window[0]:#x}")
    assert exits.mmio_reads_userspace(*window) >= 400


def test_switched_off_it_knows_no_function(guest: Guest) -> None:
    switch(guest, on=False)
    assert bound(guest) == set()
    switch(guest, on=True)
    every_function_is_bound(guest)
    with pytest.raises(MeasurementError):
        guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.LIVE_ACTIVE, value="yes")


def test_plugged_functions_come_and_go(guest: Guest) -> None:
    plugged_functions_come_and_go(guest)


def test_virtual_functions_come_and_go(guest: Guest) -> None:
    pf = physical_function(guest)
    before = bound(guest)
    with driven(guest, pf):
        for number in (VFS, 0, 2, 0):
            vfs = {vf.removeprefix("0000:") for vf in make_vfs(guest, pf, number)}
            assert len(vfs) == number
            assert bound(guest) == before | vfs
            bytes_are_those_of_qemu(guest)


def test_random_program_sees_what_qemu_has(guest: Guest) -> None:
    said = sees_what_qemu_has(guest)
    if LONG:
        assert min(said[key] for key in CHANGES) > 0


def test_resets_by_the_host_under_reads(guest: Guest) -> None:
    """While the host resets the function, its registers are left to QEMU, which waits."""
    host = guest.host
    disk = host.p2p["disk"]
    before = bytes_are_those_of_qemu(guest)
    polling = f"echo $$ >{POLLER}; while :; do lspci -xxx; done"
    guest.shell.run(f"setsid sh -c '{polling}' </dev/null >/dev/null 2>&1 &")
    for _ in range(RESETS):
        host.shell.run(f"echo 1 > /sys/bus/pci/devices/{disk}/reset", deadline_s=60)
    guest.shell.run(f"kill $(cat {POLLER})")
    assert bytes_are_those_of_qemu(guest) == before


@pytest.mark.nightly
def test_virtual_functions_of_the_host_change_nothing(guest: Guest) -> None:
    host = guest.host
    host.shell.run(NOBODYS_VFS)
    pf = physical_function(host)
    before = bytes_are_those_of_qemu(guest)
    for number in (VFS, 0):
        assert len(make_vfs(host, pf, number)) == number
        assert bytes_are_those_of_qemu(guest) == before


@pytest.mark.nightly
def test_guest_that_reboots_is_served_again(guest: Guest) -> None:
    guest.qmp("set-action", reboot="reset")
    for how, reboot in REBOOTS.items():
        start = guest.console.size
        reboot(guest)
        guest.comes_up_again(start)
        print(f"came up again, reset {how}")
        prepare(guest)
        every_function_is_bound(guest)
        sees_what_qemu_has(guest, 120)
