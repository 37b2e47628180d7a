# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache with a guest: nothing that changes config space may go unnoticed.

The random program holds each read through the ports against the memory-mapped window, which no
cache serves (guest-images/probes/nm-fuzz.c). NEARMETAL_FUZZ_SEED and NEARMETAL_FUZZ_OPERATIONS
set its seed and its length; the seed is printed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.patches import series, variants
from nearmetal.pci.registers import cacheable, parse_dump

pytestmark = pytest.mark.testbed

SEED = int(os.environ.get("NEARMETAL_FUZZ_SEED", random.SystemRandom().randrange(1 << 31)))
OPERATIONS = int(os.environ.get("NEARMETAL_FUZZ_OPERATIONS", "120"))
LONG = OPERATIONS >= 1000
EDU = "1234:11e8"
"""QEMU, docs/specs/edu.rst"""
PORT_SLOT = 20
PORT = ("-device", f"pcie-root-port,id=hp0,chassis={PORT_SLOT},slot={PORT_SLOT}")
NOBODYS_VFS = "for f in /sys/bus/pci/devices/*/sriov_drivers_autoprobe; do echo 0 > $f; done"
VFS = 4
PF_SERIAL = "nmpf"
PF = (
    *("-device", "pcie-root-port,id=pf0,chassis=21,slot=21"),
    *("-device", "nvme-subsys,id=subsys0"),
    "-device",
    f"nvme,serial={PF_SERIAL},subsys=subsys0,bus=pf0,sriov_max_vfs={VFS},"
    f"sriov_vq_flexible={2 * VFS},sriov_vi_flexible={VFS}",
)
"""A physical function that QEMU emulates, with virtual ones (docs/system/devices/nvme.rst)."""
HOTPLUG_DEADLINE_S = 60.0
UNBIND_NVME = (
    "for d in /sys/bus/pci/drivers/nvme/0000:*; do "
    '[ -e "$d" ] && basename $d > /sys/bus/pci/drivers/nvme/unbind; done; true'
)


@pytest.fixture(scope="module")
def on(conf: Settings) -> variants.Config:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    return next(one for one in plan if one.series == "pci-config-cache")


@pytest.fixture(scope="module")
def guest(
    conf: Settings, cache: Cache, on: variants.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A guest with two assigned NVMe functions that nobody uses, and an empty root port."""
    made = Lab.build(conf, cache, [on])
    logs: Path = tmp_path_factory.mktemp("logs")
    with (
        cache.lock("testbed"),
        made.host(on, logs, extra=PF) as host,
    ):
        host.load_kvm(on.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(on, host, assigned)
        parts = dataclasses.replace(parts, extra=(*parts.extra, *PORT, *PF))
        with host.vfio(assigned), running_guest(host, parts, logs=logs, label="on") as machine:
            prepare(machine)
            yield machine


def prepare(guest: Guest) -> None:
    """The NVMe functions are nobody's, and virtual ones will be."""
    guest.shell.run(UNBIND_NVME)
    guest.shell.run(NOBODYS_VFS)


def until(true: Callable[[], bool], what: str, deadline_s: float = HOTPLUG_DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"{what} did not happen within {deadline_s:.0f} s"
        time.sleep(0.5)


def addresses(guest: Guest, selector: str) -> list[str]:
    listing = guest.shell.run(f"lspci -D -n {selector}", check=False).stdout
    return [line.split()[0] for line in listing.splitlines()]


def empty_port(guest: Guest) -> str:
    """The root port in front of the slot PORT_SLOT."""
    listing = guest.shell.run("lspci -D -vv -d ::0604", deadline_s=120).stdout
    blocks = [block for block in listing.split("\n\n") if f"Slot #{PORT_SLOT}," in block]
    return blocks[0].split()[0]


def physical_function(machine: Guest | Host) -> str:
    """The function that can have virtual ones."""
    (path,) = machine.shell.run("ls -d /sys/bus/pci/devices/*/sriov_numvfs").stdout.split()
    return path.split("/")[-2]


@contextmanager
def driven(guest: Guest, function: str) -> Iterator[None]:
    """A function that is with nvme for a while: Linux asks the driver for virtual functions."""
    nvme = "/sys/bus/pci/drivers/nvme"
    guest.shell.run(f"echo {function} > {nvme}/bind", deadline_s=60)
    try:
        yield
    finally:
        guest.shell.run(f"echo {function} > {nvme}/unbind", deadline_s=60)


def make_vfs(machine: Guest | Host, function: str, number: int) -> list[str]:
    """Have another number of virtual functions; their addresses, as Linux lists them."""
    device = f"/sys/bus/pci/devices/{function}"
    machine.shell.run(f"echo {number} > {device}/sriov_numvfs", deadline_s=60)
    links = machine.shell.run(f"readlink {device}/virtfn*", check=False).stdout.split()
    return sorted(link.split("/")[-1] for link in links)


def plug(guest: Guest) -> str:
    guest.qmp("device_add", driver="edu", bus="hp0", id="edu0")
    until(lambda: bool(addresses(guest, f"-d {EDU}")), "the guest's seeing the plugged device")
    return addresses(guest, f"-d {EDU}")[0]


def unplug(guest: Guest) -> None:
    guest.qmp("device_del", id="edu0")

    def gone() -> bool:
        return not guest.has_child("/machine/peripheral", "edu0")

    until(gone, "the guest's giving the device back")


def states(guest: Guest) -> tuple[int, int]:
    """(functions that KVM knows, 1 if it serves reads)"""
    functions = guest.qmp("qom-get", path=lspci.HOST_BRIDGE, property="config-cache-functions")
    active = guest.qmp("qom-get", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE)
    return int(functions), int(active)


def dump(guest: Guest) -> dict[str, bytes]:
    return parse_dump(guest.shell.run("lspci -D -xxx", deadline_s=180).stdout)


def bytes_are_equal(guest: Guest) -> dict[str, bytes]:
    """All bytes as KVM's table has them are those of QEMU: what they are."""
    dump(guest)
    cached = dump(guest)
    assert states(guest)[0] >= len(cached)
    guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE, value=False)
    plain = dump(guest)
    guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE, value=True)
    assert cached == plain
    return plain


def test_kvm_knows_functions_and_forgets_them_when_switched_off(guest: Guest) -> None:
    guest.shell.run("lspci -xxx", deadline_s=120)
    functions, active = states(guest)
    assert active == 1
    assert functions >= len(addresses(guest, ""))
    guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE, value=False)
    assert states(guest) == (0, 0)
    guest.shell.run("lspci -xxx", deadline_s=120)
    assert states(guest) == (0, 0)
    guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE, value=True)
    with pytest.raises(MeasurementError):
        guest.qmp("qom-set", path=lspci.HOST_BRIDGE, property=lspci.CACHE_ACTIVE, value="yes")


def test_stopped_guest_continues_with_an_empty_table(guest: Guest) -> None:
    guest.shell.run("lspci -xxx", deadline_s=120)
    assert states(guest)[0] > 0
    guest.qmp("stop")
    before = states(guest)[0]
    guest.qmp("cont")
    assert before > 0
    assert all(cacheable(data) for data in dump(guest).values())


def test_plugged_functions_appear_and_unplugged_ones_go(guest: Guest) -> None:
    """A rescan reads the empty slot first, so that its absence is known to KVM."""
    port = empty_port(guest)
    for _ in range(2):
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}")
        edu = plug(guest)
        guest.shell.run(f"lspci -s {edu} -xxx")
        unplug(guest)
        guest.shell.run(f"echo 1 > /sys/bus/pci/devices/{port}/rescan")
        assert not addresses(guest, f"-d {EDU}"), "the guest found a device that is gone"


def random_program(guest: Guest, operations: int = OPERATIONS, options: str = "") -> dict[str, int]:
    """Run it with a device plugged for the time; no read may differ. Returns what it counted."""
    print(f"seed {SEED}, {operations} operations")
    port = empty_port(guest)
    edu = plug(guest)
    pf = physical_function(guest)
    with driven(guest, pf):
        vfs = make_vfs(guest, pf, VFS)
    assert len(vfs) == VFS
    writable = [
        one for kind in ("0108", "0106", "0c05") for one in addresses(guest, f"-d ::{kind}")
    ]
    writable = [one for one in writable if one not in vfs]
    assert len(writable) == 5
    window, _ = lspci.ecam_window(guest.shell.read("/proc/iomem"))
    words = " ".join(f"-w {address}" for address in writable)
    begun = time.monotonic()
    done = guest.shell.run(
        f"nm-fuzz {options} {words} -b {port} -r -v {pf} -i {edu} {SEED} {operations} {window:#x}",
        deadline_s=300 + operations * 2.0,
    )
    said: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(f"{time.monotonic() - begun:.0f} s: {said}")
    unplug(guest)
    with driven(guest, pf):
        make_vfs(guest, pf, 0)
    assert said["mismatches"] == 0, f"seed {SEED}: {said['first']}"
    assert said["operations"] == operations
    assert said["reads"] > operations
    return said


CHANGES = (
    "writes",
    "resets",
    "hot_resets",
    "power_offs",
    "renumberings",
    "vf_changes",
    "interrupts",
)
"""What the random program does beside reads."""


def test_random_program_sees_no_stale_register(guest: Guest) -> None:
    said = random_program(guest)
    if LONG:
        assert min(said[key] for key in CHANGES) > 0


def test_virtual_functions_come_and_go(guest: Guest) -> None:
    """Linux finds as many as it asked for, each time, and their bytes are QEMU's."""
    pf = physical_function(guest)
    others = len(addresses(guest, ""))
    with driven(guest, pf):
        for number in (VFS, 0, 2, 0):
            vfs = make_vfs(guest, pf, number)
            assert len(vfs) == number
            found = bytes_are_equal(guest)
            assert len(found) == others + number
            assert {found[vf][0x0A:0x0C] for vf in vfs} <= {b"\x08\x01"}, "no NVMe function"


@pytest.mark.nightly
def test_virtual_functions_of_the_host_change_nothing(guest: Guest) -> None:
    """Others than the guest's, beside those that are assigned to it."""
    host = guest.host
    host.shell.run(NOBODYS_VFS)
    pf = physical_function(host)
    before = bytes_are_equal(guest)
    for number in (VFS, 0):
        assert len(make_vfs(host, pf, number)) == number
        assert bytes_are_equal(guest) == before


REBOOTS: dict[str, Callable[[Guest], object]] = {
    "by QEMU": lambda guest: guest.qmp("system_reset"),
    "by Linux": lambda guest: guest.shell.start("sync; echo b > /proc/sysrq-trigger"),
}


@pytest.mark.nightly
def test_guest_that_reboots_is_served_again(guest: Guest) -> None:
    guest.qmp("set-action", reboot="reset")
    for how, reboot in REBOOTS.items():
        dump(guest)
        assert states(guest)[0] > 0
        start = guest.console.size
        reboot(guest)
        guest.comes_up_again(start)
        print(f"came up again, reset {how}")
        prepare(guest)
        assert bytes_are_equal(guest)
        random_program(guest, 120)


def test_reset_forgets_what_was_before(guest: Guest) -> None:
    """QEMU resets all functions; the last test, for the guest does not come back."""
    guest.shell.run("lspci -xxx", deadline_s=120)
    assert states(guest)[0] > 0
    guest.qmp("stop")
    guest.qmp("set-action", reboot="reset")
    guest.qmp("system_reset")
    until(lambda: states(guest) == (0, 1), "KVM's forgetting the registers of before the reset")
