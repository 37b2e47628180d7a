# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that mirror a host: data/mirror has what is written for whole servers.

To write them anew: NEARMETAL_WRITE_GOLDEN=1 pytest tests/unit/test_mirror.py
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from lib import servers
from lib.surveys import reduced

from nearmetal.cli import main as cli
from nearmetal.core.errors import UsageError
from nearmetal.mirror import explain, libvirt, qemu
from nearmetal.mirror.distances import NODE, PHB, PIX, PXB, SYS, Place, distance
from nearmetal.mirror.plan import Plan, Wish, host_place, plan
from nearmetal.probes import topology
from nearmetal.probes.topology import Survey

DATA = Path(__file__).parent / "data" / "mirror"
GLOBALS = ("q35-pcihost.config-cache=on", "q35-pcihost.ecam-map=on")
ALL = {"direct_p2p": True, "globals": GLOBALS, "guest_series": ("pci-ecam",), "pmu": True}


def surveyed(name: str) -> Survey:
    return topology.parse(servers.EVERY[name][0])


def functions(name: str) -> tuple[str, ...]:
    words = servers.EVERY[name][1]
    if words != "*gpu-nic":
        return tuple(words.split())
    return tuple(one.address for one in surveyed(name).functions.values() if not one.is_bridge)


def made(server: str, **more: object) -> Plan:
    wish = Wish(functions(server), name="train", cpus=16, memory_mib=64 << 10)
    return plan(surveyed(server), dataclasses.replace(wish, **more))  # type: ignore[arg-type]


def refusal(server: str, *addresses: str, **more: object) -> str:
    with pytest.raises(UsageError) as caught:
        made(server, functions=addresses, **more)
    error = caught.value
    assert "\n" not in error.message
    return f"{error.message}; {error.hint}; {error.detail}"


# --- whole servers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", servers.EVERY)
@pytest.mark.parametrize("kind", ["vanilla", "on"])
def test_what_is_written_for_a_server(name: str, kind: str) -> None:
    one = made(name, **(ALL if kind == "on" else {}))
    texts = {
        "args": qemu.text(one),
        "xml": libvirt.xml(one),
        "explain": "\n".join(explain.explain(surveyed(name), one)) + "\n",
    }
    for suffix, text in texts.items():
        path = DATA / f"{name}-{kind}.{suffix}"
        if os.environ.get("NEARMETAL_WRITE_GOLDEN"):
            DATA.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), path.name


@pytest.mark.parametrize("name", servers.EVERY)
def test_every_pair_is_as_far_as_on_the_host(name: str) -> None:
    survey, one = surveyed(name), made(name, **ALL)
    pairs = list(itertools.combinations(one.devices, 2))
    assert pairs
    for this, other in pairs:
        there = distance(host_place(survey, this.host), host_place(survey, other.host))
        assert distance(one.place(this), one.place(other)) == there, (this, other)


@pytest.mark.skipif(shutil.which("virt-xml-validate") is None, reason="no virt-xml-validate")
@pytest.mark.parametrize("path", sorted(DATA.glob("*.xml")), ids=lambda path: path.stem)
def test_libvirts_schema_takes_the_domain(path: Path) -> None:
    done = subprocess.run(
        ["virt-xml-validate", str(path), "domain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", servers.EVERY)
def test_bash_reads_the_arguments_as_they_are(name: str, tmp_path: Path) -> None:
    one = made(name, **ALL)
    path = tmp_path / "args"
    path.write_text(qemu.text(one))
    line = '. "$1"; printf "%s\\n" "${args[@]}"'
    done = subprocess.run(
        ["bash", "-c", line, "bash", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == qemu.words(one)


@pytest.mark.parametrize("name", servers.EVERY)
@pytest.mark.parametrize("kind", ["vanilla", "on"])
def test_names_buses_and_slots_are_unique(name: str, kind: str) -> None:
    one = made(name, **(ALL if kind == "on" else {}))
    names = [root.name for root in one.roots] + [port.name for port in one.ports]
    names += [device.name for device in one.devices]
    assert len(set(names)) == len(names)
    places = [(each.bus, each.slot, 0) for each in one.ports]
    places += [(each.bus, each.slot, each.function) for each in one.devices]
    assert len(set(places)) == len(places)
    chassis = [each.number for each in one.ports]
    assert len(set(chassis)) == len(chassis)
    # a bus for each port, before the next host bridge begins
    starts = [*(each.bus_nr for each in one.roots), 256]
    for root, following in itertools.pairwise(starts):
        below = [each for each in one.ports if _root(one, each.bus) == root]
        assert root + len(below) < following


def _root(one: Plan, bus: str) -> int:
    ports = {each.name: each.bus for each in one.ports}
    while bus in ports:
        bus = ports[bus]
    return next(root.bus_nr for root in one.roots if root.name == bus)


def test_vanilla_has_no_word_of_the_series() -> None:
    for name in servers.EVERY:
        text = " ".join(qemu.words(made(name))) + libvirt.xml(made(name))
        for word in ("direct-p2p=", "ram-holes", "config-cache", "ecam-map", "pmu-passthrough=on"):
            assert word not in text, name


# --- distances -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Place("a", 0, ("r", "u", "d0")), Place("a", 0, ("r", "u", "d1")), PIX),
        (Place("a", 0, ("r",)), Place("a", 0, ("r",)), PIX),
        (Place("a", 0, ("r", "u", "d0")), Place("a", 0, ("r", "u", "d1", "v", "e")), PXB),
        (Place("a", 0, ("r0",)), Place("a", 0, ("r1",)), PHB),
        (Place("a", 0, ("r0",)), Place("b", 0, ("r0",)), NODE),
        (Place("a", 0, ("r0",)), Place("b", 1, ("r0",)), SYS),
        (Place("a", None, ("r0",)), Place("b", None, ("r0",)), NODE),
    ],
)
def test_distances(one: Place, other: Place, expected: str) -> None:
    assert distance(one, other) == distance(other, one) == expected


# --- direct peer-to-peer ---------------------------------------------------------------------


def test_direct_where_a_switch_has_two_of_the_guest_and_nothing_else() -> None:
    one = made("pcie4", direct_p2p=True)
    assert {each.host for each in one.devices if each.direct} == {
        f"0000:{each}" for each in functions("pcie4")
    }
    assert one.iommufd


def test_ram_keeps_out_of_the_windows() -> None:
    survey = surveyed("pcie4")
    one = made("pcie4", direct_p2p=True)
    windows = [
        window for each in ("17", "98") for window in survey.functions[f"0000:{each}:00.0"].windows
    ]
    assert len(windows) == 2
    for window in windows:
        assert any(a <= window.first and window.last <= b for a, b in one.holes)


def test_ram_ends_below_a_window_below_4_gib() -> None:
    survey = surveyed("pcie4")
    switch = survey.functions["0000:17:00.0"]
    for first, expected in ((0xFE400000, 2048), (0x60000000, 1024), (0x30000000, 768)):
        low = topology.Bar(first, first + 0xFFFFF, 0x200)
        windows = (*switch.windows, low)
        changed = dataclasses.replace(
            survey,
            functions={
                **survey.functions,
                switch.address: dataclasses.replace(switch, windows=windows),
            },
        )
        wish = Wish(functions("pcie4"), direct_p2p=True)
        assert plan(changed, wish).low_mib == expected


def test_without_direct_p2p_ram_lies_anywhere_and_dma_by_type1() -> None:
    one = made("pcie4")
    assert not one.holes
    assert one.low_mib is None
    assert not one.iommufd


def test_a_switch_that_is_shared_stays_redirected_and_says_why() -> None:
    one = made("shared", direct_p2p=True)
    assert not any(each.direct for each in one.devices)
    assert any("other" in loss and "0000:16:00.0" in loss for loss in one.losses)
    assert "nowhere" not in " ".join(one.losses)
    with pytest.raises(UsageError, match="below no switch"):
        made("shared", direct_p2p=True, must_direct_p2p=True)


def test_a_survey_without_windows_is_not_enough_for_it() -> None:
    wish = Wish(("18:00.0", "19:00.0"), direct_p2p=True)
    survey = reduced("vf-of-nobody")
    without = {
        key: dataclasses.replace(one, vfs=0)
        for key, one in survey.functions.items()
        if one.physfn is None
    }
    one = plan(dataclasses.replace(survey, functions=without), wish)
    assert any("lacks the windows" in loss for loss in one.losses)


# --- GPUs ------------------------------------------------------------------------------------


def test_cliques_are_of_nvidias_gpus_below_one_root() -> None:
    cliques = {each.host[5:]: each.clique for each in made("pcie4").devices}
    assert cliques == {"19:00.0": 0, "1a:00.0": 0, "1b:00.0": None, "9a:00.0": 1, "9b:00.0": 1}
    assert all(each.clique is None for each in made("mi").devices)
    assert all(each.clique is None for each in made("hgx").devices)


def test_a_clique_of_geforces_is_told_of() -> None:
    tree = servers.PCIE4.replace("0x030200", "0x030000")
    wish = Wish(functions("pcie4"))
    assert any("wrong data" in loss for loss in plan(topology.parse(tree), wish).losses)
    assert not any("wrong data" in loss for loss in made("pcie4").losses)


def test_gpus_without_the_nvswitches_of_their_host() -> None:
    gpus = ("13:00.0", "23:00.0")
    assert any("shared mode" in loss for loss in made("hgx", functions=gpus).losses)
    assert any("in the guest" in loss for loss in made("hgx").losses)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "addresses", "words"),
    [
        ("pcie4", ("19:00.1",), "no PCI function 19:00.1; did you mean '0000:19:00.0'"),
        ("pcie4", ("zz",), "no PCI function zz"),
        ("pcie4", ("19:00.0", "0000:19:00.0"), "named twice"),
        ("pcie4", ("17:00.0",), "is a bridge"),
        ("pcie4", (), "no function is named"),
        ("shared", ("44:00.0",), "has no IOMMU"),
        ("shared", ("42:00.0",), "no PCI Express port"),
        ("shared", ("16:00.1",), "Upstream Port"),
        ("vfs", ("19:00.0",), "2 VFs"),
        ("workstation", ("02:00.0",), "shares IOMMU group 2 with 0000:02:00.1 of the host"),
    ],
)
def test_refused(name: str, addresses: tuple[str, ...], words: str) -> None:
    assert words in refusal(name, *addresses)


def test_all_that_cannot_work_is_told_at_once() -> None:
    told = refusal("shared", "42:00.0", "44:00.0")
    assert "2 things" in told
    assert "0000:42:00.0" in told
    assert "0000:44:00.0" in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cpus": 15}, "15 vCPUs cannot be shared evenly by 2 NUMA nodes; ask for 14"),
        ({"cpus": 0}, "ask for 2"),
        ({"memory_mib": 65535}, "ask for 65536 MiB"),
        ({"pages": "3G"}, "no huge pages of 3G"),
        ({"name": "a b"}, "no name of a guest"),
    ],
)
def test_bad_sizes(more: dict[str, object], words: str) -> None:
    assert words in refusal("pcie4", *functions("pcie4"), **more)


def test_more_functions_than_a_device_has() -> None:
    tree = "node 0\n15:01.0 root 1d\n" + "\n".join(
        f" 16:{number // 8:02x}.{number % 8} 15b3:101e 020000 1M" for number in range(9)
    )
    wish = Wish(tuple(f"16:{number // 8:02x}.{number % 8}" for number in range(9)))
    with pytest.raises(UsageError, match="more than 8 functions"):
        plan(topology.parse(servers.survey(tree)), wish)


# --- details ---------------------------------------------------------------------------------


def test_a_function_on_the_root_bus_gets_a_root_port() -> None:
    """QEMU takes only ports and bridges on a pxb-pcie."""
    one = made("shared", functions=("43:00.0",))
    (device,), (port,) = one.devices, one.ports
    assert (device.bus, port.bus, port.mirrors) == (port.name, "pxb0", None)
    for name in servers.EVERY:
        assert not [each for each in made(name).devices if each.bus.startswith("pxb")]


def test_a_switch_without_root_port_gets_one() -> None:
    tree = "16:00.0 up\n 17:00.0 down 1d\n  18:00.0 10de:26b9 030200 64G"
    one = plan(topology.parse(servers.survey(tree)), Wish(("18:00.0",)))
    assert [each.mirrors for each in one.ports] == [None, "0000:16:00.0", "0000:17:00.0"]


def test_functions_of_one_device_are_functions_of_one_device() -> None:
    one = made("workstation")
    assert [(each.slot, each.function, each.multifunction) for each in one.devices] == [
        (0, 0, True),
        (0, 1, False),
    ]


def test_what_must_be_done_first() -> None:
    steps = made("pcie4", direct_p2p=True).steps
    assert "driverctl --nosave set-override 0000:9b:00.0 vfio-pci" in steps
    pages = "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages"
    assert f"echo 32 > {pages}" in steps
    assert not any("driverctl" in step for step in made("shared").steps)
    assert any("end that first" in step for step in made("shared", name="third").steps)


def test_the_xml_has_all_functions_and_no_double_dash_in_comments() -> None:
    domain = ET.fromstring(libvirt.xml(made("hgx", **ALL)))
    assert len(domain.findall("devices/hostdev")) == 18


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "pcie4.survey"
    path.write_text(servers.PCIE4)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], survey: str, *words: str) -> tuple[int, str, str]:
    status = cli.main(["vm", "--survey", survey, *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_has_all_series_on(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, saved, "19:00.0", "1a:00.0", "1b:00.0")
    assert status == 0
    for word in ("direct-p2p=on", "config-cache=on", "ecam-map=on", "pmu-passthrough=on"):
        assert word in out
    assert "hugepages" in err


def test_the_command_has_what_is_chosen(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("19:00.0", "1a:00.0", "1b:00.0")
    assert "=on,x-nv" not in run(capsys, saved, "--vanilla", *words)[1]
    out = run(capsys, saved, "--series", "pci-ecam", *words)[1]
    assert "ecam-map=on" in out
    assert "config-cache" not in out
    assert "<domain" in run(capsys, saved, "--libvirt", *words)[1]
    assert "PIX" in run(capsys, saved, "--explain", *words)[1]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["19:00.7"], "no PCI function 19:00.7", "did you mean '0000:19:00.0'"),
        (["19:00.0", "--series", "direct-p3p"], "no series 'direct-p3p'", "'direct-p2p'"),
        (["19:00.0", "--series", "direct-p2p"], "below no switch", ""),
        (["19:00.0", "--memory", "64X"], "--memory 64X is no size", "512G"),
        (["19:00.0", "--memory", "0G"], "0 MiB", "ask for 1024 MiB"),
        (["19:00.0", "--huge-pages", "4K"], "--huge-pages 4K is no size", "known"),
        (["19:00.0", "--host", "gpu1"], "mutually exclusive", ""),
    ],
)
def test_bad_words(
    saved: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    status, out, err = run(capsys, saved, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert hint in err
    assert "Traceback" not in err


def test_a_survey_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "/no/such", "19:00.0")[0] == 2
