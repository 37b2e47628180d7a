# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-ecam with a guest: mapped config space takes no exit, and never shows another value.

Values are compared in a guest that is told not to use the hint: it reads through the ports, which
QEMU serves, and the random program (guest-images/probes/nm-fuzz.c) holds that against the mapped
window. Exits are counted in a guest that uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pci_config_cache_guest import (
    EDU,
    OPERATIONS,
    PF,
    PORT,
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
    until,
)

from nearmetal.core.cache import Cache
from nearmetal.core.model import Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import CMDLINE, Guest, GuestParts, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.patches import series, variants
from nearmetal.pci.registers import CONFIG_SIZE, latch
from nearmetal.probes.tracing import Exits, counting

pytestmark = pytest.mark.testbed

NO_HINT = ("-append", f"{CMDLINE} pci=noecamhint")
"""QEMU takes the last -append."""
WHOLE_FUNCTION = 2 * CONFIG_SIZE // 4
"""Exits for all registers at the ports, one for the address and one for the data."""
SAYS = "hypervisor says which devices to read by ECAM"


@dataclasses.dataclass(frozen=True)
class Place:
    """A host whose assigned functions are with vfio-pci, and what its guest is made of."""

    host: Host
    parts: GuestParts
    logs: Path


@contextmanager
def place_for(conf: Settings, cache: Cache, config: variants.Config, logs: Path) -> Iterator[Place]:
    made = Lab.build(conf, cache, [config])
    with cache.lock("testbed"), made.host(config, logs) as host:
        host.load_kvm(config.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(config, host, assigned)
        parts = dataclasses.replace(parts, extra=(*parts.extra, *PORT, *PF))
        with host.vfio(assigned):
            yield Place(host, parts, logs)


@contextmanager
def booted(place: Place, label: str, *words: str) -> Iterator[Guest]:
    """A guest with two assigned NVMe functions that nobody uses, and an empty root port."""
    parts = dataclasses.replace(place.parts, extra=(*place.parts.extra, *words))
    with running_guest(place.host, parts, logs=place.logs, label=label) as guest:
        prepare(guest)
        yield guest


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    config = next(one for one in plan if one.series == "pci-ecam")
    with place_for(conf, cache, config, tmp_path_factory.mktemp("logs")) as found:
        yield found


def mapped(guest: Guest) -> set[str]:
    """The functions that QEMU says it maps."""
    listed = guest.qmp("qom-get", path=lspci.HOST_BRIDGE, property=lspci.ECAM_MAPPED)
    assert len(listed) == len(set(listed))
    return set(listed)


def kinds(guest: Guest) -> dict[str, str]:
    """As the guest sees them; QMP tells of virtual functions that are disabled, too."""
    seen = {address.removeprefix("0000:") for address in addresses(guest, "")}
    found = lspci.kinds(guest.qmp("query-pci"))
    return {address: kind for address, kind in found.items() if address in seen}


def emulated(guest: Guest) -> set[str]:
    return {address for address, kind in kinds(guest).items() if kind == "emulated"}


def counted(place: Place, guest: Guest, command: str) -> Exits:
    with counting(place.host.shell) as tracer:
        where = Bench(place.host, guest, tracer, Unit(Subject("on", "pci-ecam")), place.logs)
        said, exits = where.traced("ecam", f"nm-run {command}", deadline_s=300)
    assert said["status"] == 0
    return exits


def ecam_reads(guest: Guest, exits: Exits, address: str) -> int:
    base, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    page = lspci.ecam_page(base, address)
    return exits.mmio_reads(page, page + lspci.ECAM_PAGE)


def port_exits(exits: Exits, address: str) -> int:
    """Exits to QEMU for a function's registers at the ports."""
    latched = (latch(f"0000:{address}", offset) for offset in range(0, CONFIG_SIZE, 4))
    return sum(exits.config_user.get(value, 0) for value in latched)


def random_program_sees_the_same(guest: Guest, operations: int = OPERATIONS) -> None:
    edu = plug(guest)
    assert edu.removeprefix("0000:") in mapped(guest)
    unplug(guest)
    random_program(guest, operations)


def plugged_functions_are_mapped(place: Place, guest: Guest) -> None:
    """The guest looks at the empty slot first, where it finds all ones without an exit."""
    port = empty_port(guest)
    before = mapped(guest)
    for _ in range(2):
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}")
        edu = plug(guest).removeprefix("0000:")
        assert mapped(guest) == before | {edu}
        exits = counted(place, guest, f"lspci -s {edu} -xxx")
        assert ecam_reads(guest, exits, edu) == port_exits(exits, edu) == 0
        unplug(guest)
        assert mapped(guest) == before
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}"), "the guest found a device that is gone"


def virtual_functions_are_mapped(place: Place, guest: Guest) -> None:
    """They are all ones while they are disabled, which takes no exit either."""
    pf = physical_function(guest)
    before = mapped(guest)
    with driven(guest, pf):
        for number in (VFS, 0, 2, 0):
            vfs = {vf.removeprefix("0000:") for vf in make_vfs(guest, pf, number)}
            assert len(vfs) == number
            assert mapped(guest) == before | vfs
            for vf in vfs:
                exits = counted(place, guest, f"lspci -s {vf} -xxxx")
                assert ecam_reads(guest, exits, vf) == port_exits(exits, vf) == 0


def reads_leave_the_ports(place: Place, guest: Guest) -> None:
    """No exit where a page is mapped, one by ECAM elsewhere, for nothing serves the ports."""
    exits = counted(place, guest, "lspci -xxxx")
    found = kinds(guest)
    assert len(found) > 10
    for address, kind in found.items():
        ports = port_exits(exits, address)
        assert ports == 0, f"{ports} exits at the ports for {address}"
        reads = 0 if kind == "emulated" else lspci.ECAM_PAGE // 4
        assert ecam_reads(guest, exits, address) == reads, address


class TestThroughThePorts:
    """The guest doesn't use the hint: what it reads through the ports is what QEMU says."""

    @pytest.fixture(scope="class")
    @classmethod
    def guest(cls, place: Place) -> Iterator[Guest]:
        with booted(place, "ports", *NO_HINT) as guest:
            yield guest

    def test_emulated_functions_are_mapped_and_no_others(self, guest: Guest) -> None:
        found = kinds(guest)
        assert sorted(found.values()).count("assigned") == 2
        assert sorted(found.values()).count("above") == 2
        assert mapped(guest) == emulated(guest)

    def test_the_parameter_keeps_the_guest_from_using_the_hint(
        self, place: Place, guest: Guest
    ) -> None:
        assert SAYS not in guest.shell.run("dmesg").stdout
        exits = counted(place, guest, "lspci -xxx")
        for address in kinds(guest):
            assert port_exits(exits, address) == WHOLE_FUNCTION, address

    def test_random_program_sees_the_same(self, guest: Guest) -> None:
        random_program_sees_the_same(guest)
        assert mapped(guest) == emulated(guest)

    def test_reset_takes_pages_from_buses_that_are_gone(self, guest: Guest) -> None:
        """QEMU resets all functions; the last test, for the guest does not come back."""
        assert any(not address.startswith("00:") for address in mapped(guest))
        guest.qmp("stop")
        guest.qmp("set-action", reboot="reset")
        guest.qmp("system_reset")
        until(
            lambda: all(address.startswith("00:") for address in mapped(guest)),
            "QEMU's unmapping functions behind bridges that have no bus number",
        )


class TestWithTheHint:
    """The guest reads by ECAM where the hint says so."""

    @pytest.fixture(scope="class")
    @classmethod
    def guest(cls, place: Place) -> Iterator[Guest]:
        with booted(place, "hint") as guest:
            yield guest

    def test_reads_take_no_exit_where_mapped_and_one_elsewhere(
        self, place: Place, guest: Guest
    ) -> None:
        assert SAYS in guest.shell.run("dmesg").stdout
        reads_leave_the_ports(place, guest)

    def test_plugged_functions_are_mapped(self, place: Place, guest: Guest) -> None:
        plugged_functions_are_mapped(place, guest)

    def test_virtual_functions_are_mapped(self, place: Place, guest: Guest) -> None:
        virtual_functions_are_mapped(place, guest)
