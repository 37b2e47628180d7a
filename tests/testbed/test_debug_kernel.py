# SPDX-License-Identifier: GPL-2.0-or-later
"""The product series in a host kernel that looks for its own mistakes (debug.config).

KASAN, lockdep and checks for sleeping where it must not; the console is watched for what they
say. Also where the KUnit tests of the series are run: at boot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_direct_p2p as isolation
import test_pci_config_cache as selftests

from nearmetal import variants
from nearmetal.cache import Cache
from nearmetal.settings import Settings

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

ISOLATION = {
    name.removeprefix("test_"): proof
    for name, proof in vars(isolation).items()
    if name.startswith("test_") and name != "test_selftest_passes"
}
KUNIT_SUITES = ("pci-direct-p2p",)
FEWER = " -n 500"
"""Iterations of pci_config_cache_test; such a kernel is several times slower."""


@pytest.fixture(scope="module")
def off(conf: Settings) -> variants.Config:
    return isolation.patched_config(conf)


@pytest.fixture(scope="module")
def machine(
    conf: Settings,
    cache: Cache,
    off: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[isolation.Place]:
    logs: Path = tmp_path_factory.mktemp("logs")
    with isolation.place_for(conf, cache, off, logs, debug=True) as place:
        yield place


def test_the_kernel_looks_for_mistakes(machine: isolation.Place) -> None:
    """Else its silence would say nothing."""
    config = machine.sh("zcat /proc/config.gz").splitlines()
    assert {"CONFIG_KASAN=y", "CONFIG_PROVE_LOCKING=y"} <= set(config)
    # lockdep turns itself off with the first report, and where it runs out of room
    assert re.search(r"debug_locks:\s+1", machine.sh("cat /proc/lockdep_stats"))


@pytest.mark.parametrize("suite", KUNIT_SUITES)
def test_kunit_passed_at_boot(machine: isolation.Place, suite: str) -> None:
    log = machine.sh(f"cat /sys/kernel/debug/kunit/{suite}/results")
    print(log)
    assert re.search(rf"^ok \d+ {suite}$", log, re.M)
    assert not re.search(r"^ *not ok|# SKIP", log, re.M)


@pytest.mark.parametrize("name", ISOLATION)
def test_isolation_holds(machine: isolation.Place, name: str) -> None:
    proof: Callable[[isolation.Place], None] = ISOLATION[name]
    with isolation.settled(machine):
        proof(machine)


def test_selftest_of_direct_p2p(conf: Settings, cache: Cache, machine: isolation.Place) -> None:
    with isolation.settled(machine):
        isolation.selftest(conf, cache, machine)


def test_selftest_of_the_config_cache(
    conf: Settings, cache: Cache, off: variants.Config, machine: isolation.Place
) -> None:
    machine.host.load_kvm()
    selftests.selftest(conf, cache, off, machine.host, "x86/pci_config_cache_test", FEWER)


def test_lockdep_was_on_to_the_end(machine: isolation.Place) -> None:
    assert re.search(r"debug_locks:\s+1", machine.sh("cat /proc/lockdep_stats"))
