# SPDX-License-Identifier: GPL-2.0-or-later
"""Series direct-p2p where the IOMMU is off: there is nothing that could be claimed.

With ``enable_unsafe_noiommu_mode`` VFIO lets functions that no IOMMU is responsible for be bound
to an iommufd context all the same. They must not have the feature: nothing can own their DMA, and
what takes ownership of a function dereferences what such a function doesn't have. The kernel is one
of its own (noiommu.config).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOTTY
from pathlib import Path

import pytest
import test_direct_p2p as isolation

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.patches import variants

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

UNSAFE = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
DIED = "the host died of a claim of functions without an IOMMU"
"""What the proof says when it fails so: tests/mutants holds the mutant against it."""


@contextmanager
def unprotected(
    conf: Settings, cache: Cache, config: variants.Config, logs: Path
) -> Iterator[Host]:
    """An emulated host without an IOMMU; a user of VFIO may have two functions nevertheless."""
    made = Lab.build(conf, cache, [config])
    made.kernels[config.linux_patches] = isolation.kernel_with(
        conf, cache, config, "noiommu.config"
    )
    with (
        cache.lock("testbed"),
        made.host(config, logs, iommu=False) as host,
    ):
        host.shell.run(f"echo Y > {UNSAFE}; echo Y > {isolation.PARAMETER}")
        for name in ("peer", "disk"):
            host.bind_vfio(host.p2p[name])
        host.forget_log()
        yield host


def has_no_feature(host: Host) -> None:
    """PROBE, GET and SET, by either function, say that there is no such thing."""
    peer, disk = host.p2p["peer"], host.p2p["disk"]
    owner = isolation.Program(host)
    ids = {one: owner.do("open", one)["id"] for one in (peer, disk)}
    try:
        for one, other in ((disk, peer), (peer, disk)):
            for words in (
                ("set", one, isolation.ENABLE, 1, 0, ids[other]),
                ("set", one, 0, 0, 0),
                ("get", one),
                ("probe", one),
            ):
                assert owner.ask(*words)["errno"] == ENOTTY, words
    except MeasurementError as error:
        raise AssertionError(f"{DIED}: {error.message}\n{error.detail}") from None
    owner.end()
    host.check()


@pytest.fixture(scope="module")
def machine(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    logs = tmp_path_factory.mktemp("logs")
    with unprotected(conf, cache, isolation.patched_config(conf), logs) as host:
        yield host


def test_what_has_no_iommu_is_not_claimed(machine: Host) -> None:
    has_no_feature(machine)


def test_selftest_passes(conf: Settings, cache: Cache, machine: Host) -> None:
    """The kernel's own, which skips all that needs an IOMMU."""
    functions = [machine.p2p[name] for name in ("peer", "disk")]
    told = isolation.run_selftest(conf, cache, machine, functions)
    assert re.search(r"^ok \d+ global.noiommu$", told, re.M)
