# SPDX-License-Identifier: GPL-2.0-or-later
"""The p2p test must notice peer-to-peer that does not work, which nothing reports by itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nearmetal import run, variants
from nearmetal.cache import Cache
from nearmetal.guest import running_guest
from nearmetal.host import Host, count_iommu_faults
from nearmetal.measure import p2p
from nearmetal.settings import Settings

pytestmark = pytest.mark.testbed

BYTES = 64 << 10


def test_peer_to_peer_that_goes_nowhere_is_noticed(
    conf: Settings,
    cache: Cache,
    built: run.Built,
    vanilla: variants.Config,
    host: Host,
    tmp_path: Path,
) -> None:
    """With iommufd QEMU 10.0 maps no BAR for DMA: the NVMe still says that all went well."""
    assigned = [host.p2p["peer"], host.p2p["disk"]]
    parts = dataclasses.replace(
        run.guest_parts(conf, cache, built, vanilla, host, assigned), iommufd=True
    )
    with host.vfio(assigned), running_guest(host, parts, logs=tmp_path, label="iommufd") as guest:
        disk, allocate = p2p.find(guest.shell.run(p2p.FIND).stdout)
        before = host.kernel_log().last
        done = guest.shell.run(
            f"nm-p2p {disk} {allocate} {BYTES} {BYTES} 1", deadline_s=120, check=False
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ram = [line for line in lines if line["memory"] == "ram"]
    assert len(ram) == 2
    assert all(line["corrupt"] == 0 for line in ram)
    peer = [line for line in lines if line["memory"] == "peer"]
    faults = count_iommu_faults(host.kernel_log(before).lines)
    assert peer, done.stderr
    assert any(line["corrupt"] for line in peer), "wrong data was not noticed"
    assert faults > 0, "the host's DMA faults were not counted"
