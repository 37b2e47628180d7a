# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache in the emulated host: its selftest, and those that it must not break."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.machines.shell import Result
from nearmetal.patches import series, variants
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

SELFTESTS = ("x86/pci_config_cache_test", "x86/userspace_io_test", "coalesced_io_test")
SEED = 1
SELFTEST_DEADLINE_S = 400.0
"""14 s on a quiet machine of 2 cores, 80 s on one with a load of 8."""


def switched_on(conf: Settings) -> variants.Config:
    """The series' own variant ``on``."""
    every = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    return next(one for one in every if one.series == "pci-config-cache")


@pytest.fixture(scope="module")
def on(conf: Settings) -> variants.Config:
    return switched_on(conf)


@contextmanager
def patched(conf: Settings, cache: Cache, on: variants.Config, logs: Path) -> Iterator[Host]:
    """An emulated host with every product patch in its kernel, and two CPUs."""
    made = Lab.build(conf, cache, [on])
    with (
        cache.lock("testbed"),
        made.host(on, logs) as machine,
    ):
        machine.load_kvm(on.modules)
        yield machine


def selftest(
    conf: Settings,
    cache: Cache,
    on: variants.Config,
    machine: Host,
    program: str,
    options: str = "",
) -> None:
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kernel_selftests(conf, cache, linux, "kvm", SELFTESTS, patches=on.linux_patches)
    name = Path(program).name
    words = f" -s {SEED}{options}" if "pci_config" in name else ""
    machine.forget_log()
    done = machine.shell.run(
        machine.place(folder / name) + words, deadline_s=SELFTEST_DEADLINE_S, check=False
    )
    print(done.stdout, done.stderr)
    # 4 is KSFT_SKIP: a skip would prove nothing here
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    machine.check()


@pytest.fixture(scope="module")
def machine(
    conf: Settings, cache: Cache, on: variants.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    with patched(conf, cache, on, tmp_path_factory.mktemp("logs")) as booted:
        yield booted


@pytest.mark.parametrize("program", SELFTESTS)
def test_selftest_passes(
    conf: Settings, cache: Cache, on: variants.Config, machine: Host, program: str
) -> None:
    selftest(conf, cache, on, machine, program)


def patched_qemu(conf: Settings, cache: Cache) -> builds.Qemu:
    source = sources.obtain(conf, cache, "qemu")
    return builds.qemu(conf, cache, source, patches=switched_on(conf).qemu_patches)


def start_qemu(machine: Host, qemu: builds.Qemu, value: str, name: str = "config-cache") -> Result:
    """Start it with the property, and let it end at once; its status and what it said."""
    return machine.shell.run(
        "echo quit | "
        f"{machine.place(qemu.program)} -L {machine.place(qemu.firmware)} -accel kvm -M q35"
        " -nodefaults -no-user-config -display none -S -monitor stdio"
        f" -global q35-pcihost.{name}={value} 2>&1",
        check=False,
        deadline_s=120,
    )


@pytest.mark.parametrize("value", ["on", "auto"])
def test_qemu_on_a_kernel_with_it(conf: Settings, cache: Cache, machine: Host, value: str) -> None:
    """Without it: test_host.py, where a host has the unpatched kernel."""
    done = start_qemu(machine, patched_qemu(conf, cache), value)
    assert done.status == 0, done.stdout
    assert "config reads" not in done.stdout
