# SPDX-License-Identifier: GPL-2.0-or-later
"""Series direct-p2p: switches below switches, and a guest that moves a BAR.

As on DGX A100, the initiator is below one switch and the target one switch deeper. The kernel
claims the lowest switch above both, so QEMU must put both into one claim, and look at the windows
of that switch. On the same host, a guest moves a BAR that is not pinned onto the memory of a
function that it has not: QEMU must end the claim before a peer can send anything there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import test_direct_p2p as isolation
import test_direct_p2p_guest as placement

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.measure import p2p
from nearmetal.pci.layout import around, windows
from nearmetal.probes import routes

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

CASCADE = (
    *("-device", f"{isolation._PORT},id=dn2,port=3,chassis=13,slot=13"),
    *("-device", "x3130-upstream,id=up1,bus=dn2,p2p-routing=on"),
    *("-device", "xio3130-downstream,id=dn3,bus=up1,acs=on,port=1,chassis=14,slot=14"),
    *("-device", "nvme,serial=nmdeep,cmb_size_mb=64,bus=dn3"),
)
"""A switch below the testbed's, with a function that has memory behind a BAR."""
BYTES = 1 << 20
ASIDE = "1d.0"
"""Where a function is in the guest that is not below its switch."""
SPLIT = "QEMU did not claim the switch above both functions"
UNSEEN = "peers' requests are not redirected, although a BAR is in a window"


def _deep(place: placement.Place) -> str:
    lines = place.host.shell.run(isolation.FIND).stdout.splitlines()
    return next(line.split()[1] for line in lines if line.startswith("nmdeep "))


def _machine(place: placement.Place) -> tuple[int, str]:
    """Memory in MiB and options of a machine with RAM around the outermost switch's windows."""
    disk = place.host.p2p["disk"]
    text = place.host.shell.run(f"cat {p2p.OUTERMOST % f'{isolation.PCI}/{disk}'}").stdout
    layout = around(windows(text), 0)
    return layout.memory_mib, layout.machine()


def _direct_ports(place: placement.Place) -> int:
    """How many ports don't redirect requests."""
    ports = routes.read(place.host.shell)
    return sum(not control & routes.RR for control in ports.acs.values())


def _qemu_said(place: placement.Place, label: str) -> str:
    return "".join(path.read_text() for path in sorted(place.logs.glob(f"guest-{label}-qemu.log")))


def a_cascade_is_one_claim(place: placement.Place) -> None:
    """The target is one switch below the initiator's: all bytes pass directly, none is wrong."""
    deep, disk = _deep(place), place.host.p2p["disk"]
    memory_mib, machine = _machine(place)
    parts = dataclasses.replace(
        place.parts, assigned=(deep, disk), memory_mib=memory_mib, machine=machine
    )
    try:
        with (
            place.host.vfio([deep]),
            running_guest(place.host, parts, logs=place.logs, label="cascade") as guest,
        ):
            assert _direct_ports(place) == 2
            before = routes.read(place.host.shell).total
            where, allocate = p2p.find(guest.shell.run(p2p.FIND).stdout)
            out = guest.shell.run(
                f"nm-p2p {where} {allocate} {BYTES} 65536 1", deadline_s=300
            ).stdout
            counted = routes.read(place.host.shell).total - before
    except MeasurementError as error:
        raise AssertionError(f"{SPLIT}: {error.message} {error.detail or ''}") from None
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert lines
    assert not any(line["corrupt"] for line in lines), out
    print(counted)
    assert (counted.direct, counted.redirected, counted.translated) == (2 * BYTES, 0, 0)
    p2p.check_ports(place.host)


def _until(good: Callable[[], bool], deadline_s: float = 60.0) -> bool:
    end = time.monotonic() + deadline_s
    while not good():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _move(guest: Guest, to: int) -> None:
    """Have the function that is aside decode its first BAR at another address."""
    device = f"0000:00:{ASIDE}"
    guest.shell.run(
        f"echo {device} > /sys/bus/pci/devices/{device}/driver/unbind; set -e;"
        f" setpci -s {device} COMMAND=0:2;"
        f" setpci -s {device} BASE_ADDRESS_0={to & 0xFFFFFFFF:x} BASE_ADDRESS_1={to >> 32:x};"
        f" setpci -s {device} COMMAND=2:2",
        deadline_s=60,
    )


def a_moved_bar_ends_the_claim(place: placement.Place) -> None:
    """A BAR that is not pinned comes to lie where the switch has another function's memory."""
    deep, disk = _deep(place), place.host.p2p["disk"]
    memory_mib, machine = _machine(place)
    text = place.host.shell.run(f"cat {isolation.PCI}/{deep}/resource").stdout.splitlines()
    there = int(text[isolation.CMB_BAR].split()[0], 16)
    aside = f"vfio-pci,host={disk},bus=pcie.0,addr={ASIDE},iommufd=iommufd0"
    parts = dataclasses.replace(
        place.parts,
        assigned=(place.host.p2p["peer"],),
        memory_mib=memory_mib,
        machine=machine,
        extra=(*place.parts.extra, "-device", aside),
    )
    with (
        place.host.vfio([deep]),
        running_guest(place.host, parts, logs=place.logs, label="moved") as guest,
    ):
        assert _direct_ports(place) == 2
        _move(guest, there)
        assert _until(lambda: _direct_ports(place) == 0, 10.0), UNSEEN
        said = _qemu_said(place, "moved")
        assert said.count("requests of peers are redirected") == 1, said
        assert f"at {there:#x}-" in said, said
        # with all BARs where they were, direct requests come back
        guest.qmp("set-action", reboot="reset")
        guest.qmp("system_reset")
        assert _until(lambda: _direct_ports(place) == 2), said
        assert "not pinned" not in _qemu_said(place, "moved"), (
            "BARs were looked at before their reset"
        )
    p2p.check_ports(place.host)


def test_switches_below_switches(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    config = placement.on_config(conf)
    with placement.place_for(conf, cache, config, tmp_path, CASCADE) as place:
        a_cascade_is_one_claim(place)
        a_moved_bar_ends_the_claim(place)
