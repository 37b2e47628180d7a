# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-live in the emulated host: the selftests of its parts in KVM and in VFIO."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_pci_config_cache as cached
from test_pci_config_live_guest import on_config

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host
from nearmetal.patches import variants
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

KVM_TEST = "x86/pci_config_live_test"
VFIO_TEST = "vfio_pci_kvm_config_test"
SKIPPED_ONLY: set[str] = set()
"""Parts of VFIO_TEST that may be skipped: none, for the disk can be reset and suspended."""
KILLS = 100
DEADLINE_S = 400.0
FAILED = "Test Assertion Failure"


@pytest.fixture(scope="module")
def on(conf: Settings) -> variants.Config:
    return on_config(conf)


@pytest.fixture(scope="module")
def machine(
    conf: Settings, cache: Cache, on: variants.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    with cached.patched(conf, cache, on, tmp_path_factory.mktemp("logs")) as booted:
        yield booted


def build(conf: Settings, cache: Cache, on: variants.Config, part: str, program: str) -> Path:
    """Where a selftest lies."""
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kernel_selftests(conf, cache, linux, part, (program,), patches=on.linux_patches)
    return folder / Path(program).name


def kvm_selftest(conf: Settings, cache: Cache, on: variants.Config, machine: Host) -> None:
    machine.forget_log()
    program = machine.place(build(conf, cache, on, "kvm", KVM_TEST))
    done = machine.shell.run(program, deadline_s=DEADLINE_S, check=False)
    print(done.stdout, done.stderr)
    # 4 is KSFT_SKIP: a skip would prove nothing here
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    machine.check()


def vfio_selftest(conf: Settings, cache: Cache, on: variants.Config, machine: Host) -> None:
    """With the disk. Says which parts failed, as KTAP has it."""
    machine.forget_log()
    program = machine.place(build(conf, cache, on, "vfio", VFIO_TEST))
    disk = machine.p2p["disk"]
    with machine.vfio([disk]):
        done = machine.shell.run(f"{program} {disk}", deadline_s=DEADLINE_S, check=False)
    print(done.stdout, done.stderr)
    failed = re.findall(r"^not ok \d+ \S+\.(\S+)", done.stdout, re.M)
    assert done.status == 0, f"{failed} of {(done.stdout + done.stderr)[-3000:]}"
    parts = re.findall(r"^ok \d+ (\S+)(.*)$", done.stdout, re.M)
    assert len(parts) >= 10
    assert {name for name, rest in parts if "SKIP" in rest} == SKIPPED_ONLY
    machine.check()


def killed_while_reading(
    conf: Settings, cache: Cache, on: variants.Config, machine: Host, kills: int = KILLS
) -> None:
    """A program whose guest reads a device without end is killed: the device is free again."""
    machine.forget_log()
    program = machine.place(build(conf, cache, on, "vfio", VFIO_TEST))
    disk = machine.p2p["disk"]
    with machine.vfio([disk]):
        machine.shell.run(
            f"for i in $(seq {kills}); do"
            f" {program} -t removal_under_reads {disk} >/dev/null 2>&1 & p=$!;"
            " sleep 0.$((i % 5 + 2)); pkill -9 -P $p; kill -9 $p; wait $p; done;"
            # a part that was begun meanwhile; the kernel keeps 15 characters of the name
            f" while pkill -9 -x {Path(program).name[:15]}; do sleep 0.1; done; true",
            deadline_s=DEADLINE_S + kills * 3,
        )
        done = machine.shell.run(
            f"{program} -t same_as_read {disk}", deadline_s=DEADLINE_S, check=False
        )
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    machine.check()


def test_kvm_selftest_passes(
    conf: Settings, cache: Cache, on: variants.Config, machine: Host
) -> None:
    kvm_selftest(conf, cache, on, machine)


def test_vfio_selftest_passes(
    conf: Settings, cache: Cache, on: variants.Config, machine: Host
) -> None:
    vfio_selftest(conf, cache, on, machine)


@pytest.mark.nightly
def test_killed_while_reading(
    conf: Settings, cache: Cache, on: variants.Config, machine: Host
) -> None:
    killed_while_reading(conf, cache, on, machine)


@pytest.mark.parametrize("value", ["on", "auto"])
def test_qemu_on_a_kernel_with_it(conf: Settings, cache: Cache, machine: Host, value: str) -> None:
    done = cached.start_qemu(machine, cached.patched_qemu(conf, cache), value, "config-live")
    assert done.status == 0, done.stdout
    assert "config space" not in done.stdout
