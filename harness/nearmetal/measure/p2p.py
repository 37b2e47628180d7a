# SPDX-License-Identifier: GPL-2.0-or-later
"""p2p: an NVMe moves data to and from another NVMe's controller memory buffer in the guest.

Stock p2pdma, both functions assigned with vfio-pci. Broken peer-to-peer is silent: success
means that every byte was compared, both ways, and that the host's IOMMU logged no fault.
"""

from __future__ import annotations

import json
import shlex

from ..errors import MeasurementError
from ..host import count_iommu_faults
from ..model import Measurement
from .bench import Bench

NAMES = (
    "p2p.read_mib_s",
    "p2p.write_mib_s",
    "p2p.host_ram_mib_s",
    "p2p.corrupt_bytes",
    "p2p.iommu_faults",
)

RUNS = 3
BYTES = 8 << 20
BLOCK = 256 << 10
_DEADLINE_S = 300.0

FIND = r"""
for c in /sys/class/nvme/nvme*; do
  [ -e "$c" ] || continue
  d=$(readlink -f "$c/device")
  n=$(ls -d "$c"/nvme*n* "/sys/block/$(basename "$c")"n* 2>/dev/null | head -n 1)
  p=; [ -e "$d/p2pmem/allocate" ] && p="$d/p2pmem/allocate"
  echo "$(basename "$c")|$(basename "${n:-}")|$p|$(basename "$d")"
done
"""


def find(listing: str) -> tuple[str, str]:
    """The disk to use and the peer's ``allocate`` file, never of the same function."""
    rows = [line.split("|") for line in listing.strip().splitlines() if line.count("|") == 3]
    for _, _, allocate, peer in rows:
        for _, disk, _, address in rows:
            if allocate and disk and address != peer:
                return f"/dev/{disk}", allocate
    raise MeasurementError(
        "the guest has no NVMe disk beside an NVMe with peer memory",
        detail=listing or "no NVMe controller",
        hint="needs CONFIG_PCI_P2PDMA in the guest and a controller memory buffer on the peer",
    )


def bandwidth(line: dict[str, float]) -> float:
    """MiB a second of one transfer."""
    return (line["bytes"] / (1 << 20)) / (line["ns"] / 1e9)


def measure(bench: Bench) -> list[Measurement]:
    """All rows of the p2p test for the set-up that the bench has."""
    disk, allocate = find(bench.guest.shell.run(FIND).stdout)
    before = bench.host.kernel_log().last
    speeds: dict[tuple[str, str], list[float]] = {}
    corrupt: dict[str, list[float]] = {"read": [], "write": []}
    lines = []
    for number in range(RUNS):
        words = ["nm-p2p", disk, allocate, str(BYTES), str(BLOCK), str(1000 + number)]
        out = bench.guest.shell.run(shlex.join(words), deadline_s=_DEADLINE_S).stdout
        bench.guest.check()
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        kinds = {(line["direction"], line["memory"]) for line in found}
        wanted = {(d, m) for d in ("read", "write") for m in ("ram", "peer")}
        if kinds != wanted:
            raise MeasurementError("nm-p2p did not report all transfers", detail=out[-1000:])
        for line in found:
            speeds.setdefault((line["direction"], line["memory"]), []).append(bandwidth(line))
            if line["memory"] == "peer":
                corrupt[line["direction"]].append(line["corrupt"])
            elif line["corrupt"]:
                raise MeasurementError(
                    f"{line['corrupt']} bytes differ with ordinary memory: the disk is broken"
                )
        lines.extend(found)
    (bench.logs / f"{bench.variant}-p2p.json").write_text(json.dumps(lines, indent=1))
    faults = count_iommu_faults(bench.host.kernel_log(before).lines)
    setup = {"setup": "iommu", "block": str(BLOCK)}
    return [
        bench.row("p2p.read_mib_s", speeds["read", "peer"], **setup),
        bench.row("p2p.write_mib_s", speeds["write", "peer"], **setup),
        bench.row("p2p.host_ram_mib_s", speeds["read", "ram"], direction="read", **setup),
        bench.row("p2p.host_ram_mib_s", speeds["write", "ram"], direction="write", **setup),
        bench.row("p2p.corrupt_bytes", corrupt["read"], direction="read", **setup),
        bench.row("p2p.corrupt_bytes", corrupt["write"], direction="write", **setup),
        bench.row("p2p.iommu_faults", [faults], **setup),
    ]
