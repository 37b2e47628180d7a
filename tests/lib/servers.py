# SPDX-License-Identifier: GPL-2.0-or-later
"""Surveys of whole servers, as text, from a few lines each: none was recorded.

A line of a tree is its indent, an address, and what is there: ``root``, ``up``, ``down`` (a port,
with ACS Control in hex, or ``-`` for none), ``pci`` (a bridge to conventional PCI) or a function's
``vendor:device class size`` with words ``driver=``, ``group=``, ``user=``, ``vfs=``, ``of=``.
"""

from __future__ import annotations

import itertools

_MEM, _HIGH = 0x40200, 0x14220C
_TYPES = {"root": 4, "up": 5, "down": 6, "pci": 7}
_PORT_IDS = {"root": "0x8086 0x352a", "up": "0x1000 0xc030", "down": "0x1000 0xc030"}
REDIRECTS = 0x1D
_WINDOW = 0x102201


def _config(port_type: int, header: int, acs: str | None) -> str:
    data = bytearray(0x110)
    data[0x06], data[0x0E], data[0x34] = 0x10, header, 0x40
    data[0x40], data[0x42] = 0x10, port_type << 4 | 2
    if acs is not None:
        data[0x100:0x108] = bytes((0x0D, 0, 1, 0, 0x5F, 0, int(acs, 16), 0))
    return data.hex(" ")


def survey(tree: str, *, maker: str = "8086", cpus: str = "", direct_p2p: str = "Y") -> str:
    """What ``topology.SURVEY`` prints of a server.

    ``node N`` begins what is on a NUMA node, ``cpus`` are words ``N=LIST``. BARs lie one behind the
    other, from 0x380000000000 on, each at a multiple of its size.
    """
    out: list[str] = []
    users: list[str] = []
    stack: list[tuple[int, str]] = []
    windows: dict[str, list[int]] = {}
    at, node, groups = 0x380000000000, "-1", itertools.count(1)
    blocks: list[tuple[str, list[str], bool]] = []
    for line in tree.strip("\n").splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        if words[0] == "node":
            node = words[1]
            continue
        while stack and stack[-1][0] >= indent:
            stack.pop()
        address = f"0000:{words[0]}"
        above = [each for _, each in stack]
        bus = (above[0] if above else address).rpartition(":")[0]
        block = [
            f"function {address}",
            f"path /sys/devices/pci{bus}/{'/'.join([*above, address])}",
        ]
        stack.append((indent, address))
        if words[1] in _TYPES:
            ids = _PORT_IDS.get(words[1], "0x1b36 0x000e")
            if words[1] == "root":
                ids = ids.replace("8086", maker)
            block += [f"id {ids} 0x060400", "driver pcieport", f"iommu_group {next(groups)}"]
            block.append(f"numa_node {node}")
            acs = None if words[2:] in ([], ["-"]) else words[2]
            block.append(f"config {_config(_TYPES[words[1]], 1, acs)}")
            blocks.append((address, block, True))
            continue
        vendor, device = words[1].split(":")
        keys = dict(word.split("=") for word in words[4:])
        group = keys.get("group") or str(next(groups))
        block.append(f"id 0x{vendor} 0x{device} 0x{words[2]}")
        if keys.get("driver", "vfio-pci") != "none":
            block.append(f"driver {keys.get('driver', 'vfio-pci')}")
        if group != "none":
            block.append(f"iommu_group {group}")
        block.append(f"numa_node {node}")
        if "of" in keys:
            block.append(f"physfn 0000:{keys['of']}")
        if "vfs" in keys:
            block.append(f"vfs {keys['vfs']}")
        if keys.get("driver", "vfio-pci") == "vfio-pci":
            block.append(f"vfio vfio{group}")
        if "user" in keys:
            path = f"/dev/vfio/devices/vfio{group}"
            users.append(f"user 4711 {path} qemu-system-x86_64 guest={keys['user']}")
        if (size := int(words[3][:-1]) << {"M": 20, "G": 30}[words[3][-1]]) > 0:
            at = -(-at // size) * size
            block.append(f"resource {at:#018x} {at + size - 1:#018x} {_HIGH:#018x}")
            for each in above:
                windows.setdefault(each, [at, 0])[1] = at + size - 1
            at += size
        block.append(f"config {_config(0, 0, None)}")
        blocks.append((address, block, False))
    for address, block, is_bridge in blocks:
        if is_bridge:
            none = "resource 0x0000000000000000 0x0000000000000000 0x0000000000000000"
            block += [none] * 15
            first, last = windows.get(address, [0, 0])
            block.append(f"resource {first:#018x} {last:#018x} {_WINDOW if last else 0:#018x}")
        out += block
    out += [f"cpus {word.replace('=', ' ', 1)}" for word in cpus.split()]
    return "\n".join([*out, *users, f"direct-p2p {direct_p2p}"]) + "\n"


def _pairs(node: int, first: int, gpu: str, nic: str) -> str:
    """Four switches of a socket, a GPU and a NIC below each."""
    lines = [f"node {node}"]
    for bus in range(first, first + 4 * 16, 16):
        lines += [
            f"{bus:02x}:01.0 root 1d",
            f" {bus + 1:02x}:00.0 up",
            f"  {bus + 2:02x}:00.0 down 1d",
            f"   {bus + 3:02x}:00.0 {gpu}",
            f"  {bus + 2:02x}:01.0 down 1d",
            f"   {bus + 4:02x}:00.0 {nic}",
        ]
    return "\n".join(lines)


_TWO = "0=0-47,96-143 1=48-95,144-191"
_NVSWITCHES = """
01:01.0 root 1d
 02:00.0 up
  03:00.0 down -
   04:00.0 10de:22a3 068000 32M
  03:01.0 down -
   05:00.0 10de:22a3 068000 32M
"""

HGX = survey(
    _pairs(0, 0x10, "10de:2335 030200 128G", "15b3:1021 020700 32M")
    + _NVSWITCHES
    + _pairs(1, 0x80, "10de:2335 030200 128G", "15b3:1021 020700 32M"),
    cpus=_TWO,
)
"""Eight GPUs with NVSwitches, a switch for each GPU and its NIC, two sockets."""

MI = survey(
    _pairs(0, 0x10, "1002:74a1 120000 256G", "14e4:1760 020000 1M")
    + "\n"
    + _pairs(1, 0x80, "1002:74a1 120000 256G", "14e4:1760 020000 1M"),
    maker="1022",
    cpus=_TWO,
)
"""Eight accelerators of AMD on CPUs of AMD, alike."""

PCIE4 = survey(
    """
node 0
16:01.0 root 1d
 17:00.0 up
  18:00.0 down 1d
   19:00.0 10de:26b9 030200 64G
  18:01.0 down 1d
   1a:00.0 10de:26b9 030200 64G
  18:02.0 down 1d
   1b:00.0 15b3:1021 020000 32M
node 1
97:01.0 root 1d
 98:00.0 up
  99:00.0 down 1d
   9a:00.0 10de:26b9 030200 64G
  99:01.0 down 1d
   9b:00.0 10de:26b9 030200 64G driver=nvidia
""",
    cpus=_TWO,
)
"""Four PCIe GPUs, two below each of two switches; the last is with the host's driver."""

CASCADE = survey(
    """
node 0
15:01.0 root 1d
 16:00.0 up
  17:00.0 down 1d
   18:00.0 up
    19:00.0 down 1d
     1a:00.0 10de:20b5 030200 128G
    19:01.0 down 1d
     1b:00.0 10de:20b5 030200 128G
  17:01.0 down 1d
   1c:00.0 up
    1d:00.0 down 1d
     1e:00.0 10de:20b5 030200 128G
    1d:01.0 down 1d
     1f:00.0 15b3:101b 020700 32M
""",
    cpus="0=0-63",
)
"""Two switches below a switch."""

WORKSTATION = survey(
    """
00:01.0 root -
 01:00.0 10de:2b85 030000 32G group=1
 01:00.1 10de:22e8 040300 0M group=1
00:02.0 root 1d
 02:00.0 10de:2b85 030000 32G group=2
 02:00.1 10de:22e8 040300 0M group=2 driver=snd_hda_intel
00:14.0 8086:7a60 0c0330 0M group=9 driver=xhci_hcd
""",
    maker="8086",
    direct_p2p="absent",
)
"""Two GPUs with their sound functions, no switch, no NUMA node."""

BRIDGES = survey(
    """
node 0
15:01.0 root 1d
 16:00.0 10de:2330 030200 128G
26:01.0 root 1d
 27:00.0 15b3:1021 020700 32M
node 1
a5:01.0 root 1d
 a6:00.0 10de:2330 030200 128G
a5:02.0 root 1d
 a7:00.0 15b3:1021 020700 32M
""",
    cpus=_TWO,
)
"""A root port for each function; on one node two host bridges, on the other one."""

VFS = survey(
    """
node 0
15:01.0 root 1d
 16:00.0 up
  17:00.0 down 1d
   18:00.0 10de:20b2 030200 128G
  17:01.0 down 1d
   19:00.0 15b3:101b 020700 32M driver=mlx5_core vfs=2
   19:00.1 15b3:101c 020700 2M of=19:00.0
   19:00.2 15b3:101c 020700 2M of=19:00.0
""",
    cpus="0=0-31",
)
"""A NIC that the host keeps, and VFs of it."""

SHARED = survey(
    """
node 0
15:01.0 root 1d
 16:00.0 up
  17:00.0 down 1d
   18:00.0 10de:26b9 030200 64G user=train
  17:01.0 down 1d
   19:00.0 15b3:1021 020000 32M user=train
  17:02.0 down 1d
   1a:00.0 10de:26b9 030200 64G user=other
  17:03.0 down 1d
   1b:00.0 11f8:4028 058000 4M driver=switchtec
 16:00.1 11f8:4028 058000 4M driver=switchtec
40:01.0 root 1d
 41:00.0 pci
  42:00.0 1a03:2000 030000 16M driver=none
43:00.0 8086:0b25 088000 1M
44:00.0 8086:0b25 088000 1M group=none
""",
    cpus="0=0-31",
)
"""Two guests below one switch, and things that no guest can have."""

EVERY = {
    "hgx": (HGX, "*gpu-nic"),
    "mi": (MI, "*gpu-nic"),
    "pcie4": (PCIE4, "19:00.0 1a:00.0 1b:00.0 9a:00.0 9b:00.0"),
    "cascade": (CASCADE, "1a:00.0 1b:00.0 1e:00.0 1f:00.0"),
    "workstation": (WORKSTATION, "01:00.0 01:00.1"),
    "bridges": (BRIDGES, "16:00.0 27:00.0 a6:00.0 a7:00.0"),
    "vfs": (VFS, "18:00.0 19:00.1"),
    "shared": (SHARED, "18:00.0 19:00.0"),
}
"""Servers, and the functions of a guest for each; ``*gpu-nic`` are all that the server has."""
