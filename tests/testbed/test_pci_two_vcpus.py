# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache, -ecam and -live with two vCPUs: one takes away what the other uses.

While one vCPU plugs, resets, renumbers and switches off functions, the other one reads and writes
their config space without end, by ECAM and by the ports (guest-images/probes/nm-touch.c). A write
is on its way when its function goes: QEMU has found it and waits for its lock. What ends QEMU
then, or shows an old byte, shows in no guest with one vCPU.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pci_config_cache_guest import (
    EDU,
    OPERATIONS,
    PF,
    PORT,
    addresses,
    empty_port,
    plug,
    prepare,
    random_program,
    unplug,
)

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.patches import series, variants

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

SERIES = ("pci-config-cache", "pci-ecam", "pci-config-live")
CYCLES = 30
"""QEMU's first form of pci-ecam was ended in the first of them; vanilla passes 120."""
TOUCHED = "/run/touch.json"
DEADLINE_S = 60.0


@pytest.fixture(scope="module", params=SERIES)
def guest(
    request: pytest.FixtureRequest,
    conf: Settings,
    cache: Cache,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guest]:
    """A guest of two vCPUs with two assigned NVMe functions and an empty root port."""
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    on = next(one for one in plan if one.series == request.param)
    made = Lab.build(conf, cache, [on])
    logs: Path = tmp_path_factory.mktemp("logs")
    with cache.lock("testbed"), made.host(on, logs) as host:
        host.load_kvm(on.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(on, host, assigned)
        parts = dataclasses.replace(parts, cpus=2, extra=(*parts.extra, *PORT, *PF))
        with host.vfio(assigned), running_guest(host, parts, logs=logs, label="two") as machine:
            prepare(machine)
            assert int(machine.shell.run("nproc").stdout) == 2
            yield machine


@contextmanager
def touching(guest: Guest, *functions: str) -> Iterator[None]:
    """The second vCPU uses the functions; afterwards it must have found them there, and gone."""
    window, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    words = " ".join(one.removeprefix("0000:") for one in functions)
    guest.shell.run(
        f"rm -f {TOUCHED}; setsid sh -c 'nm-touch 1 {window:#x} {words} >{TOUCHED}.part 2>&1;"
        f" mv {TOUCHED}.part {TOUCHED}' </dev/null >/dev/null 2>&1 &"
    )
    yield
    guest.shell.run("pkill -TERM -x nm-touch")
    end = time.monotonic() + DEADLINE_S
    while guest.shell.run(f"test -e {TOUCHED}", check=False).status != 0:
        assert time.monotonic() < end, "the second vCPU does not end"
        time.sleep(0.5)
    said: dict[str, int] = json.loads(guest.shell.read(TOUCHED))
    print(said)
    assert said["rounds"] > 0
    assert said["present"] > 0


def behind(guest: Guest) -> str:
    """Where a function is that is plugged behind the empty port."""
    edu = plug(guest)
    unplug(guest)
    return edu


def test_functions_come_and_go_under_reads_and_writes(guest: Guest) -> None:
    """QEMU lives, the guest finds the function each time, and never one that is gone."""
    port, edu = empty_port(guest), behind(guest)
    with touching(guest, edu, port):
        for _ in range(CYCLES):
            assert plug(guest) == edu
            unplug(guest)
            assert not addresses(guest, f"-d {EDU}"), "the guest found a device that is gone"
    guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
    assert not addresses(guest, f"-d {EDU}"), "the guest found a device that is gone"


def test_buses_are_reset_and_renumbered_under_reads_and_writes(guest: Guest) -> None:
    """The random program compares each byte; the other vCPU's writes change none."""
    port, edu = empty_port(guest), behind(guest)
    nvme = addresses(guest, "-d ::0108")
    with touching(guest, edu, port, *nvme):
        live = guest.has_property(lspci.HOST_BRIDGE, lspci.LIVE_ACTIVE)
        said = random_program(guest, max(OPERATIONS, 400), "-q" if live else "")
    assert said["mismatches"] == 0


def test_reset_under_reads_and_writes(guest: Guest) -> None:
    """The last test, for what the second vCPU does ends with the guest that does it."""
    guest.qmp("set-action", reboot="reset")
    window, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    words = " ".join(one.removeprefix("0000:") for one in addresses(guest, ""))
    for _ in range(3):
        guest.shell.run(
            "setsid sh -c 'nm-touch 1"
            f" {window:#x} {' '.join(words.split()[:16])}' </dev/null >/dev/null 2>&1 &"
        )
        start = guest.console.size
        guest.qmp("system_reset")
        guest.comes_up_again(start)
    prepare(guest)
    assert addresses(guest, "-d ::0108")
