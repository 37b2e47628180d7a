# SPDX-License-Identifier: GPL-2.0-or-later
"""Series uncore-pmu in the emulated host: the memory controllers' PMU in a guest.

The emulated host has that of Ice Lake-SP (series icx-imc), whatever its CPU is: here one with
SVM, so that KVM runs. The guest's CPU is said to be an Ice Lake, and not to be in a VM: then its
intel_uncore, which is not patched, looks for the memory controllers.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_pmu_passthrough import patched_config

from nearmetal import run, testbed, variants
from nearmetal.cache import Cache
from nearmetal.errors import MeasurementError
from nearmetal.guest import Guest, GuestParts, running_guest
from nearmetal.host import Host
from nearmetal.measure import imc
from nearmetal.measure.bench import Bench
from nearmetal.settings import Settings
from nearmetal.tracing import counting

pytestmark = pytest.mark.testbed

NEEDED = ("linux/uncore-pmu", "qemu/uncore-pmu", "testbed/icx-imc")
MODULE = "icx_imc_vfio_pci"
DRIVER = "icx_imc_vfio_pci"
PCI = "/sys/bus/pci/devices"
CPU = "Icelake-Server-v4,vendor=GenuineIntel,-hypervisor,host-phys-bits=on,pmu=off"
RAS = (0xC18, 0xE54)
"""Of the RAS registers in a channel's page, from its beginning."""
MOST_OFF_PCT = 1.0
"""NVMe reads its commands and lists of pages from memory, and writes completions there."""


@dataclass
class Place:
    """The host, with the function of the memory controllers, and what a guest is made of."""

    host: Host
    function: str
    parts: GuestParts
    logs: Path
    addresses: list[int]
    """Where the host has the registers of each memory controller."""

    def sh(self, command: str) -> str:
        return self.host.shell.run(command, deadline_s=120).stdout.strip()

    def reload(self, *, map_: bool) -> None:
        """Load the driver anew, and give it the function."""
        device = f"{PCI}/{self.function}"
        self.sh(
            f"modprobe -r {MODULE} 2>/dev/null; modprobe {MODULE} map={'Y' if map_ else 'N'} && "
            f"echo {DRIVER} > {device}/driver_override && "
            f"echo {self.function} > /sys/bus/pci/drivers_probe"
        )
        assert self.sh(f"basename $(readlink {device}/driver)") == DRIVER

    def read(self, address: int, width: int = 32) -> int:
        """A register as the host has it."""
        return int(json.loads(self.sh(f"nm-mmio read {address:#x} {width} 1"))["value"])

    def guest_parts(self, mode: str) -> GuestParts:
        words = (
            *("-cpu", CPU),
            *("-device", "icx-ubox,bus=pcie.0,addr=1e.0,multifunction=on"),
            *("-device", f"vfio-pci,host={self.function},bus=pcie.0,addr=1e.1,icx-imc={mode}"),
        )
        return dataclasses.replace(self.parts, extra=(*self.parts.extra, *words))


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    config = patched_config(conf, NEEDED)
    made = run.build_all(conf, cache, [config], with_testbed=True)
    logs = tmp_path_factory.mktemp("logs")
    with (
        cache.lock("testbed"),
        run.host_for(
            conf, cache, made, config, None, logs, extra=testbed.MEMORY_CONTROLLERS
        ) as host,
    ):
        host.load_kvm()
        function = host.functions["imc"]
        text = host.shell.run(f"base64 {PCI}/{function}/config").stdout
        disk = host.p2p["disk"]
        with host.vfio([disk]):
            parts = run.guest_parts(conf, cache, made, config, host, [disk])
            yield Place(host, function, parts, logs, imc.addresses(base64.b64decode(text)))


@contextmanager
def guest_with(place: Place, mode: str) -> Iterator[Bench]:
    """A guest that has the PMU; ``mode`` is how its reads are answered."""
    place.reload(map_=mode == "map")
    place.host.forget_log()
    with (
        running_guest(place.host, place.guest_parts(mode), logs=place.logs, label=mode) as guest,
        counting(place.host.shell) as tracer,
    ):
        yield Bench(place.host, guest, tracer, "on", place.logs, "uncore-pmu", "amd", mode)


def guest_addresses(guest: Guest) -> list[int]:
    (function,) = guest.shell.run(imc.FIND, check=False).stdout.split()
    text = guest.shell.run(f"base64 {PCI}/{function}/config").stdout
    return imc.addresses(base64.b64decode(text))


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
        for one in found:
            if one.name.endswith("_error_pct"):
                assert max(one.values) < MOST_OFF_PCT, one
            if one.name == "imc.read_userspace_exits":
                assert set(one.values) == {0.0}, one
            if one.name == "imc.read_exits" and mode == "map":
                assert max(one.values) < 0.01, one
            if one.name == "imc.read_exits" and mode == "trap":
                assert min(one.values) >= 1 and max(one.values) < 1.1, one

        # the other registers of a channel's page
        page = guest_addresses(guest)[0] + (imc.CHANNEL_0 & ~0xFFF)
        host_page = place.addresses[0] + (imc.CHANNEL_0 & ~0xFFF)
        seen = registers(guest, page, 0x1000)
        ours = {at: place.read(host_page + at) for at in RAS}
        assert all(ours.values()), ours
        if mode == "trap":
            assert not [at for at in seen if not 0x800 <= at < 0x858], seen
        else:
            assert {at: seen.get(at, 0) for at in RAS} == ours
        for at in RAS:
            guest.shell.run(f"nm-mmio write {page + at:#x} 32 0")
        assert {at: place.read(host_page + at) for at in RAS} == ours
        # an overflow must not interrupt the host
        guest.shell.run(f"nm-mmio write {page + 0x840:#x} 32 {1 << 20 | 1 << 22 | 4:#x}")
        assert place.read(host_page + 0x840) == 1 << 22 | 4
        guest.shell.run(f"nm-mmio write {page + 0x840:#x} 32 0")
        place.host.check()


def test_there_is_one_user_and_he_leaves_nothing_behind(place: Place) -> None:
    with guest_with(place, "trap") as bench:
        box = place.addresses[0] + imc.CHANNEL_0
        page = guest_addresses(bench.guest)[0] + imc.CHANNEL_0
        bench.guest.shell.run(
            f"nm-mmio write {page + 0x48:#x} 32 {1 << 22 | 0x3004:#x} && "
            f"nm-mmio write {page + 0x18:#x} 64 0x123456"
        )
        assert place.read(box + 0x48) == 1 << 22 | 0x3004
        assert place.read(box + 0x18, 64) >= 0x123456

        second = dataclasses.replace(place.guest_parts("trap"), assigned=())
        with (
            pytest.raises(MeasurementError) as refused,
            running_guest(place.host, second, logs=place.logs, label="second"),
        ):
            pass
        assert "Device or resource busy" in f"{refused.value.message} {refused.value.detail}"

        pid = bench.guest.host.shell.run("pgrep -f guest=nearmetal- | head -n 1").stdout.strip()
        place.sh(f"kill -KILL {pid}; while [ -d /proc/{pid} ]; do sleep 0.1; done")
        assert place.read(box + 0x48) == 0
        assert place.read(box + 0x18, 64) == 0
        with pytest.raises(MeasurementError):
            bench.guest.check()
            bench.guest.qmp("query-status", deadline_s=5)


def test_without_the_property_there_is_no_pmu(place: Place) -> None:
    place.reload(map_=False)
    parts = place.guest_parts("off")
    with running_guest(place.host, parts, logs=place.logs, label="off") as guest:
        address = guest_addresses(guest)[0] + imc.FREE_RUNNING_READ
        said = guest.shell.run(f"nm-mmio read {address:#x} 64 1").stdout
        assert json.loads(said)["value"] in (0, (1 << 64) - 1)


def test_qemu_says_what_is_missing(place: Place) -> None:
    """``map`` where the host's kernel does not allow it."""
    place.reload(map_=False)
    with (
        pytest.raises(MeasurementError) as refused,
        running_guest(place.host, place.guest_parts("map"), logs=place.logs, label="no-map"),
    ):
        pass
    said = f"{refused.value.message} {refused.value.detail}"
    print(said)
    assert MODULE in said.replace("-", "_") and "map" in said


@pytest.mark.nightly
def test_the_hosts_perf_and_a_user_exclude_each_other(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    """On a host whose CPU is an Ice Lake, so that perf has these PMUs; KVM cannot run there."""
    config: variants.Config = patched_config(conf, NEEDED)
    made = run.build_all(conf, cache, [config], with_testbed=True)
    extra = (*testbed.MEMORY_CONTROLLERS, "-cpu", "Icelake-Server-v4,-hypervisor")
    with (
        cache.lock("testbed"),
        run.host_for(conf, cache, made, config, None, tmp_path, extra=extra) as host,
    ):
        function = host.functions["imc"]
        device = f"{PCI}/{function}"
        host.shell.run(
            f"modprobe {MODULE} && echo {DRIVER} > {device}/driver_override && "
            f"echo {function} > /sys/bus/pci/drivers_probe"
        )
        counts = "perf stat -x, -a -e uncore_imc_0/event=0x04,umask=0x30/ sleep"
        alone = host.shell.run(f"{counts} 1 2>&1").stdout
        assert "<not" not in alone, alone
        (cdev,) = host.shell.run(f"ls {device}/vfio-dev").stdout.split()
        holder = host.shell.start("exec nm-vfio")
        holder.channel.sendall(f"open {function}\n".encode())
        answer = _lines(holder.channel, 2)
        assert json.loads(answer[1])["errno"] == 0, (cdev, answer)
        refused = host.shell.run(f"{counts} 1 2>&1", check=False).stdout
        print(refused)
        assert "<not" in refused or "busy" in refused, refused
        holder.close()
        again = host.shell.run(
            f"for i in $(seq 50); do {counts} 1 2>&1 | grep -v '<not' && exit; sleep 0.2; done; "
            "exit 1"
        ).stdout
        assert "uncore_imc_0" in again

        pid = host.shell.run(f"{counts} 600 > /dev/null 2>&1 < /dev/null & echo $!").stdout.strip()
        host.shell.run(
            f"for i in $(seq 100); do ls -l /proc/{pid}/fd | grep -q perf_event && exit; "
            "sleep 0.2; done; exit 1"
        )
        holder = host.shell.start("exec nm-vfio")
        holder.channel.sendall(f"open {function}\n".encode())
        answer = _lines(holder.channel, 2)
        assert json.loads(answer[1])["errno"] == 16, answer
        holder.close()
        host.shell.run(f"kill {shlex.quote(pid)}")
        host.check()


def _lines(channel: object, count: int) -> list[str]:
    """The first lines that a program prints."""
    channel.settimeout(60)  # type: ignore[attr-defined]
    data = b""
    while data.count(b"\n") < count:
        got = channel.recv(1 << 16)  # type: ignore[attr-defined]
        assert got, f"it has ended: {data!r}"
        data += got
    return data.decode().splitlines()
