# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache: a guest moves between QEMUs that have the cache on and off.

The random program runs in the guest while it moves and compares each read, as in
test_pci_config_cache_guest.py, but for the edu device, whose state QEMU does not migrate. There
are no assigned functions: vfio does not migrate an NVMe, so they would be unplugged before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest, waiting_guest
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.patches import series, variants

pytestmark = pytest.mark.testbed

SEED = int(os.environ.get("NEARMETAL_FUZZ_SEED", random.SystemRandom().randrange(1 << 31)))
OPERATIONS = 10**7
"""It is ended on the other side, some seconds after the guest arrived there."""
SECONDS_ON = 5.0
PORT = ("-device", "pcie-root-port,id=hp0,chassis=20,slot=20")
BEHIND = ("-device", "virtio-rng-pci,bus=hp0")
"""For the random program, which gives the bus behind the port other numbers."""
MIGRATION_DEADLINE_S = 180.0
RESULT = "/run/fuzz.json"


def migrate(source: Guest, target: Guest, uri: str) -> None:
    """Move a guest; the source's QEMU stays, stopped."""
    target.qmp("migrate-incoming", uri=uri)
    source.qmp("migrate", uri=uri)
    end = time.monotonic() + MIGRATION_DEADLINE_S
    while (state := source.qmp("query-migrate").get("status")) != "completed":
        assert state not in ("failed", "cancelled"), source.qmp("query-migrate")
        assert time.monotonic() < end, f"the migration is '{state}'"
        time.sleep(0.3)
    while target.qmp("query-status")["status"] != "running":
        assert time.monotonic() < end, "the target does not run"
        time.sleep(0.3)


def move(source: Guest, target: Guest, uri: str) -> None:
    """Migrate in the middle of the random program, and log in on the other side."""
    assert not done(source), source.shell.read(RESULT)
    migrate(source, target, uri)
    target.login()
    assert not done(target), target.shell.read(RESULT)


def done(guest: Guest) -> bool:
    return guest.shell.run(f"test -e {RESULT}", check=False).status == 0


def address(guest: Guest, selector: str) -> str:
    return guest.shell.run(f"lspci -D -n {selector}").stdout.split()[0]


def start_program(guest: Guest, seed: int) -> None:
    """Start the random program so that it outlives the login."""
    listing = guest.shell.run("lspci -D -vv -d ::0604", deadline_s=120).stdout
    (port,) = (block.split()[0] for block in listing.split("\n\n") if "Slot #20," in block)
    writable = " ".join(f"-w {address(guest, f'-d ::{kind}')}" for kind in ("0106", "0c05"))
    window, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    guest.shell.run(
        f"rm -f {RESULT}; setsid sh -c 'nm-fuzz {writable} -b {port} {seed}"
        f" {OPERATIONS} {window:#x} >{RESULT}.part 2>&1; mv {RESULT}.part {RESULT}'"
        " </dev/null >/dev/null 2>&1 &"
    )


def result(guest: Guest) -> dict[str, int]:
    """End the random program; what it counted."""
    time.sleep(SECONDS_ON)
    guest.shell.run("pkill -TERM -x nm-fuzz")
    end = time.monotonic() + 120
    while not done(guest):
        assert time.monotonic() < end, "the random program does not end"
        time.sleep(0.5)
    said: dict[str, int] = json.loads(guest.shell.read(RESULT).splitlines()[-1])
    print(said)
    return said


def active(guest: Guest) -> int:
    return int(guest.qmp("qom-get", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE))


def test_guest_moves_between_on_and_off(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    off, *every = variants.configs(series.load_series(conf.repo / "patches"), ("off", "on"))
    on = next(one for one in every if one.series == "pci-config-cache")
    assert off.qemu_patches == on.qemu_patches
    made = Lab.build(conf, cache, [on])
    with cache.lock("testbed"), made.host(on, tmp_path) as host:
        host.load_kvm(on.modules)
        parts = made.guest_parts(on, host, [])
        parts = dataclasses.replace(parts, extra=(*parts.extra, *PORT, *BEHIND))
        without = dataclasses.replace(parts, extra=(*off.qemu_args, *PORT, *BEHIND))
        with (
            running_guest(host, parts, logs=tmp_path, label="first-on") as first,
            waiting_guest(host, without, logs=tmp_path, label="second-off") as second,
            waiting_guest(host, parts, logs=tmp_path, label="third-on") as third,
        ):
            assert active(first) == 1
            start_program(first, SEED)
            move(first, second, f"unix:{host.work}/migration-1")
            assert not second.has_property(lspci.HOST_BRIDGE, lspci.CACHE_ACTIVE) or not active(
                second
            )
            said = result(second)
            assert said["mismatches"] == 0, f"seed {SEED}: {said}"
            assert said["reads"] > said["operations"] > 0
            start_program(second, SEED + 1)
            move(second, third, f"unix:{host.work}/migration-2")
            assert active(third) == 1
            said = result(third)
            assert said["mismatches"] == 0, f"seed {SEED + 1}: {said}"
            assert said["reads"] > said["operations"] > 0
            third.shell.run("lspci -xxx", deadline_s=120)
            kept = third.qmp("qom-get", path=lspci.HOST_BRIDGE, property="config-cache-functions")
            assert int(kept) > 0, "KVM serves nothing behind the migration"
