# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated Intel host: KVM with VMX runs a guest in it, and nothing of it is left behind.

And the VMX half of series pmu-passthrough: KVM's selftests, and a guest with a mediated PMU.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_pmu_passthrough as pmu

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import GuestParts, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure.vmexit.counters import overflow_interrupts
from nearmetal.patches import variants

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]


@pytest.fixture(scope="module")
def intel(conf: Settings) -> Settings:
    return dataclasses.replace(conf, testbed="intel")


@pytest.fixture(scope="module")
def intel_built(intel: Settings, cache: Cache, vanilla: variants.Config) -> Lab:
    return Lab.build(intel, cache, [vanilla])


@pytest.fixture(scope="class")
def intel_host(
    intel: Settings,
    cache: Cache,
    intel_built: Lab,
    vanilla: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Host]:
    logs = tmp_path_factory.mktemp("logs")
    with (
        cache.lock("testbed"),
        intel_built.host(vanilla, logs) as machine,
    ):
        machine.load_kvm()
        yield machine


class TestVanilla:
    """Each class has a host of its own: there is one testbed at a time."""

    def test_the_host_is_an_emulated_intel(self, intel_host: Host) -> None:
        assert intel_host.facts.provenance == "emulated"
        assert intel_host.facts.kvm_module == "kvm_intel"
        for name in ("ept", "unrestricted_guest", "vpid", "enable_apicv"):
            assert intel_host.shell.read(f"/sys/module/kvm_intel/parameters/{name}").strip() == "Y"

    def test_a_guest_runs_on_it(
        self,
        intel: Settings,
        cache: Cache,
        intel_built: Lab,
        vanilla: variants.Config,
        intel_host: Host,
        tmp_path: Path,
    ) -> None:
        parts = intel_built.guest_parts(vanilla, intel_host, [])
        with running_guest(intel_host, parts, logs=tmp_path, label="vanilla") as guest:
            assert "GenuineIntel" in guest.shell.read("/proc/cpuinfo")
            assert "kvm" in guest.shell.read(
                "/sys/devices/system/clocksource/clocksource0/available_clocksource"
            )


NEEDED = (
    "linux/pmu-fastpath",
    "linux/pmu-passthrough",
    "qemu/pmu-passthrough",
    "testbed/bochs-apicv",
    "testbed/bochs-core-pmu",
)
MEDIATED = {"kvm": {"mediated_pmu_fastpath": "Y"}, "kvm_intel": {"enable_mediated_pmu": "Y"}}
SELFTESTS = (
    "x86/pmu_eventsel_test",
    "x86/pmu_fastpath_test",
    "x86/pmu_counters_test",
    "x86/pmu_event_filter_test",
    "x86/vmx_pmu_caps_test",
)
SAMPLES = 20
PERIOD = 1_000_000
PROFILE = (
    f"perf record -q -e instructions:u -c {PERIOD} -o /tmp/p -- "
    f"nm-pmu spin {SAMPLES * PERIOD // 2} > /dev/null && perf script -i /tmp/p -F ip | grep -c ."
)
"""A loop has two instructions."""
LOOPS = 200_000_000
"""Of which the emulator needs longer than a migration takes."""


@contextmanager
def mediated(
    intel: Settings, cache: Cache, config: variants.Config, logs: Path
) -> Iterator[tuple[Host, Lab]]:
    """An emulated Intel host whose KVM has a mediated PMU."""
    made = Lab.build(intel, cache, [config])
    with cache.lock("testbed"), made.host(config, logs) as machine:
        said = machine.shell.run("dmesg").stdout
        for what, number in (
            ("version", 5),
            ("generic counters", 8),
            ("fixed-purpose counters", 4),
        ):
            assert re.search(rf"\.\.\. {what}: +{number}$", said, re.M), what
        machine.load_kvm(MEDIATED)
        yield machine, made


@pytest.fixture(scope="module")
def patched(intel: Settings) -> variants.Config:
    return pmu.patched_config(intel, NEEDED)


@pytest.fixture(scope="class")
def place(
    intel: Settings,
    cache: Cache,
    patched: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Host, Lab]]:
    with mediated(intel, cache, patched, tmp_path_factory.mktemp("logs")) as pair:
        yield pair


@pytest.fixture
def parts(
    intel: Settings, cache: Cache, patched: variants.Config, place: tuple[Host, Lab]
) -> GuestParts:
    """A guest whose selectors are passed through."""
    machine, made = place
    plain = made.guest_parts(patched, machine, [])
    return dataclasses.replace(plain, accel={"pmu-passthrough": "on"})


class TestMediated:
    """With the series, and KVM's mediated PMU."""

    @pytest.mark.parametrize("program", SELFTESTS)
    def test_selftest_passes(
        self,
        intel: Settings,
        cache: Cache,
        patched: variants.Config,
        place: tuple[Host, Lab],
        program: str,
    ) -> None:
        pmu.selftest(intel, cache, patched, place[0], program, SELFTESTS)

    def test_a_guest_samples_by_interrupts_of_its_own(
        self, place: tuple[Host, Lab], parts: GuestParts, tmp_path: Path
    ) -> None:
        """With selectors passed through: each sample is one interrupt in the host's row VPMI."""
        machine, _ = place
        with running_guest(machine, parts, logs=tmp_path, label="profile") as guest:
            before = overflow_interrupts(machine.shell.read("/proc/interrupts"))
            taken = int(guest.shell.run(PROFILE, deadline_s=300).stdout)
            after = overflow_interrupts(machine.shell.read("/proc/interrupts"))
        assert taken == SAMPLES
        assert after - before == SAMPLES
        machine.check()

    def test_counts_are_whole_in_a_guest_that_was_migrated(
        self, place: tuple[Host, Lab], parts: GuestParts, tmp_path: Path
    ) -> None:
        """Selectors that are passed through are the source's, and then the target's."""
        pmu.counts_are_whole_in_a_guest_that_was_migrated(place[0], parts, tmp_path, LOOPS)

    def test_qemu_refuses_a_cpu_without_pmu(
        self, place: tuple[Host, Lab], patched: variants.Config
    ) -> None:
        """Before it has KVM disable the PMU, which would undo what passes selectors through."""
        accel = "kvm,pmu-passthrough=on"
        done = pmu.start_qemu(place, patched, accel, "host,pmu=off")
        assert done.status == 1
        assert "pmu-passthrough=on takes a CPU with pmu=on" in done.stderr
        again = pmu.start_qemu(place, patched, accel)
        assert again.status == 0, again.stderr


def test_the_emulator_dies_with_the_harness(intel: Settings, tmp_path: Path) -> None:
    """kill -9 of the harness takes Bochs along; a next run then finds nothing in its way."""
    words = [sys.executable, "-m", "nearmetal", "boot", "--no-guest", "--testbed", "intel"]
    log = (tmp_path / "log").open("wb")
    harness = subprocess.Popen(
        [*words, "--results-dir", str(tmp_path)], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        emulator = _emulator_of(harness, deadline_s=600)
        harness.send_signal(signal.SIGKILL)
        harness.wait()
        end = time.monotonic() + 10
        while Path("/proc", str(emulator)).exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert not Path("/proc", str(emulator)).exists()
    finally:
        harness.kill()
        harness.wait()


def _emulator_of(harness: subprocess.Popen[bytes], deadline_s: float) -> int:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and os.access(entry / "stat", os.R_OK):
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    name = Path((entry / "cmdline").read_bytes().split(b"\0")[0].decode()).name
                except OSError:
                    continue
                if parent == harness.pid and name == "bochs":
                    return int(entry.name)
        assert harness.poll() is None, "the harness ended"
        time.sleep(0.5)
    raise AssertionError("no emulator was started")
