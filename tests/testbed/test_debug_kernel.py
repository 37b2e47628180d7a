# SPDX-License-Identifier: GPL-2.0-or-later
"""The product series in a host kernel that looks for its own mistakes (debug.config).

KASAN, lockdep and checks for sleeping where it must not; the console is watched for what they
say. Also where the KUnit tests of the series are run: at boot.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from errno import ENOMEM
from pathlib import Path

import pytest
import test_direct_p2p as isolation
import test_pci_config_cache as selftests
import test_pci_config_live as live

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.patches import variants

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

ISOLATION = {
    name.removeprefix("test_"): proof
    for name, proof in vars(isolation).items()
    if name.startswith("test_") and name != "test_selftest_passes"
}
KUNIT_SUITES = ("pci-direct-p2p",)
MOST_ALLOCATIONS = 300
"""Of a claim; there are about as many as functions and ports, and some in the IOMMU's driver."""
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


def test_a_claim_that_fails_anywhere_leaves_nothing_behind(machine: isolation.Place) -> None:
    """Each allocation on its way fails once."""
    with isolation.settled(machine):
        owner = machine.program()
        peer = isolation.open_both(machine, owner)
        third = machine.command("third")
        # else only those fail that can't wait
        machine.sh("echo 0 > /sys/kernel/debug/failslab/ignore-gfp-wait")
        failed = 0
        for nth in range(1, MOST_ALLOCATIONS):
            seen = owner.ask("set-failing", machine.functions["disk"], nth, peer)
            if not seen["failed"]:
                break
            failed += seen["errno"] == ENOMEM
            # some can do without
            assert seen["errno"] in (0, ENOMEM), (nth, seen)
            if not seen["errno"]:
                isolation.release(machine, owner)
            machine.is_restored()
            assert machine.command("third") == third
        print(f"{failed} of {nth - 1} allocations kept a claim from being made")
        assert failed > 4
        assert seen == {"errno": 0, "failed": 0}
        assert isolation.flags(machine, owner) == isolation.ENABLE


def test_a_claim_ends_before_the_host_sleeps(machine: isolation.Place) -> None:
    """Seen from outside, while nothing runs in the host."""
    with isolation.settled(machine):
        owner = machine.program()
        peer = isolation.open_both(machine, owner)
        isolation.start_traffic(machine, owner)
        third = machine.command("third")
        assert isolation.claim(machine, owner, peer) == 0
        assert set(machine.acs_from_outside().items()) == set(machine.acs().items())
        assert machine.acs() != machine.before
        # to sleep and, five seconds later, up again, with all processes frozen meanwhile
        machine.sh("echo freezer > /sys/power/pm_test")
        asleep = machine.host.shell.start("echo freeze > /sys/power/state")
        end = time.monotonic() + 60
        while machine.acs_from_outside() != machine.before:
            assert not asleep.ended, "the host slept with redirection off"
            assert time.monotonic() < end, "the host doesn't go to sleep"
        # it sleeps still
        time.sleep(1)
        assert not asleep.ended
        isolation.wait_for(lambda: asleep.ended, 60)
        machine.sh("echo none > /sys/power/pm_test")
        assert "PM: suspend exit" in machine.sh("dmesg")
        assert isolation.flags(machine, owner) == 0
        machine.is_restored()
        assert machine.command("third") == third
        assert isolation.write_to_peer(machine, owner).direct == 0
        assert isolation.claim(machine, owner, peer) == 0


def test_selftest_of_direct_p2p(conf: Settings, cache: Cache, machine: isolation.Place) -> None:
    with isolation.settled(machine):
        isolation.selftest(conf, cache, machine)


def test_selftest_of_the_config_cache(
    conf: Settings, cache: Cache, off: variants.Config, machine: isolation.Place
) -> None:
    machine.host.load_kvm()
    selftests.selftest(conf, cache, off, machine.host, "x86/pci_config_cache_test", FEWER)


def test_config_space_that_is_read_live(
    conf: Settings, cache: Cache, off: variants.Config, machine: isolation.Place
) -> None:
    """Its selftests, and programs that are killed while their guests read a device."""
    machine.host.load_kvm()
    live.kvm_selftest(conf, cache, off, machine.host)
    live.vfio_selftest(conf, cache, off, machine.host)
    live.killed_while_reading(conf, cache, off, machine.host)


def test_lockdep_was_on_to_the_end(machine: isolation.Place) -> None:
    assert re.search(r"debug_locks:\s+1", machine.sh("cat /proc/lockdep_stats"))
