# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache with a guest in which a program uses the ports itself.

Linux reads 1, 2 and 4 bytes at addresses that are multiples of that, and of functions that it
knows. The random program (guest-images/probes/nm-fuzz.c) reads any bytes of a dword, strings, and
functions that are not there, if the guest's kernel lets it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pci_config_cache import switched_on
from test_pci_config_cache_guest import (
    CHANGES,
    OPERATIONS,
    PF,
    PORT,
    SEED,
    addresses,
    bytes_are_equal,
    prepare,
    random_program,
    states,
)

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, GuestParts, running_guest
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.sources import archive as sources

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

MAX_ABSENT = 1024
"""Half of KVM's table (Documentation/virt/kvm/devices/x86-pci-config.rst)."""


def with_ports(conf: Settings, cache: Cache, parts: GuestParts) -> GuestParts:
    """The same guest, with an unpatched kernel that lets programs use I/O ports."""
    folder = conf.repo / "guest-images" / "kernel"
    kernel = builds.kernel(
        conf,
        cache,
        sources.obtain(conf, cache, "linux"),
        fragments=[folder / "base.config", folder / "ports.config"],
    )
    initramfs = builds.initramfs(conf, cache, kernel, "guest", modules=False)
    return dataclasses.replace(parts, kernel=kernel, initramfs=initramfs)


@pytest.fixture(scope="module")
def guest(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    on = switched_on(conf)
    made = Lab.build(conf, cache, [on])
    logs: Path = tmp_path_factory.mktemp("logs")
    with cache.lock("testbed"), made.host(on, logs) as host:
        host.load_kvm(on.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(on, host, assigned)
        parts = dataclasses.replace(parts, extra=(*parts.extra, *PORT, *PF))
        parts = with_ports(conf, cache, parts)
        with host.vfio(assigned), running_guest(host, parts, logs=logs, label="on") as machine:
            prepare(machine)
            yield machine


def test_random_program_reads_the_ports_itself(guest: Guest) -> None:
    said = random_program(guest, max(OPERATIONS, 1000), "-p")
    assert min(said[key] for key in (*CHANGES, "port_reads", "strings")) > 0


def test_more_functions_than_the_table_holds_are_served_by_exits(guest: Guest) -> None:
    """Absent ones leave room for those that are there (hw/pci/pci_config_cache.c)."""

    def rejected() -> int:
        path = lspci.HOST_BRIDGE
        return int(guest.qmp("qom-get", path=path, property="config-cache-rejected"))

    # Linux looks for functions on more buses than there are, as it boots
    before = rejected()
    there = len(addresses(guest, ""))
    window, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    for _ in range(2):
        done = guest.shell.run(f"nm-fuzz -p -a {SEED} 100 {window:#x}", deadline_s=900)
        said: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        print(said)
        assert said["mismatches"] == 0, said["first"]
        assert said["port_reads"] > 65536
        assert MAX_ABSENT <= states(guest)[0] <= MAX_ABSENT + there
    assert rejected() > before + 65536
    bytes_are_equal(guest)
