# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-ecam: a guest that uses the hint moves to a QEMU that gives none, and back.

There the bitmap reads as all ones, and a look at it is an exit. The guest must use the ports, as
one does that never had a hint, and look only now and then. There are no assigned functions, as in
test_pci_config_cache_migration.py.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from test_pci_config_cache_migration import migrate
from test_pci_ecam_guest import (
    WHOLE_FUNCTION,
    Place,
    counted,
    ecam_reads,
    emulated,
    kinds,
    mapped,
    port_exits,
)

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import running_guest, waiting_guest
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.patches import series, variants

pytestmark = pytest.mark.testbed

HOST_BRIDGE = "00:00.0"
LOOK = 2
"""Exits of a look for the capability: the two headers behind its own."""
LOOK_EVERY_S = 1.0


def configs(conf: Settings) -> tuple[variants.Config, variants.Config]:
    """The variants off and on; their QEMU is the same."""
    off, *every = variants.configs(series.load_series(conf.repo / "patches"), ("off", "on"))
    return off, next(one for one in every if one.series == "pci-ecam")


def guest_without_its_hint_uses_the_ports(
    conf: Settings, cache: Cache, off: variants.Config, on: variants.Config, logs: Path
) -> None:
    made = Lab.build(conf, cache, [on])
    with cache.lock("testbed"), made.host(on, logs) as host:
        host.load_kvm(on.modules)
        parts = made.guest_parts(on, host, [])
        without = dataclasses.replace(parts, extra=off.qemu_args)
        place = Place(host, parts, logs)
        with (
            running_guest(host, parts, logs=logs, label="first-on") as first,
            waiting_guest(host, without, logs=logs, label="second-off") as second,
            waiting_guest(host, parts, logs=logs, label="third-on") as third,
        ):
            assert mapped(first) == emulated(first)
            migrate(first, second, f"unix:{host.work}/migration-1")
            second.login()
            assert not second.has_property(lspci.HOST_BRIDGE, lspci.ECAM_MAPPED)
            begun = time.monotonic()
            exits = counted(place, second, "lspci -xxx")
            took = time.monotonic() - begun
            for address in kinds(second):
                assert port_exits(exits, address) == WHOLE_FUNCTION, address
            looks = ecam_reads(second, exits, HOST_BRIDGE)
            # the first look finds the bitmap's dword, too
            assert looks <= 1 + LOOK * (2 + took / LOOK_EVERY_S), f"{looks} looks at a hint"
            assert looks < WHOLE_FUNCTION

            migrate(second, third, f"unix:{host.work}/migration-2")
            third.login()
            time.sleep(2 * LOOK_EVERY_S)
            exits = counted(place, third, "lspci -xxx")
            for address in emulated(third):
                assert port_exits(exits, address) == 0, address
                assert ecam_reads(third, exits, address) == 0, address


def test_guest_without_its_hint_uses_the_ports(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    guest_without_its_hint_uses_the_ports(conf, cache, *configs(conf), tmp_path)
