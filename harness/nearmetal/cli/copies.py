# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of copies between a host's memory and devices: what keeps them dear."""

from __future__ import annotations

import re

from .switches import Finding

LOOK = r"""
for d in /sys/devices/system/node/node[0-9]*; do
  p=$d/hugepages/hugepages-1048576kB
  [ -e $p ] && echo "pages=${d##*node} $(cat $p/nr_hugepages) $(cat $p/free_hugepages)"
done
grep -qw pdpe1gb /proc/cpuinfo && echo pdpe1gb=1
for f in /sys/class/iommu/*/intel-iommu/cap; do
  [ -e $f ] && f=${f%/intel-iommu/cap} && echo "intel=${f##*/} $(cat $f/intel-iommu/cap)"
done
ls -d /sys/class/iommu/*/amd-iommu 2>/dev/null | sed 's,/amd-iommu$,,; s,.*/,amd=,'
type1=/sys/module/vfio_iommu_type1/parameters
echo "disable_hugepages=$(cat $type1/disable_hugepages 2>/dev/null)"
echo "command=$(cat /proc/cmdline)"
true
"""
"""Prints ``key=value`` lines; nothing is written on the host."""

_SSLPS_1G = 1 << 35
"""Second-stage large pages of 1 GiB, in the Capability Register (VT-d, 11.4.2)."""
_SMALL = {
    "intel_iommu": ("sp_off", "with intel_iommu=sp_off all entries are of 4 KiB"),
    "amd_iommu": ("nohugepages", "with amd_iommu=nohugepages all entries are of 4 KiB"),
}
_PAGE = "docs/dma.md"


def copies(text: str) -> list[Finding]:
    """Findings by what ``LOOK`` printed: pages of 1 GiB, and what keeps IOMMU entries small."""
    lines = [line.partition("=") for line in text.splitlines()]
    every: dict[str, list[str]] = {}
    for key, _, value in lines:
        every.setdefault(key, []).append(value)
    return [_pages(every), _entries(every)]


def _pages(every: dict[str, list[str]]) -> Finding:
    what = "huge pages"
    if "pdpe1gb" not in every:
        return Finding(
            what, "warn", "the CPU has no pages of 1 GiB", f"use those of 2 MiB ({_PAGE})"
        )
    nodes = [tuple(map(int, value.split())) for value in every.get("pages", [])]
    if not any(total for _, total, _ in nodes):
        return Finding(
            what,
            "warn",
            "none of 1 GiB: the IOMMU maps a guest's RAM by entries of 2 MiB at best",
            f"hugepagesz=1G hugepages=N on the kernel's command line ({_PAGE})",
        )
    told = ", ".join(f"node {node}: {total} ({free} free)" for node, total, free in nodes)
    if lacking := [node for node, total, _ in nodes if not total]:
        wanted = ",".join(f"{node}:N" for node, _, _ in nodes)
        return Finding(
            what,
            "warn",
            f"of 1 GiB on {told}: guests of node {lacking[0]} get others, or a far node's",
            f"hugepagesz=1G hugepages={wanted} on the kernel's command line",
        )
    return Finding(what, "ok", f"of 1 GiB on {told}")


def _entries(every: dict[str, list[str]]) -> Finding:
    what = "iommu entries"
    command = every.get("command", [""])[0]
    for option, (word, text) in _SMALL.items():
        given = re.findall(rf"(?:^|\s){option}=(\S+)", command)
        if any(word in one.split(",") for one in given):
            return Finding(
                what, "warn", text, f"remove it from the kernel's command line ({_PAGE})"
            )
    if every.get("disable_hugepages") == ["Y"]:
        return Finding(
            what,
            "warn",
            "vfio_iommu_type1.disable_hugepages is set: type1 maps by entries of 4 KiB",
            "echo N > /sys/module/vfio_iommu_type1/parameters/disable_hugepages",
        )
    small = []
    for value in every.get("intel", []):
        name, _, capabilities = value.partition(" ")
        if not int(capabilities or "0", 16) & _SSLPS_1G:
            small.append(name)
    if small:
        return Finding(
            what, "warn", f"{', '.join(small)} can have none of 1 GiB", "use pages of 2 MiB"
        )
    if "intel" in every or "amd" in every:
        return Finding(what, "ok", "up to 1 GiB")
    return Finding(what, "warn", "no IOMMU tells what entries it can have", "see 'iommu' above")
