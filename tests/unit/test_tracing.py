# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting exits: histograms recorded on the testbed (Linux 7.3.4) and spoiled ones."""

from pathlib import Path

import pytest

from nearmetal.core.errors import MeasurementError
from nearmetal.measure.lspci import config_exits, config_exits_userspace, link_status_exits
from nearmetal.measure.vmexit.exits import is_pmu_msr, pmu_exits
from nearmetal.probes.tracing import KVM_EXIT_IO, KVM_EXIT_X86_PCI_CONFIG, parse_exits, parse_hists

DATA = Path(__file__).parent / "data" / "trace"
ECAM = (0xB0000000, 0xC0000000)


def recorded(name: str) -> str:
    return (DATA / name).read_text()


def test_agent_exits_are_those_of_thirteen_functions() -> None:
    exits = parse_exits(recorded("agent.hist"))
    # 40 samples of 13 functions, 16 dwords each, an address and a data access a dword
    assert exits.ports(0xCF8, 0xCFF) == 40 * 13 * 16 * 2
    assert exits.ports_userspace(0xCF8, 0xCFF) == 40 * 13 * 16 * 2
    assert exits.userspace == {KVM_EXIT_IO: 16640}


def test_marks_are_not_counted() -> None:
    exits = parse_exits(recorded("agent.hist"))
    # the end mark's port access is the one exit too many in the recorded 16641
    assert exits.reasons["123"] == 16640
    assert not [port for port, _ in exits.pio if port == 0x5F1]


def test_lspci_xxx_takes_two_exits_a_dword() -> None:
    exits = parse_exits(recorded("lspci-xxx.hist"))
    assert config_exits(exits) == 13 * 64 * 2
    assert config_exits_userspace(exits) == 13 * 64 * 2
    assert exits.mmio_reads(*ECAM) == 0


def test_exits_are_told_apart_by_register() -> None:
    vanilla = parse_exits(recorded("lspci-xxx.hist")).config_user
    assert len(vanilla) == 13 * 64
    assert set(vanilla.values()) == {2}
    assert vanilla[0x80000000] == 2


def test_link_status_is_what_is_not_read_live() -> None:
    """pci-config-live on; the two ports above assigned functions were 02:00.0 and 02:01.0."""
    exits = parse_exits(recorded("lspci-xxx-live.hist"))
    assert config_exits(exits) == 13 * 64 * 2
    assert config_exits_userspace(exits) == 2
    port = bytearray(256)
    port[0x06] = 0x10
    port[0x34], port[0x50:0x52], port[0x90:0x92] = 0x50, b"\x0d\x90", b"\x10\x00"
    elsewhere = bytearray(port)
    elsewhere[0x51] = 0x00
    both = {"0000:02:00.0": bytes(port), "0000:02:01.0": bytes(port)}
    assert link_status_exits(exits, both) == 2
    assert link_status_exits(exits, {"0000:02:02.0": bytes(port)}) == 0
    assert link_status_exits(exits, {"0000:02:01.0": bytes(elsewhere)}) == 0


def test_cached_registers_take_no_exit_and_others_one() -> None:
    """In a guest of 14 functions, pci-config-cache on, second pass."""
    exits = parse_exits(recorded("lspci-xxx-cached.hist"))
    assert config_exits(exits) == 14 * 64 * 2
    assert config_exits_userspace(exits) == 604
    assert exits.userspace[KVM_EXIT_X86_PCI_CONFIG] == 604
    assert set(exits.config_user.values()) == {1}
    assert 0x80000000 not in exits.config_user
    assert 0x80000004 in exits.config_user


def test_lspci_xxxx_reads_the_rest_by_ecam() -> None:
    exits = parse_exits(recorded("lspci-xxxx.hist"))
    assert exits.mmio_reads(*ECAM) == 6 * 960
    assert exits.mmio_reads_userspace(*ECAM) == 6 * 960
    assert exits.mmio_reads(0, ECAM[0]) == exits.mmio_reads(ECAM[1], 1 << 48) == 0


def test_lost_events_fail_the_measurement() -> None:
    text = recorded("agent.hist")
    spoiled = text.replace("Dropped: 0", "Dropped: 7", 1)
    with pytest.raises(MeasurementError, match="lost 7 events of kvm/kvm_exit"):
        parse_exits(spoiled)


def test_missing_histogram_fails_the_measurement() -> None:
    text = recorded("agent.hist")
    head, _, rest = text.partition("=== kvm/kvm_msr")
    with pytest.raises(MeasurementError, match=r"no histogram of kvm/kvm_msr"):
        parse_exits(head + "=== kvm/other" + rest)


def test_histograms_of_one_event_stay_apart() -> None:
    hists = parse_hists(recorded("agent.hist"))["kvm/kvm_pio"]
    assert [hist.keys for hist in hists] == [("common_pid",), ("port", "rw", "size")]


def test_pmu_exits_count_rdpmc_and_pmu_msrs_only() -> None:
    exits = parse_exits(recorded("agent.hist"))
    assert pmu_exits(exits) == 0
    more = type(exits)(
        {**exits.reasons, "111": 5},
        exits.userspace,
        exits.pio,
        exits.pio_user,
        exits.config_user,
        exits.mmio,
        {(0xC0010200, "write"): 3, (0x6E0, "write"): 1000},
    )
    assert pmu_exits(more) == 8


@pytest.mark.parametrize("msr", [0xC1, 0x186, 0x38F, 0xC0000301, 0xC0010004, 0xC001020B])
def test_pmu_msrs(msr: int) -> None:
    assert is_pmu_msr(msr)


@pytest.mark.parametrize("msr", [0x10, 0x6E0, 0x830, 0xC0010010, 0xC001020C, 0x393])
def test_other_msrs(msr: int) -> None:
    assert not is_pmu_msr(msr)
