# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests read in the guest."""

from typing import Any

import pytest

from nearmetal.core.errors import MeasurementError, UsageError
from nearmetal.measure import p2p, registry
from nearmetal.measure.lspci import ecam_page, ecam_window, functions, kinds
from nearmetal.measure.p2p import (
    ANYWHERE,
    bandwidth,
    beside,
    check_redirected,
    find,
    peer_memory,
)
from nearmetal.patches.variants import Config
from nearmetal.pci.layout import Range
from nearmetal.probes import routes
from nearmetal.runs.plan import measured_by, resolve_tests

IOMEM = """\
00000000-00000fff : Reserved
b0000000-bfffffff : PCI ECAM 0000 [bus 00-ff]
  b0000000-bfffffff : Reserved
c0000000-febfffff : PCI Bus 0000:00
"""


def test_ecam_window() -> None:
    assert ecam_window(IOMEM) == (0xB0000000, 0xC0000000)


def test_ecam_window_hidden_from_users_is_refused() -> None:
    with pytest.raises(MeasurementError):
        ecam_window(IOMEM.replace("b0000000-bfffffff", "00000000-00000000"))


def test_functions() -> None:
    listing = "0000:00:00.0 0600: 8086:29c0\n0000:03:00.0 0108: 1b36:0010 (rev 02)\n"
    assert functions(listing) == {"0000:00:00.0": "0600", "0000:03:00.0": "0108"}


def device(
    bus: int, slot: int, name: str = "", below: list[dict[str, object]] | None = None
) -> dict[str, object]:
    found: dict[str, object] = {"bus": bus, "slot": slot, "function": 0, "qdev_id": name}
    if below is not None:
        found["pci_bridge"] = {"bus": {}, "devices": below}
    return found


def test_kinds_of_functions() -> None:
    """The port in front of an assigned function is told apart, and no port above that one."""
    assigned = device(4, 0, "hostdev0")
    switch = device(1, 0, "up0", [device(2, 0, "dn0", [assigned]), device(2, 1, "dn1", [])])
    empty = device(0, 3)
    empty["pci_bridge"] = {"bus": {}}
    buses = [{"bus": 0, "devices": [device(0, 0), device(0, 2, "rp0", [switch]), empty]}]
    assert kinds(buses) == {
        "00:00.0": "emulated",
        "00:02.0": "emulated",
        "00:03.0": "emulated",
        "01:00.0": "emulated",
        "02:00.0": "above",
        "02:01.0": "emulated",
        "04:00.0": "assigned",
    }


def test_pages_of_functions() -> None:
    assert ecam_page(0xB0000000, "00:00.0") == 0xB0000000
    assert ecam_page(0xB0000000, "ff:1f.7") == 0xBFFFF000


ALLOCATE = "/sys/devices/pci0000:00/0000:03:00.0/p2pmem/allocate"


def test_disk_and_peer_whatever_their_numbers() -> None:
    rows = [f"nvme0||{ALLOCATE}|0000:03:00.0|a", "nvme1|nvme1n1||0000:04:00.0|b"]
    for order in (rows, rows[::-1]):
        assert find("\n".join(order)) == ("/dev/nvme1n1", ALLOCATE)
        assert find("\n".join(order), ("a", "b")) == ("/dev/nvme1n1", ALLOCATE)


def test_a_pair_is_told_from_others_by_its_serials() -> None:
    deep = ALLOCATE.replace(":03:", ":09:")
    rows = [
        f"nvme0||{deep}|0000:09:00.0|deep",
        f"nvme1||{ALLOCATE}|0000:03:00.0|peer",
        "nvme2|nvme2n1||0000:07:00.0|high",
        "nvme3|nvme3n1||0000:04:00.0|disk",
    ]
    for order in (rows, rows[::-1]):
        assert find("\n".join(order), ("peer", "disk")) == ("/dev/nvme3n1", ALLOCATE)
        assert find("\n".join(order), ("deep", "high")) == ("/dev/nvme2n1", deep)
    with pytest.raises(MeasurementError, match="no NVMe disk beside"):
        find("\n".join(rows), ("disk", "peer"))


class Answers:
    """A login on a host that has these links in /sys/bus/pci/devices."""

    def __init__(self, *links: str) -> None:
        self.stdout = "".join(f"{link}\n" for link in links)

    def run(self, command: str) -> "Answers":
        return self


@pytest.mark.parametrize(
    ("peer", "disk", "ports"),
    [
        ("02:00.0/0000:03:00.0", "02:01.0/0000:04:00.0", ("02:00.0", "02:01.0")),
        (
            "02:01.0/0000:04:00.0/0000:05:00.0/0000:06:00.0",
            "02:00.0/0000:03:00.0",
            ("02:01.0", "02:00.0"),
        ),
    ],
)
def test_the_ports_at_which_the_ways_part(peer: str, disk: str, ports: tuple[str, str]) -> None:
    above = "/sys/devices/pci0000:00/0000:00:04.0/0000:01:00.0/0000:"
    shell: Any = Answers(above + peer, above + disk)
    pair = p2p.Pair("flat", "0000:03:00.0", "0000:04:00.0")
    assert p2p.parting(shell, pair) == tuple(f"0000:{port}" for port in ports)


def test_a_device_s_own_memory_is_no_peer() -> None:
    with pytest.raises(MeasurementError, match="no NVMe disk beside"):
        find(f"nvme0|nvme0n1|{ALLOCATE}|0000:03:00.0|a")


PORTS = """\
0000:02:00.0 005d 0000000000000000 0000000000000000 0000000001000000 0000000000000000 \
0000000000000000 0000000000000000 0000000000000000
0000:02:01.0 001d 0000000000000000 0000000002000000 0000000000000000 0000000000000000 \
0000000000000000 0000000000800000 0000000100000000
"""
"""as routes._READ prints them"""


def test_ports_of_a_switch_that_counts() -> None:
    ports = routes.parse(PORTS)
    assert ports.acs == {"0000:02:00.0": 0x5D, "0000:02:01.0": 0x1D}
    assert ports.total == routes.Routed(0, 2 << 24, 1 << 24, 0, 0, 1 << 23, 1 << 32)
    assert (ports.total - ports.routed["0000:02:00.0"]).translated == 0
    assert routes.names(0x5D) == "SV+RR+CR+UF+DT"
    assert routes.names(0) == "none"
    with pytest.raises(MeasurementError, match="cannot be read"):
        routes.parse("0000:02:00.0 005d 00")


def test_the_largest_bar_is_the_peer_s_memory() -> None:
    register, buffer = "0xfe800000 0xfe803fff\n", "0x240000000 0x243ffffff\n"
    assert peer_memory(register + buffer) == peer_memory(buffer + register) == 0x240000000
    with pytest.raises(MeasurementError, match="no memory BAR"):
        peer_memory("")


def test_bandwidth_in_mib_a_second() -> None:
    assert bandwidth({"bytes": 8 << 20, "ns": 500_000_000}) == pytest.approx(16.0)


def test_ram_beside_is_told_by_range() -> None:
    ranges = {"below": Range(0, 0xFFF), "behind": Range(0x2000, 0x2FFF)}
    lines: list[dict[str, Any]] = [
        {"memory": "peer", "direction": "read"},
        {"memory": "beside", "first": 0x2000, "last": 0x2FFF, "bytes": 4096, "corrupt": 8},
        {"memory": "beside", "first": 0, "last": 0xFFF, "bytes": 8192, "corrupt": 0},
    ]
    assert beside(lines, ranges) == {"below": (8192, 0), "behind": (4096, 8)}
    with pytest.raises(MeasurementError, match="did not report"):
        beside(lines[:2], ranges)
    with pytest.raises(MeasurementError, match="did not report"):
        beside(lines, ANYWHERE)


def test_ports_that_do_not_redirect_without_a_guest_are_an_error() -> None:
    check_redirected(routes.parse(PORTS))
    with pytest.raises(MeasurementError, match=r"02:01\.0 is SV\+CR\+UF, without a guest"):
        check_redirected(routes.parse(PORTS.replace(" 001d ", " 0019 ")))


def test_a_variant_with_set_ups_is_measured_by_p2p_alone() -> None:
    every = ("lspci", "vmexit", "p2p")
    assert measured_by(Config("on", "cache"), every) == every
    assert measured_by(Config("on", "direct-p2p", tests=("p2p",)), every) == ("p2p",)
    assert measured_by(Config("on", "direct-p2p", tests=("p2p",)), ("lspci",)) == ()


def test_every_set_up_of_p2p_has_its_way() -> None:
    assert set(p2p.WAYS) == set(registry.setups_of(p2p.TEST))
    assert [name for name, way in p2p.WAYS.items() if way.direct] == ["direct"]


def test_set_ups_that_a_series_may_name() -> None:
    assert registry.series_setups(("p2p",)) == ("iommu", "iommufd", "direct")
    assert registry.series_setups(("vmexit", "lspci")) == ()


def test_context_that_a_metric_does_not_declare_is_refused() -> None:
    metric = registry.metrics()["lspci.exits"]
    assert metric.allows("path", "cf8")
    assert not metric.allows("path", "cf9")
    assert not metric.allows("pth", "cf8")
    assert registry.metrics()["p2p.read_mib_s"].allows("block", "262144")
    assert not registry.metrics()["p2p.read_mib_s"].allows("block", "256k")
    assert registry.metrics()["p2p.tool_gb_s"].allows("whatever", "else")


def test_unknown_test_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_tests(["lspic"])
    assert "'lspci'" in str(caught.value.hint)
    assert resolve_tests([]) == ("lspci", "vmexit", "p2p", "tools", "imc")
    assert resolve_tests(["p2p", "lspci"]) == ("lspci", "p2p")
