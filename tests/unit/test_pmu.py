# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents that use counters: what is made of their histograms, which are recorded ones, and of
/proc/interrupts, which is written as the kernel does (arch/x86/kernel/irq.c)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nearmetal.measure import registry, vmexit
from nearmetal.measure.vmexit import counters as pmu
from nearmetal.measure.vmexit.exits import pmu_exits
from nearmetal.probes.tracing import parse_exits

DATA = Path(__file__).parent / "data" / "trace"

INTERRUPTS = """\
           CPU0       CPU1
  4:        305          0  IR-IO-APIC    4-edge      ttyS0
NMI:          0          3   Non-maskable interrupts
LOC:       9251       8126   Local timer interrupts
PMI:          0          3   Performance monitoring interrupts
PIN:          0          0   Posted-interrupt notification event
VPMI:         1         20   Perf Guest Mediated PMI
"""


def test_a_selector_write_with_a_mediated_pmu_is_one_exit_and_one_switch() -> None:
    """1001 writes by nm-pmu in a guest of an unpatched host."""
    exits = parse_exits((DATA / "pmu-selectors-mediated.hist").read_text())
    assert exits.msr[pmu.AMD_SELECTOR, "write"] == 1001
    assert pmu_exits(exits) == 1001
    assert exits.pmu_switches == 1096
    # those beyond the writes are due to interrupts of the host, and to those of the guest
    assert exits.pmu_switches - 1001 < exits.reasons["96"] + exits.reasons["100"] + 2


def test_switches_are_told_only_where_they_were_counted() -> None:
    assert parse_exits((DATA / "agent.hist").read_text()).pmu_switches is None


def test_a_load_on_intel_is_two_reads_of_the_status() -> None:
    """The recorded histogram is of AMD's register: it is made one of Intel's."""
    text = (DATA / "pmu-selectors-mediated.hist").read_text()
    head, _, tail = text.partition("=== msr/write_msr")
    exits = parse_exits(f"{head}=== msr/read_msr{tail}")
    written = parse_exits(text).pmu_switches
    assert written is not None
    assert exits.pmu_switches == written // 2


def test_loads_are_told_by_what_came_before_them() -> None:
    """115 readings of nine events by perf, which writes selectors: unpatched, each is a load."""
    exits = parse_exits((DATA / "pmu-multiplex-mediated.hist").read_text())
    assert exits.loads == {"114": 1, "100": 13, "96": 118, "124": 604}
    assert not exits.loads_userspace
    assert pmu.loads_by_cause(exits) == {
        "guest": 605,
        "userspace": 0,
        "interrupt": 131,
        "other": 0,
    }
    assert sum(exits.loads.values()) == exits.pmu_switches


def test_loads_after_a_return_to_qemu_are_told_apart() -> None:
    """An agent that uses no counter and reads config space: QEMU answers each read."""
    exits = parse_exits((DATA / "pmu-plain-mediated.hist").read_text())
    assert exits.loads_userspace == {2: 83200}
    assert pmu.loads_by_cause(exits) == {
        "guest": 8,
        "userspace": 83200,
        "interrupt": 4501,
        "other": 0,
    }


def test_loads_without_histograms_of_their_causes_have_none() -> None:
    exits = parse_exits((DATA / "pmu-selectors-mediated.hist").read_text())
    assert pmu.loads_by_cause(exits) == {
        "guest": 0,
        "userspace": 0,
        "interrupt": 0,
        "other": exits.pmu_switches,
    }


def test_overflow_interrupts_are_those_of_mediated_counters() -> None:
    assert pmu.overflow_interrupts(INTERRUPTS) == 21
    assert pmu.overflow_interrupts(INTERRUPTS.replace("VPMI", "XXXX")) == 0


def test_overflows_without_a_mediated_pmu_are_nmis() -> None:
    exits = parse_exits((DATA / "agent.hist").read_text())
    assert pmu.overflow_exits(exits, 0) == 0
    more = dataclasses.replace(exits, reasons={**exits.reasons, "97": 20})
    assert pmu.overflow_exits(more, 0) == 20
    assert pmu.overflow_exits(exits, 7) == 7


def test_errors_are_in_percent_of_what_must_be_counted() -> None:
    assert pmu.errors_pct([100, 101, 99], 100) == pytest.approx([0, 1, 1])
    assert pmu.errors_pct([0], 10_000_001) == [100]


def test_every_agent_is_in_a_row_of_its_own() -> None:
    names = [agent.name for agent in pmu.agents(amd=True)]
    assert names == ["multiplex", "tasks", "profile", "rdpmc", "selectors", "plain"]
    assert [agent.name for agent in pmu.agents(amd=False)] == [*names, "fixed"]
    assert set(vmexit.TEST.names) <= set(registry.metrics())


def test_only_where_writes_must_exit_is_an_agent_without_exits_run_again() -> None:
    """On Intel's CPUs selectors may be passed through: no exit is right there."""
    assert {agent.name for agent in pmu.agents(amd=True) if agent.reprograms} == {
        "multiplex",
        "tasks",
    }
    assert not any(agent.reprograms for agent in pmu.agents(amd=False))
