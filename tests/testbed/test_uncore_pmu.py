# SPDX-License-Identifier: GPL-2.0-or-later
"""Series uncore-pmu in the emulated host: the memory controllers' PMU in a guest.

The emulated host has that of Ice Lake-SP (series icx-imc), whatever its CPU is: here one with
SVM, so that KVM runs. The guest's CPU is said to be an Ice Lake. The patched intel_uncore of its
kernel looks for the memory controllers although it is in a VM; one that is not patched does so
if it is told that it is not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_pmu_passthrough import patched_config

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.model import Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, GuestParts, running_guest
from nearmetal.machines.host import Host, find_function
from nearmetal.machines.lab import Lab
from nearmetal.measure import imc
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.patches import variants
from nearmetal.probes.tracing import counting
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

NEEDED = ("linux/uncore-pmu", "qemu/uncore-pmu", "testbed/icx-imc")
CPU = "Icelake-Server-v4,vendor=GenuineIntel,host-phys-bits=on,pmu=off"
PMUS = (
    *(f"uncore_imc_{number}" for number in range(imc.CONTROLLERS * imc.CHANNELS)),
    *(f"uncore_imc_free_running_{number}" for number in range(imc.CONTROLLERS)),
)
RAS = (0xC18, 0xE54)
"""Of the RAS registers in a channel's page, from its beginning."""
SELFTEST = "vfio_icx_imc_test"
MOST_OFF_PCT = 1.0
"""NVMe reads its commands and lists of pages from memory, and writes completions there."""


@dataclass
class Place:
    """The host, with the function of the memory controllers, and what guests are made of."""

    host: Host
    parts: GuestParts
    vanilla: GuestParts
    """The same with a kernel that is not patched."""
    logs: Path
    controller: int
    """Where the host has the registers of the first memory controller."""

    def read(self, offset: int, width: int = 32) -> int:
        """A register of the first memory controller as the host has it."""
        said = self.host.shell.run(f"nm-mmio read {self.controller + offset:#x} {width} 1").stdout
        return int(json.loads(said)["value"])

    @contextmanager
    def driver(self, mode: str) -> Iterator[None]:
        """The function is with its driver, which allows a mode."""
        allows = {imc.MODULE: {"map": "Y" if mode == "map" else "N"}}
        with self.host.parameters(allows), self.host.vfio([], {"imc": imc.DRIVER}):
            yield

    def guest_parts(self, mode: str, cpu: str = CPU) -> GuestParts:
        device = self.host.vfio_device("imc", imc.DRIVER)
        reads = "on" if mode == "map" else "off"
        words = (
            *("-cpu", cpu),
            *("-device", "icx-ubox,bus=pcie.0,addr=1e.0,multifunction=on"),
            *("-device", f"vfio-pci,sysfsdev={device},bus=pcie.0,addr=1e.1,mmap-read={reads}"),
        )
        return dataclasses.replace(self.parts, extra=(*self.parts.extra, *words))


@contextmanager
def place_for(conf: Settings, cache: Cache, off: variants.Config, logs: Path) -> Iterator[Place]:
    """A host with the kernel of ``off``, and guests that have it, too, or are vanilla."""
    made = Lab.build(conf, cache, [off])
    with cache.lock("testbed"), made.host(off, logs) as host:
        host.load_kvm()
        assigned = host.assigned
        with host.vfio(assigned):
            vanilla = made.guest_parts(off, host, assigned)
            patched = dataclasses.replace(off, guest_patches=off.linux_patches)
            parts = made.guest_parts(patched, host, assigned)
            yield Place(host, parts, vanilla, logs, imc.controllers(host.shell)[0])


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    off = patched_config(conf, NEEDED)
    with place_for(conf, cache, off, tmp_path_factory.mktemp("logs")) as found:
        yield found


@contextmanager
def guest_with(place: Place, mode: str) -> Iterator[Bench]:
    """A guest that has the PMU; ``mode`` is how its reads are answered."""
    place.host.forget_log()
    with (
        place.driver(mode),
        running_guest(place.host, place.guest_parts(mode), logs=place.logs, label=mode) as guest,
        counting(place.host.shell) as tracer,
    ):
        unit = Unit(Subject("on", "uncore-pmu", mode, "amd"), named=True)
        yield Bench(place.host, guest, tracer, unit, place.logs)


def write(guest: Guest, address: int, value: int, width: int = 32) -> None:
    imc.write(guest.shell, (address, value, width))


@pytest.mark.parametrize("mode", ["trap", "map"])
def test_the_guest_counts_and_reads_cheaply(place: Place, mode: str) -> None:
    the_guest_counts(place, mode)


def the_guest_counts(place: Place, mode: str) -> None:
    """All rows of the test ``imc`` are what its checks ask for, and the guest leaves nothing."""
    with guest_with(place, mode) as bench:
        guest = bench.guest
        assert "hypervisor" in guest.shell.run("cat /proc/cpuinfo").stdout
        pmus = guest.shell.run("ls /sys/bus/event_source/devices").stdout.split()
        assert {*PMUS} <= set(pmus)
        # nobody has said that the MSRs of others are there
        assert not [one for one in pmus if one.startswith("uncore_") and one not in PMUS]

        found = imc.measure(bench)
        for one in found:
            print(one.name, one.context, one.values)
        mapped = mode == "map"
        wanted = {
            "imc.read_userspace_exits": 0.0,
            "imc.read_exits": float(not mapped),
            "imc.ras_registers_changed": 0.0,
            "imc.overflows_enabled": 0.0,
            "imc.second_users": 0.0,
        }
        for one in found:
            if one.name in wanted:
                assert set(one.values) == {wanted[one.name]}, one
            elif one.name == "imc.ras_registers_read":
                assert (one.values[0] > 0) == mapped, one
            else:
                assert max(one.values) < MOST_OFF_PCT, one

        # what the guest reads of the other registers of a channel's page is what the host has
        page = imc.controllers(guest.shell)[0] + imc.CHANNEL_PAGE
        there = imc.controllers(place.host.shell)[0] + imc.CHANNEL_PAGE
        ours = imc.others(imc.registers(place.host.shell, there, imc.PAGE))
        assert set(RAS) <= set(ours)
        assert imc.others(imc.registers(guest.shell, page, imc.PAGE)) == (ours if mapped else {})
        place.host.check()
    imc.nothing_left(place.host)


def test_the_registers_are_where_the_bar_is(place: Place) -> None:
    """Also after the guest has moved it: KVM answers there, and not where it was."""
    with guest_with(place, "trap") as bench:
        guest = bench.guest
        function = find_function(guest.shell, *imc.FUNCTION)
        assert function is not None
        box = imc.controllers(guest.shell)[0] + imc.CHANNEL_0
        write(guest, box + imc.CONTROL_2, imc.ENABLE | 0x3004)

        def bar() -> int:
            said = guest.shell.run(f"setpci -s {function} BASE_ADDRESS_0").stdout
            return int(said, 16) & ~0xF

        first = bar()
        assert first == box & -(8 << 20)
        assert place.read(imc.CHANNEL_0 + imc.CONTROL_2) == imc.ENABLE | 0x3004
        # not decoded: nobody answers
        guest.shell.run(f"setpci -s {function} COMMAND=0:2")
        write(guest, box + imc.CONTROL_2, imc.ENABLE | 0x5004)
        assert place.read(imc.CHANNEL_0 + imc.CONTROL_2) == imc.ENABLE | 0x3004
        # nothing is at the top of the window below the I/O APIC
        moved = 0xFE000000
        guest.shell.run(
            f"setpci -s {function} BASE_ADDRESS_0={moved:x}; setpci -s {function} COMMAND=2:2"
        )
        assert bar() == moved
        there = imc.controllers(guest.shell)[0] + imc.CHANNEL_0
        assert there == box - first + moved
        write(guest, there + imc.CONTROL_2, imc.ENABLE | 0x7004)
        assert place.read(imc.CHANNEL_0 + imc.CONTROL_2) == imc.ENABLE | 0x7004
        command = f"nm-mmio read {there + imc.COUNTER_2:#x} 64 100"
        _, seen = bench.traced("moved", command, deadline_s=60)
        page = there & -imc.PAGE
        assert seen.mmio_reads(page, page + imc.PAGE) == 100
        assert seen.mmio_reads_userspace(page, page + imc.PAGE) == 0
        place.host.check()


def test_a_guest_that_is_told_of_no_hypervisor_needs_no_patch(place: Place) -> None:
    words = place.guest_parts("trap", f"{CPU},-hypervisor").extra
    vanilla = dataclasses.replace(place.vanilla, extra=words)
    with (
        place.driver("trap"),
        running_guest(place.host, vanilla, logs=place.logs, label="bare") as guest,
    ):
        assert {*PMUS} <= set(guest.shell.run("ls /sys/bus/event_source/devices").stdout.split())


def test_there_is_one_user_and_he_leaves_nothing_behind(place: Place) -> None:
    with guest_with(place, "trap") as bench:
        box = imc.controllers(bench.guest.shell)[0] + imc.CHANNEL_0
        write(bench.guest, box + imc.CONTROL_2, imc.ENABLE | 0x3004)
        write(bench.guest, box + imc.COUNTER_2, 0x123456, 64)
        assert place.read(imc.CHANNEL_0 + imc.CONTROL_2) == imc.ENABLE | 0x3004
        assert place.read(imc.CHANNEL_0 + imc.COUNTER_2, 64) >= 0x123456

        second = dataclasses.replace(place.guest_parts("trap"), assigned=())
        with (
            pytest.raises(MeasurementError) as refused,
            running_guest(place.host, second, logs=place.logs, label="second"),
        ):
            pass
        assert "Device or resource busy" in f"{refused.value.message} {refused.value.detail}"

        # the second has ended
        pids = place.host.shell.run("pgrep -f guest=nearmetal-.*intel_uncore").stdout.split()
        place.host.shell.run(
            f"kill -KILL {' '.join(pids)}; for pid in {' '.join(pids)}; do "
            "while [ -d /proc/$pid ]; do sleep 0.1; done; done",
            deadline_s=60,
        )
        assert place.read(imc.CHANNEL_0 + imc.CONTROL_2) == 0
        assert place.read(imc.CHANNEL_0 + imc.COUNTER_2, 64) == 0
        place.host.check()
        with pytest.raises(MeasurementError):
            bench.guest.qmp("query-status", deadline_s=5)


def test_qemu_says_what_is_missing(place: Place) -> None:
    """``map`` where the host's kernel does not allow it."""
    with (
        place.driver("trap"),
        pytest.raises(MeasurementError) as refused,
        running_guest(place.host, place.guest_parts("map"), logs=place.logs, label="no-map"),
    ):
        pass
    said = f"{refused.value.message} {refused.value.detail}"
    print(said)
    assert "vfio-icx-imc" in said and "map=Y" in said


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["trap", "map"])
def test_selftest_passes(conf: Settings, cache: Cache, place: Place, mode: str) -> None:
    """The kernel's own, without a VM and with one; a skip that is not expected is no pass."""
    config = patched_config(conf, NEEDED)
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kernel_selftests(
        conf, cache, linux, "vfio", (SELFTEST,), patches=config.linux_patches
    )
    program = place.host.place(folder / SELFTEST)
    with place.driver(mode):
        device = place.host.auxiliary("imc").rpartition("/")[2]
        done = place.host.shell.run(f"{program} {device}", deadline_s=300, check=False)
    print(done.stdout, done.stderr)
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    skipped = set(re.findall(r"^ok \d+ icx_imc\.(\S+) # SKIP", done.stdout, re.M))
    unmapped = {"plain.mmap", "vm.mmap"} if mode == "trap" else set()
    assert skipped == {"plain.guest", "vm.reset_after_kill"} | unmapped
    place.host.check()
