# SPDX-License-Identifier: GPL-2.0-or-later
"""Series direct-p2p: guests that a run of the main job has no need of.

A guest with RAM in a window of the host's switch, which QEMU must refuse: what the guest's
devices send there would never reach it. A guest with UEFI firmware, which places BARs itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_direct_p2p as isolation

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.model import Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import GuestParts, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure import bench, p2p
from nearmetal.patches import series, variants
from nearmetal.pci.layout import BELOW_4G_MIB, GIB, Range
from nearmetal.sources import archive as sources

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

ROOM_MIB = 2048
WIDE = (
    *("-device", f"{isolation._PORT},id=dn2,port=3,chassis=13,slot=13"),
    *("-device", f"nvme,serial=nmthird,id=third,cmb_size_mb={ROOM_MIB},bus=dn2"),
)
"""A third function with so large a BAR that RAM has room in the switch's window beside it all."""
TAKEN = "QEMU took RAM in a window of the host's switch"


SUBJECT = Subject("on", "direct-p2p", "direct", "amd")


@dataclass
class Place:
    """A host, and what a guest with direct-p2p is made of."""

    conf: Settings
    cache: Cache
    config: variants.Config
    host: Host
    parts: GuestParts
    logs: Path


def on_config(conf: Settings) -> variants.Config:
    """Variant ``on`` of the series; skips while it is a draft."""
    isolation.patched_config(conf)
    every = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    return next(one for one in every if one.series == "direct-p2p")


@contextmanager
def place_for(
    conf: Settings,
    cache: Cache,
    config: variants.Config,
    logs: Path,
    extra: tuple[str, ...] = (),
) -> Iterator[Place]:
    made = Lab.build(conf, cache, [config])
    with (
        cache.lock("testbed"),
        made.host(config, logs, extra=extra) as host,
    ):
        host.load_kvm(config.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(config, host, assigned)
        parts = dataclasses.replace(parts, iommufd=True, host_addresses=True)
        with host.parameters(config.modules), host.vfio(assigned):
            yield Place(conf, cache, config, host, parts, logs)


def ram_in_a_window_is_refused(place: Place) -> None:
    """RAM lies where the BAR of another function of the host is, far from the guest's BARs."""
    lines = place.host.shell.run(isolation.FIND).stdout.splitlines()
    third = next(line.split()[1] for line in lines if line.startswith("nmthird "))
    place.host.bind_vfio(third)
    text = place.host.shell.run(f"cat {isolation.PCI}/{third}/resource").stdout.splitlines()
    first = int(text[isolation.CMB_BAR].split()[0], 16)
    assert first % GIB == 0
    room = Range(first, first + GIB - 1)
    parts = dataclasses.replace(
        place.parts,
        memory_mib=BELOW_4G_MIB + 1024,
        machine=f"max-ram-below-4g={BELOW_4G_MIB}M,ram-holes={Range(4 * GIB, first - 1)}",
    )
    row = bench.rows(place.host, SUBJECT)
    taken = False
    try:
        with running_guest(place.host, parts, logs=place.logs, label="window") as guest:
            taken = True
            rows = p2p.transfers(
                place.host, guest, p2p.DIRECT, row, place.logs, "on", {"in-window": room}
            )
            values = {one.name: one.median for one in rows}
            seen = f"{values['p2p.ram_corrupt_bytes']} of {values['p2p.ram_bytes']} bytes corrupt"
    except MeasurementError as error:
        seen = f"{error.message} {error.detail or ''}"
    assert not taken, f"{TAKEN}, and the guest: {seen}"
    assert f"RAM of the guest at {first:#x}" in seen, seen
    assert "is in a window of the host's switch" in seen, seen


def test_ram_in_a_window_is_refused(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    with place_for(conf, cache, on_config(conf), tmp_path, WIDE) as place:
        ram_in_a_window_is_refused(place)


def test_a_guest_with_uefi_has_its_memory_where_the_host_has_it(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    """All that the direct set-up of p2p asserts, with firmware that places BARs otherwise."""
    with place_for(conf, cache, on_config(conf), tmp_path) as place:
        folder = builds.ovmf(cache)
        fragments = [
            conf.repo / "guest-images" / "kernel" / name for name in ("base.config", "efi.config")
        ]
        linux = sources.obtain(conf, cache, "linux")
        kernel = builds.kernel(conf, cache, linux, fragments=fragments)
        layout = p2p.layout(place.host)
        variables = f"{place.host.work}/variables"
        place.host.shell.run(f"cp {place.host.place(folder / builds.OVMF_VARIABLES)} {variables}")
        code = place.host.place(folder / builds.OVMF_CODE)
        parts = dataclasses.replace(
            place.parts,
            kernel=kernel,
            initramfs=builds.initramfs(conf, cache, kernel, "guest", modules=False),
            memory_mib=layout.memory_mib,
            machine=layout.machine(),
            extra=(
                *place.parts.extra,
                *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
                *("-drive", f"if=pflash,format=raw,file={variables}"),
            ),
        )
        row = bench.rows(place.host, SUBJECT)
        ranges = {"below-window": layout.below, "behind-window": layout.behind}
        with running_guest(place.host, parts, logs=tmp_path, label="uefi") as guest:
            assert guest.shell.run("test -d /sys/firmware/efi", check=False).status == 0
            rows = p2p.transfers(place.host, guest, p2p.DIRECT, row, tmp_path, "on", ranges)
    values = {one.name: one.values for one in rows}
    print(values)
    assert all(one.context["bars"] == "as-on-host" for one in rows)
    assert set(values["p2p.bytes_direct"]) == {2.0 * p2p.BYTES}
    assert set(values["p2p.bytes_redirected"]) == {0.0}
    wrong = [one for one in rows if one.name.endswith("corrupt_bytes") and any(one.values)]
    assert not wrong
