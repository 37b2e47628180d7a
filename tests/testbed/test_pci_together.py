# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache and pci-ecam switched on together, in a guest that uses the hint.

What is mapped is read without an exit. What isn't goes to the ports, for KVM serves them: one exit
for each register that no cache may keep, and none for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from test_pci_config_cache_guest import OPERATIONS, dump, random_program
from test_pci_ecam_guest import (
    Place,
    booted,
    counted,
    ecam_reads,
    emulated,
    kinds,
    mapped,
    place_for,
    port_exits,
)

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest
from nearmetal.measure import lspci
from nearmetal.patches import series, variants
from nearmetal.pci.registers import CONFIG_SIZE, cacheable

pytestmark = pytest.mark.testbed


@pytest.fixture(scope="module")
def place(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    found = {one.series: one for one in plan}
    cached, by_ecam = found["pci-config-cache"], found["pci-ecam"]
    both = dataclasses.replace(
        by_ecam,
        modules={**cached.modules, **by_ecam.modules},
        qemu_args=(*cached.qemu_args, *by_ecam.qemu_args),
    )
    with place_for(conf, cache, both, tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="module")
def guest(place: Place) -> Iterator[Guest]:
    with booted(place, "together") as made:
        yield made


def test_each_function_is_read_the_better_way(place: Place, guest: Guest) -> None:
    assert mapped(guest) == emulated(guest)
    bytes_of = dump(guest)
    exits = counted(place, guest, "lspci -xxx")
    wanted = 0
    for address, kind in kinds(guest).items():
        assert ecam_reads(guest, exits, address) == 0, address
        kept = cacheable(bytes_of[f"0000:{address}"], assigned=kind == "assigned")
        live = 0 if kind == "emulated" else CONFIG_SIZE // 4 - len(kept)
        assert port_exits(exits, address) == live, address
        wanted += live
    print(f"{wanted} exits to QEMU")
    assert lspci.config_exits_userspace(exits) == wanted > 0


def test_random_program_sees_the_same(guest: Guest) -> None:
    """Its reads through sysfs go by ECAM where a page is mapped, and to KVM's table elsewhere."""
    said = random_program(guest, OPERATIONS)
    assert said["mismatches"] == 0
