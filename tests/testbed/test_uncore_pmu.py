# SPDX-License-Identifier: GPL-2.0-or-later
"""Series uncore-pmu in the emulated host: the memory controllers' PMU in a guest.

The emulated host has that of Ice Lake-SP (series icx-imc), whatever its CPU is: here one with
SVM, so that KVM runs. The guest's CPU is said to be an Ice Lake, and not to be in a VM: then its
intel_uncore, which is not patched, looks for the memory controllers.
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
from nearmetal.machines.emulators import qemu as testbed
from nearmetal.machines.guest import Guest, GuestParts, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure import imc
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.probes.tracing import counting
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

NEEDED = ("linux/uncore-pmu", "qemu/uncore-pmu", "testbed/icx-imc")
MODULE = "icx_imc_vfio_pci"
"""Of the same name is its driver."""
CPU = "Icelake-Server-v4,vendor=GenuineIntel,-hypervisor,host-phys-bits=on,pmu=off"
CHANNEL_PAGE = imc.CHANNEL_0 & -imc.PAGE
BOX = imc.CHANNEL_0 - CHANNEL_PAGE
"""Where the PMU's registers begin in the page of a channel."""
BOX_SIZE = 0x58
CONTROL_0, CONTROL_2, COUNTER_2 = 0x40, 0x48, 0x18
"""Offsets in a channel's box."""
ENABLE, OVERFLOW = 1 << 22, 1 << 20
RAS = (0xC18, 0xE54)
"""Of the RAS registers in a channel's page, from its beginning."""
SELFTEST = "vfio_icx_imc_test"
MOST_OFF_PCT = 1.0
"""NVMe reads its commands and lists of pages from memory, and writes completions there."""


@dataclass
class Place:
    """The host, with the function of the memory controllers, and what a guest is made of."""

    host: Host
    parts: GuestParts
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
        allows = {MODULE: {"map": "Y" if mode == "map" else "N"}}
        with self.host.parameters(allows), self.host.vfio([], {"imc": MODULE}):
            yield

    def guest_parts(self, mode: str) -> GuestParts:
        function = self.host.functions["imc"]
        words = (
            *("-cpu", CPU),
            *("-device", "icx-ubox,bus=pcie.0,addr=1e.0,multifunction=on"),
            *("-device", f"vfio-pci,host={function},bus=pcie.0,addr=1e.1,icx-imc={mode}"),
        )
        return dataclasses.replace(self.parts, extra=(*self.parts.extra, *words))


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    config = patched_config(conf, NEEDED)
    made = Lab.build(conf, cache, [config])
    logs = tmp_path_factory.mktemp("logs")
    extra = testbed.MEMORY_CONTROLLERS
    with (
        cache.lock("testbed"),
        made.host(config, logs, extra=extra) as host,
    ):
        host.load_kvm()
        assigned = host.assigned
        with host.vfio(assigned):
            parts = made.guest_parts(config, host, assigned)
            yield Place(host, parts, logs, imc.controllers(host.shell)[0])


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
    guest.shell.run(f"nm-mmio write {address:#x} {width} {value:#x}")


def registers(guest: Guest, address: int, length: int) -> dict[int, int]:
    """The dwords of a range that are not zero, by offset."""
    said = guest.shell.run(f"nm-mmio scan {address:#x} {length:#x}").stdout
    return {int(at, 16): value for at, value in json.loads(said)["dwords"].items()}


@pytest.mark.parametrize("mode", ["trap", "map"])
def test_the_guest_counts_and_reads_cheaply(place: Place, mode: str) -> None:
    with guest_with(place, mode) as bench:
        guest = bench.guest
        pmus = guest.shell.run("ls /sys/bus/event_source/devices").stdout.split()
        boxes = [f"uncore_imc_{number}" for number in range(imc.CONTROLLERS * imc.CHANNELS)]
        free = [f"uncore_imc_free_running_{number}" for number in range(imc.CONTROLLERS)]
        assert {*boxes, *free} <= set(pmus)

        found = imc.measure(bench)
        for one in found:
            print(one.name, one.context, one.values)
        wanted = {"imc.read_userspace_exits": 0.0, "imc.read_exits": float(mode == "trap")}
        for one in found:
            if one.name in wanted:
                assert set(one.values) == {wanted[one.name]}, one
            else:
                assert max(one.values) < MOST_OFF_PCT, one

        # the other registers of a channel's page
        page = imc.controllers(guest.shell)[0] + CHANNEL_PAGE
        seen = registers(guest, page, imc.PAGE)
        ours = {at: place.read(CHANNEL_PAGE + at) for at in RAS}
        assert all(ours.values()), ours
        if mode == "trap":
            assert not [at for at in seen if not BOX <= at < BOX + BOX_SIZE], seen
        else:
            assert {at: seen.get(at, 0) for at in RAS} == ours
        for at in RAS:
            write(guest, page + at, 0)
        assert {at: place.read(CHANNEL_PAGE + at) for at in RAS} == ours
        # an overflow must not interrupt the host
        write(guest, page + BOX + CONTROL_0, OVERFLOW | ENABLE | 4)
        assert place.read(imc.CHANNEL_0 + CONTROL_0) == ENABLE | 4
        place.host.check()


def test_there_is_one_user_and_he_leaves_nothing_behind(place: Place) -> None:
    with guest_with(place, "trap") as bench:
        box = imc.controllers(bench.guest.shell)[0] + imc.CHANNEL_0
        write(bench.guest, box + CONTROL_2, ENABLE | 0x3004)
        write(bench.guest, box + COUNTER_2, 0x123456, 64)
        assert place.read(imc.CHANNEL_0 + CONTROL_2) == ENABLE | 0x3004
        assert place.read(imc.CHANNEL_0 + COUNTER_2, 64) >= 0x123456

        second = dataclasses.replace(place.guest_parts("trap"), assigned=())
        with (
            pytest.raises(MeasurementError) as refused,
            running_guest(place.host, second, logs=place.logs, label="second"),
        ):
            pass
        assert "Device or resource busy" in f"{refused.value.message} {refused.value.detail}"

        # the second has ended
        pids = place.host.shell.run("pgrep -f guest=nearmetal-.*icx-imc=trap").stdout.split()
        place.host.shell.run(
            f"kill -KILL {' '.join(pids)}; for pid in {' '.join(pids)}; do "
            "while [ -d /proc/$pid ]; do sleep 0.1; done; done",
            deadline_s=60,
        )
        assert place.read(imc.CHANNEL_0 + CONTROL_2) == 0
        assert place.read(imc.CHANNEL_0 + COUNTER_2, 64) == 0
        place.host.check()
        with pytest.raises(MeasurementError):
            bench.guest.qmp("query-status", deadline_s=5)


def test_without_the_property_there_is_no_pmu(place: Place) -> None:
    """What the other tests' guests write to a control is not there, nor read back."""
    parts = place.guest_parts("off")
    with (
        place.driver("trap"),
        running_guest(place.host, parts, logs=place.logs, label="off") as guest,
    ):
        box = imc.controllers(guest.shell)[0] + imc.CHANNEL_0
        write(guest, box + CONTROL_2, ENABLE | 0x3004)
        assert place.read(imc.CHANNEL_0 + CONTROL_2) == 0
        said = guest.shell.run(f"nm-mmio read {box + CONTROL_2:#x} 32 1").stdout
        assert json.loads(said)["value"] in (0, (1 << 32) - 1)


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
    assert "icx-imc-vfio-pci.map=Y" in said


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
        function = place.host.functions["imc"]
        done = place.host.shell.run(f"{program} {function}", deadline_s=300, check=False)
    print(done.stdout, done.stderr)
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    skipped = set(re.findall(r"^ok \d+ icx_imc\.(\S+) # SKIP", done.stdout, re.M))
    unmapped = {"plain.mmap", "vm.mmap"} if mode == "trap" else set()
    assert skipped == {"plain.guest", "vm.reset_after_kill"} | unmapped
    place.host.check()
