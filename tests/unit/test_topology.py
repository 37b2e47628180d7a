# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's PCI functions, read from what an emulated one printed: data/topology/README.md."""

from __future__ import annotations

import re
import subprocess

import pytest
from lib.surveys import DATA, DISK, PEER, PORTS, ROOT, SWITCH, recorded, reduced

from nearmetal.core.errors import MeasurementError
from nearmetal.pci import acs, config
from nearmetal.probes import topology

# --- registers -------------------------------------------------------------------------------


def lspci() -> dict[str, tuple[str, bytes]]:
    """Of each function lspci's words, and its registers."""
    found = {}
    for block in re.split(r"\n\n", (DATA / "lspci.txt").read_text()):
        words = [line for line in block.splitlines() if not re.match(r"^[0-9a-f]+: ", line)]
        dump = [line for line in block.splitlines() if re.match(r"^[0-9a-f]+: ", line)]
        data = bytes.fromhex("".join(line.partition(": ")[2] for line in dump))
        found[words[0].split()[0]] = ("\n".join(words), data.ljust(4096, b"\0"))
    return found


_ACS_WORDS = {
    "SrcValid": acs.SV,
    "TransBlk": acs.TB,
    "ReqRedir": acs.RR,
    "CmpltRedir": acs.CR,
    "UpstreamFwd": acs.UF,
    "EgressCtrl": acs.EC,
    "DirectTrans": acs.DT,
}


def acs_of(words: str, which: str) -> int | None:
    line = re.search(rf"{which}:\t(.*)", words)
    if line is None:
        return None
    return sum(bit for word, bit in _ACS_WORDS.items() if f"{word}+" in line[1])


@pytest.mark.parametrize("address", [ROOT, SWITCH, *PORTS, PEER, DISK])
def test_registers_say_what_lspci_says(address: str) -> None:
    words, data = lspci()[address]
    found = config.registers(data)
    kind = re.search(r"Express \(v2\) ([A-Za-z ]+?)[ ,(]*(?:\(Slot([+-])\))?, IntMsg", words)
    assert kind
    types = {"Endpoint": 0, "Root Port": 4, "Upstream Port": 5, "Downstream Port": 6}
    assert found.readable
    assert found.port_type == types[kind[1].strip()]
    assert found.hotplug == (kind[2] == "+" and "HotPlug+" in words)
    assert found.master == ("BusMaster+" in words)
    assert found.relaxed_ordering == ("RlxdOrd+" in words)
    assert found.acs_capable == acs_of(words, "ACSCap")
    assert found.acs == acs_of(words, "ACSCtl")
    number = re.search(r"LnkCap:\tPort #(\d+)", words)
    assert number
    assert found.port_number == int(number[1])
    ats = re.search(r"ATSCtl:\tEnable([+-])", words)
    assert found.ats == (None if ats is None else ats[1] == "+")


def test_the_sample_has_something_to_tell() -> None:
    """Else the test above would compare nothing with nothing."""
    every = [config.registers(data) for _, data in lspci().values()]
    assert {one.acs for one in every} == {None, 0x1D}
    assert {one.ats for one in every} == {None, True}
    assert {one.hotplug for one in every} == {True, False}
    assert {one.master for one in every} == {True, False}


def test_bits_that_the_sample_lacks() -> None:
    data = bytearray(lspci()[PORTS[0]][1])
    express = data.index(0x10, 0x90)
    data[express + 8] |= 0x10
    assert config.registers(bytes(data)).relaxed_ordering is True
    data = bytearray(lspci()[DISK][1])
    data[0x107] &= 0x7F
    assert config.registers(bytes(data)).ats is False


def test_config_space_that_does_not_answer_says_nothing() -> None:
    assert config.registers(b"") == config.NOT_READ
    assert config.registers(b"\xff" * 4096) == config.NOT_READ
    # as users other than root see it
    header = config.registers(lspci()[PORTS[0]][1][:64])
    assert header == config.Registers(readable=False, master=True)


def test_a_vf_answers_with_ones_for_its_ids() -> None:
    data = b"\xff\xff\xff\xff" + lspci()[DISK][1][4:]
    assert config.registers(data).ats is True


def test_zeros_at_the_end_may_be_left_out() -> None:
    for _, data in lspci().values():
        assert config.registers(data.rstrip(b"\0")) == config.registers(data)


def test_capability_lists_that_go_round_end() -> None:
    data = bytearray(4096)
    data[0:4], data[6], data[0x34] = b"\x86\x80\x01\x00", 0x10, 0x40
    data[0x40:0x42] = b"\x01\x40"
    data[0x100:0x104] = (0x1001_0003).to_bytes(4, "little")
    assert config.registers(bytes(data)) == config.Registers(readable=True)


def test_egress_control_vector() -> None:
    """As wide as ACS Capability says; ports without Egress Control have none (7.7.11)."""
    data = bytearray(4096)
    data[0x100:0x104] = (0x1_000D).to_bytes(4, "little")
    data[0x104:0x106] = (8 << 8 | acs.EC | acs.RR).to_bytes(2, "little")
    data[0x108:0x10C] = b"\x0a\xff\xff\xff"
    assert config.registers(bytes(data)).egress_vector == 0x0A
    data[0x105] = 0  # 256 ports
    assert config.registers(bytes(data)).egress_vector == 0xFFFFFF0A
    data[0x104] = acs.RR
    assert config.registers(bytes(data)).egress_vector == 0


# --- the survey ------------------------------------------------------------------------------


def test_survey() -> None:
    survey = recorded("host")
    disk = survey.functions[DISK]
    assert disk.bridges == (ROOT, SWITCH, PORTS[1])
    assert (disk.ids, disk.class_code, disk.driver, disk.group) == (
        "1b36:0010",
        0x010802,
        "nvme",
        "13",
    )
    assert [one.address for one in survey.switches()] == [SWITCH]
    assert [one.address for one in survey.children(SWITCH)] == list(PORTS)
    assert [one.first for one in survey.functions[PEER].bars] == [0xFE800000, 0x240000000]
    assert survey.functions[ROOT].bars
    assert not survey.functions[SWITCH].bars
    assert survey.direct_p2p == "unknown"


def test_owners() -> None:
    """The survey saw who has the character device open."""
    assert {recorded("host").functions[one].owner for one in (PEER, DISK)} == {"the host"}
    survey = recorded("vfio")
    assert survey.functions[PEER].owner == "sleep (pid 190)"
    assert survey.functions[DISK].owner == "nobody"


USERS = """\
function 0000:00:05.0
path /sys/devices/pci0000:00/0000:00:05.0
id 0x1b36 0x000c 0x060400
function 0000:03:00.0
path /sys/devices/pci0000:00/0000:00:05.0/0000:03:00.0
id 0x10de 0x20b0 0x030200
driver vfio-pci
iommu_group 12
vfio vfio3
user 77 /dev/vfio/{device} /usr/bin/qemu-system-x86_64 -name guest=vm1,debug-threads=on -m 4G
user 78 /dev/vfio/vfio /usr/bin/other
direct-p2p N
"""


@pytest.mark.parametrize(("device", "by_group"), [("devices/vfio3", False), ("12", True)])
def test_a_guest_is_told_by_its_name(device: str, by_group: bool) -> None:
    one = topology.parse(USERS.format(device=device)).functions[PEER]
    assert (one.owner, one.by_group) == ("vm1 (pid 77)", by_group)


@pytest.mark.parametrize(
    "driver", ["mlx5_vfio_pci", "nvgrace_gpu_vfio_pci", "vfio-pci", "pci-stub"]
)
def test_functions_that_wait_for_a_guest_are_nobody_s(driver: str) -> None:
    text = USERS.format(device="devices/vfio9").replace("driver vfio-pci", f"driver {driver}")
    if driver == "pci-stub":
        text = text.replace("vfio vfio3\n", "")
    one = topology.parse(text).functions[PEER]
    assert one.owner == "nobody"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends early"),
        ("function 0000:03:00.0\npath /x\nid 0x1 0x2 0x3\n", "ends early"),
        ("path /x\n", "does not begin with a function"),
        ("function nonsense\n", "'nonsense' is not the address"),
        (USERS.replace("id 0x10de 0x20b0 0x030200\n", ""), "03:00.0 is damaged: it lacks 'id'"),
        (USERS.replace("0x20b0", "GPU"), "03:00.0 is damaged: .*GPU"),
        (USERS.replace("vfio vfio3", "config 86 8"), "03:00.0 is damaged"),
        (USERS.replace("vfio vfio3", "numa_node two"), "03:00.0 is damaged: .*two"),
        (USERS.replace("direct-p2p", USERS.split("user")[0] + "direct-p2p"), "05.0 twice"),
        (USERS.replace("function 0000:00:05.0", "function 0000:00:06.0"), "lacks 0000:00:05.0"),
    ],
)
def test_survey_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(MeasurementError, match=says):
        topology.parse(text.replace("{device}", "12"))


def test_a_guest_named_in_the_older_way() -> None:
    text = USERS.format(device="12").replace("guest=vm1,", "vm1,")
    assert topology.parse(text).functions[PEER].owner == "vm1 (pid 77)"


VMD = """\
function 10000:e1:00.0
path /sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:01.0/10000:e1:00.0
id 0x8086 0x0a54 0x010802
numa_node 1
function 0000:00:0e.0
path /sys/devices/pci0000:00/0000:00:0e.0
id 0x8086 0x201d 0x010400
numa_node -1
function 10000:e0:01.0
path /sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:01.0
id 0x8086 0x2030 0x060400
direct-p2p absent
"""


def test_a_domain_below_a_function_of_another() -> None:
    """What is above a VMD's domain is no bridge above its functions."""
    survey = topology.parse(VMD)
    assert list(survey.functions) == ["0000:00:0e.0", "10000:e0:01.0", "10000:e1:00.0"]
    assert survey.functions["10000:e1:00.0"].bridges == ("10000:e0:01.0",)
    assert survey.functions["10000:e0:01.0"].bridges == ()
    assert [one.node for one in survey.functions.values()] == [None, None, 1]


def test_comments_and_empty_lines_are_left_out() -> None:
    assert topology.parse("# of gpu1\n\n" + VMD).functions == topology.parse(VMD).functions


def test_saved_without_command_lines() -> None:
    text = USERS.format(device="12").replace("-m 4G", "-object secret,data=hunter2")
    kept = topology.anonymous(text)
    assert "hunter2" not in kept
    assert topology.parse(kept) == topology.parse(text)
    for name in ("host", "vfio"):
        text = (DATA / f"survey-{name}.txt").read_text()
        assert topology.parse(topology.anonymous(text)) == topology.parse(text)


def test_what_is_beside_an_upstream_port() -> None:
    survey = reduced("management-function")
    upstream = survey.functions["0000:01:00.0"]
    assert [one.address for one in survey.beside(upstream)] == ["0000:01:00.1"]
    assert recorded("host").beside(recorded("host").functions[SWITCH]) == []


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_script_runs_and_prints_a_survey(shell: str) -> None:
    """On this machine, whatever functions it has."""
    done = subprocess.run([shell, "-c", topology.SURVEY], capture_output=True, text=True)
    assert done.stderr == ""
    topology.parse(done.stdout)


def test_the_script_writes_nothing() -> None:
    """Redirections lead to /dev/null, and no command is one that changes something."""
    script = re.sub(r"'[^']*'", "", topology.SURVEY)
    assert set(re.findall(r"\d?>>?\s*([\w/]+)", script)) == {"/dev/null"}
    commands = set(re.findall(r"(?:^|[;|(]|&&)\s*([a-z]+)", script, re.M))
    assert not commands & {"mkdir", "rm", "tee", "kill", "modprobe", "mv", "touch", "setpci", "dd"}
