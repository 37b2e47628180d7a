# SPDX-License-Identifier: GPL-2.0-or-later
"""The p2p test must notice peer-to-peer that does not work, which nothing reports by itself.

And what vanilla QEMU does with iommufd, the control of direct-p2p: it maps each BAR for DMA by
a dma-buf. The kernel takes that mapping back on a Function Level Reset, and QEMU is not told.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.host import Host, count_iommu_faults
from nearmetal.machines.lab import Lab
from nearmetal.measure import p2p
from nearmetal.patches import variants

pytestmark = pytest.mark.testbed

BYTES = 64 << 10
PEER_IS_NO_RAM = ("-set", "device.hostdev0.x-no-mmap=on")
"""QEMU handles each access to the first function's BARs itself, and maps none for DMA."""
AGAIN = r"""
set -e
echo %(peer)s > /sys/bus/pci/drivers/nvme/unbind
%(how)s
echo %(peer)s > /sys/bus/pci/drivers/nvme/bind
for i in $(seq 100); do
  [ -e /sys/bus/pci/devices/%(peer)s/p2pmem/allocate ] && exit 0
  sleep 0.1
done
exit 1
"""
RESET = "setpci -s %s CAP_EXP+8.W=8000:8000"
"""Initiate Function Level Reset of Device Control, with memory decoding on."""
DECODE_AGAIN = "setpci -s %s COMMAND=0:2; setpci -s %s COMMAND=2:2"


def moved(host: Host, guest: Guest) -> tuple[int, int, int]:
    """Bytes that differ in ordinary memory and in the peer's, and DMA faults of the host."""
    disk, allocate = p2p.find(guest.shell.run(p2p.FIND).stdout)
    before = host.kernel_log().last
    done = guest.shell.run(
        f"nm-p2p {disk} {allocate} {BYTES} {BYTES} 1", deadline_s=180, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = {
        memory: [line["corrupt"] for line in lines if line["memory"] == memory]
        for memory in ("ram", "peer")
    }
    assert len(wrong["ram"]) == 2, done.stderr
    assert wrong["peer"], done.stderr
    faults = count_iommu_faults(host.kernel_log(before).lines)
    return sum(wrong["ram"]), sum(wrong["peer"]), faults


def test_peer_to_peer_that_goes_nowhere_is_noticed(
    conf: Settings,
    cache: Cache,
    built: Lab,
    vanilla: variants.Config,
    host: Host,
    tmp_path: Path,
) -> None:
    """No BAR of the peer is mapped for DMA: the NVMe still says that all went well."""
    assigned = [host.p2p["peer"], host.p2p["disk"]]
    parts = built.guest_parts(vanilla, host, assigned)
    parts = dataclasses.replace(parts, extra=(*parts.extra, *PEER_IS_NO_RAM))
    with host.vfio(assigned), running_guest(host, parts, logs=tmp_path, label="no-ram") as guest:
        ram, peer, faults = moved(host, guest)
    assert ram == 0
    assert peer > 0, "wrong data was not noticed"
    assert faults > 0, "the host's DMA faults were not counted"


def test_iommufd_reaches_the_peer_until_a_function_level_reset(
    conf: Settings,
    cache: Cache,
    built: Lab,
    vanilla: variants.Config,
    host: Host,
    tmp_path: Path,
) -> None:
    """The limit that direct-p2p's documents name is vanilla's: decoding off and on mends it."""
    assigned = [host.p2p["peer"], host.p2p["disk"]]
    parts = dataclasses.replace(built.guest_parts(vanilla, host, assigned), iommufd=True)
    with host.vfio(assigned), running_guest(host, parts, logs=tmp_path, label="iommufd") as guest:
        _, allocate = p2p.find(guest.shell.run(p2p.FIND).stdout)
        address = allocate.split("/")[-3]
        assert moved(host, guest) == (0, 0, 0), "QEMU has not mapped the peer's memory"

        guest.shell.run(AGAIN % {"peer": address, "how": RESET % address}, deadline_s=60)
        ram, peer, faults = moved(host, guest)
        assert ram == 0
        assert peer > 0 and faults > 0, "the peer is reached after a reset: mend the documents"

        how = DECODE_AGAIN % (address, address)
        guest.shell.run(AGAIN % {"peer": address, "how": how}, deadline_s=60)
        assert moved(host, guest) == (0, 0, 0), "the peer's memory is not mapped again"
