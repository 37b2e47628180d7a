# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated Intel host: KVM with VMX runs a guest in it, and nothing of it is left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal import run, variants
from nearmetal.cache import Cache
from nearmetal.guest import running_guest
from nearmetal.host import Host
from nearmetal.settings import Settings

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]


@pytest.fixture(scope="module")
def intel(conf: Settings) -> Settings:
    return dataclasses.replace(conf, testbed="intel")


@pytest.fixture(scope="module")
def intel_built(intel: Settings, cache: Cache, vanilla: variants.Config) -> run.Built:
    return run.build_all(intel, cache, [vanilla], with_testbed=True)


@pytest.fixture(scope="module")
def intel_host(
    intel: Settings,
    cache: Cache,
    intel_built: run.Built,
    vanilla: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Host]:
    logs = tmp_path_factory.mktemp("logs")
    with (
        cache.lock("testbed"),
        run.host_for(intel, cache, intel_built, vanilla, None, logs) as machine,
    ):
        machine.load_kvm()
        yield machine


def test_the_host_is_an_emulated_intel(intel_host: Host) -> None:
    assert intel_host.facts.provenance == "emulated"
    assert intel_host.facts.kvm_module == "kvm_intel"
    for name in ("ept", "unrestricted_guest", "vpid"):
        assert intel_host.shell.read(f"/sys/module/kvm_intel/parameters/{name}").strip() == "Y"


def test_a_guest_runs_on_it(
    intel: Settings,
    cache: Cache,
    intel_built: run.Built,
    vanilla: variants.Config,
    intel_host: Host,
    tmp_path: Path,
) -> None:
    parts = run.guest_parts(intel, cache, intel_built, vanilla, intel_host, [])
    with running_guest(intel_host, parts, logs=tmp_path, label="vanilla") as guest:
        assert "GenuineIntel" in guest.shell.read("/proc/cpuinfo")
        assert "kvm" in guest.shell.read(
            "/sys/devices/system/clocksource/clocksource0/available_clocksource"
        )


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
