# SPDX-License-Identifier: GPL-2.0-or-later
"""Part of vmexit: what agents that use performance counters in a guest cost, and what they count.

A guest has counters by one of two ways: KVM asks the host's perf for an event for each of them
(the default), or hands the host's counters over while the guest runs (a mediated PMU, module
parameter ``enable_mediated_pmu``). Counts are held against loops of known length, and, on an
emulated host, against the emulator's plugin that counts instructions in and outside of guests.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...core import ui
from ...core.errors import MeasurementError
from ...core.model import Measurement
from ...machines.equipment import INSTRUCTIONS
from ...probes import instructions
from ...probes.tracing import AMD_SWITCHES, INTEL_SWITCHES, Exits
from ..bench import Bench
from .exits import is_pmu_msr, pmu_exits

AMD_SELECTOR = 0xC001020A
"""PERF_CTL5, the last of the six that AMD's PerfMonV2 has: perf takes it last."""
INTEL_SELECTOR = 0x189
"""IA32_PERFEVTSEL3"""

EVENTS = "instructions,branches,cycles,instructions:u,branches:u,cycles:u,r0c0,r0c2,r076"
"""More than the six counters, so that perf has to multiplex them."""

MULTIPLEX_LOOPS = 20_000_000
PROFILE_LOOPS = 50_000_000
PROFILE_PERIOD = 5_000_000
ROUNDS = 100
READS = 1000
WRITES = 1000
FIXED_ROUNDS = 1000
EXACT_LOOPS = 5_000_000
EXACT_RUNS = 5
LEAK_RUNS = 40
LEAK_EXITS = 20

PLAIN_SAMPLES = 200

FLOOR_SERIES = 3
FLOOR_PORT = 0x4D0
"""Edge/level control of the first interrupt controller: KVM serves it with a few instructions."""

ATTEMPTS = 3

_DEADLINE_S = 300.0
_LOG = "/tmp/nm-perf"

_PREPARE = "echo on > /sys/module/msr/parameters/allow_writes"
"""Else the kernel warns of writes of MSRs by a program."""

_RDPMC_ALWAYS = "echo 2 > /sys/bus/event_source/devices/cpu/rdpmc"
"""Else a program may use RDPMC only while it has an event of perf."""

NMI_REASONS = ("97", "0")
"""Exit reason of a non-maskable interrupt: SVM_EXIT_NMI 0x61, EXIT_REASON_EXCEPTION_NMI 0."""


MEDIATED = "/sys/module/kvm_intel/parameters/enable_mediated_pmu"


@dataclass(frozen=True)
class Agent:
    """A program in the guest: ``command`` prints a JSON line with ``samples``.

    A sample is what it does over and over: one reading of all events, one interrupt of a profile,
    one round of two tasks, one RDPMC, one write of a selector, one round of switching all fixed
    counters on and off and reading them. ``plain`` uses no counter: its sample is a reading of
    the config space of all functions.
    """

    name: str
    command: str
    reprograms: bool = False
    """Whether it cannot but write selectors between its marks, each of which exits in all variants.

    So it is on AMD's CPUs. On Intel's they may be passed through: no exit is what is wanted then.
    """


AGENTS = ("multiplex", "tasks", "profile", "rdpmc", "selectors", "plain", "fixed")
"""The names of all agents."""


def agents(*, amd: bool) -> tuple[Agent, ...]:
    """What agents do with counters, on AMD's CPUs or on Intel's."""
    selector = AMD_SELECTOR if amd else INTEL_SELECTOR
    perf = f"perf stat -x, -o {_LOG}"
    return (
        Agent(
            "multiplex",
            f"{perf} -a -I 1 -e {EVENTS} -- nm-pmu spin {MULTIPLEX_LOOPS} > /dev/null && "
            f'echo "{{\\"samples\\": $(grep -c ",,instructions," {_LOG})}}"',
            reprograms=amd,
        ),
        Agent(
            "tasks",
            f"{perf} -i -e instructions:u,branches:u -- nm-pmu switch {ROUNDS}",
            reprograms=amd,
        ),
        Agent(
            "profile",
            f"perf record -q -e instructions:u -c {PROFILE_PERIOD} -o {_LOG} -- "
            f"nm-pmu spin {PROFILE_LOOPS} > /dev/null && "
            f'echo "{{\\"samples\\": $(perf script -i {_LOG} -F ip | grep -c .)}}"',
        ),
        Agent("rdpmc", f"nm-pmu rdpmc {READS}"),
        Agent("selectors", f"nm-pmu write {selector:#x} {WRITES}"),
        Agent("plain", f"nm-agent -n {PLAIN_SAMPLES}"),
        *(() if amd else (Agent("fixed", f"{_RDPMC_ALWAYS} && nm-pmu fixed {FIXED_ROUNDS}"),)),
    )


def overflow_interrupts(text: str) -> int:
    """The interrupts of all CPUs for guests' mediated counters: row VPMI of /proc/interrupts."""
    found = re.search(r"^\s*VPMI:((?:\s+\d+)+)", text, re.M)
    return sum(map(int, found[1].split())) if found else 0


def overflow_exits(exits: Exits, mediated: int) -> int:
    """Exits for overflows: those of mediated counters, or the NMIs of the host's perf."""
    return mediated + sum(exits.reasons.get(reason, 0) for reason in NMI_REASONS)


INTERRUPT_REASONS = ("96", "97", "98", "100", "0", "1", "6", "7")
"""Exits for interrupts: SVM_EXIT_INTR 0x60, SVM_EXIT_NMI 0x61, SVM_EXIT_SMI 0x62, SVM_EXIT_VINTR
0x64 (the guest can take one now); EXIT_REASON_EXCEPTION_NMI 0, EXIT_REASON_EXTERNAL_INTERRUPT 1,
EXIT_REASON_OTHER_SMI 6, EXIT_REASON_INTERRUPT_WINDOW 7. Of exceptions these guests' exits are for
NMIs alone."""

CAUSES = ("guest", "userspace", "interrupt")
"""What a mediated PMU is loaded for, in the rows; the log has the rest as ``other``."""


def loads_by_cause(exits: Exits) -> dict[str, int]:
    """Loads of a mediated PMU by what came before them.

    ``userspace``: KVM_RUN had returned to QEMU; ``interrupt``: an interrupt, NMI or SMI of the
    host had ended the guest's turn, so what another task had of the CPU is in it, or KVM had waited
    to inject an interrupt; ``guest``: it exited for what it did itself; ``other``: no exit since
    the load before. So what depends on how busy the machine is can be told from the rest.
    """
    total = exits.pmu_switches or 0
    userspace = sum(exits.loads_userspace.values())
    interrupt = sum(exits.loads.get(reason, 0) for reason in INTERRUPT_REASONS)
    guest = max(0, sum(exits.loads.values()) - interrupt - userspace)
    other = max(0, total - guest - userspace - interrupt)
    return {"guest": guest, "userspace": userspace, "interrupt": interrupt, "other": other}


def errors_pct(counts: Sequence[int], expected: int) -> list[float]:
    """How far counts are off, in percent of what they must be."""
    return [abs(count - expected) / expected * 100 for count in counts]


@contextmanager
def busy(bench: Bench) -> Iterator[None]:
    """As many endless loops on the host as it has CPUs, for as long as the context lasts."""
    shell = bench.host.shell
    pids = shell.run(
        "for cpu in $(seq $(nproc)); do "
        "timeout 300 sh -c 'while :; do :; done' < /dev/null > /dev/null 2>&1 & echo $!; done"
    ).stdout.split()
    try:
        yield
    finally:
        with contextlib.suppress(MeasurementError):
            shell.run(f"kill {' '.join(pids)}", check=False)


def measure(bench: Bench, *, by_cause: bool = False) -> list[Measurement]:
    """PMU exits by agent, counts and, where the emulator counts instructions, what leaks.

    ``by_cause``: whether what the loads of a mediated PMU were for is told in rows of its own.
    """
    amd = bench.host.facts.kvm_module == "kvm_amd"
    selector = AMD_SELECTOR if amd else INTEL_SELECTOR
    bench.guest.shell.run(_PREPARE)
    rows, kept = [], []
    for agent in agents(amd=amd):
        found, said = _one_agent(bench, agent, amd, by_cause)
        rows += found
        kept.append({"agent": agent.name, **said})
    rows += _counts(bench, "idle")
    with busy(bench):
        rows += _counts(bench, "busy")
    if bench.host.can(INSTRUCTIONS):
        with instructions.pinned(bench.host, bench.guest):
            rows.append(_leaked(bench))
            rows.append(_selector_write(bench, selector))
            rows.append(_floor(bench))
    text = "\n".join(json.dumps(one) for one in kept)
    (bench.logs / f"{bench.label}-pmu.jsonl").write_text(text + "\n")
    return rows


def _one_agent(
    bench: Bench, agent: Agent, amd: bool, by_cause: bool
) -> tuple[list[Measurement], dict[str, Any]]:
    # on Intel's CPUs the host's perf accesses the same register, unless the PMU is mediated
    counted = amd or bench.host.shell.run(f"cat {MEDIATED}").stdout.strip() == "Y"
    switches = (AMD_SWITCHES if amd else INTEL_SWITCHES) if counted else None

    for attempt in range(ATTEMPTS):
        before = overflow_interrupts(bench.host.shell.run("cat /proc/interrupts").stdout)
        said, exits = bench.traced(
            f"pmu-{agent.name}", agent.command, deadline_s=_DEADLINE_S, switches=switches
        )
        after = overflow_interrupts(bench.host.shell.run("cat /proc/interrupts").stdout)
        if not agent.reprograms or pmu_exits(exits):
            break
        # seen once on an emulated host that got no timer interrupt in all that time
        if attempt + 1 == ATTEMPTS:
            raise MeasurementError(
                f"the agent {agent.name} wrote no selector between its marks",
                detail=agent.command,
            )
        ui.warn(f"the agent {agent.name} wrote no selector between its marks; once more")
    samples = said["samples"]
    if not samples:
        raise MeasurementError(f"the agent {agent.name} took no sample", detail=agent.command)
    msrs = {f"{msr:#x} {how}": n for (msr, how), n in exits.msr.items() if is_pmu_msr(msr)}
    overflows = overflow_exits(exits, after - before)
    loads = exits.pmu_switches if counted else 0
    context = {"fixed_counters": str(said["counters"])} if "counters" in said else {}
    rows = [
        bench.row(name, [count / samples], agent=agent.name, **context)
        for name, count in (
            ("vmexit.agent.pmu_exits_per_sample", pmu_exits(exits)),
            ("vmexit.agent.pmi_exits_per_sample", overflows),
            ("vmexit.agent.pmu_switches_per_sample", loads),
        )
        if count is not None
    ]
    causes = loads_by_cause(exits)
    if by_cause:
        name = "vmexit.agent.pmu_switches_by_cause"
        rows += [
            bench.row(name, [causes[cause] / samples], agent=agent.name, cause=cause, **context)
            for cause in CAUSES
        ]
    return rows, {
        "samples": samples,
        "exits": dict(exits.reasons),
        "pmu_msrs": msrs,
        "overflows": overflows,
        "switches": loads,
        "switches_by_cause": causes,
        "switches_by_exit": dict(exits.loads),
        "switches_by_userspace_exit": dict(exits.loads_userspace),
    }


def _counts(bench: Bench, host: str) -> list[Measurement]:
    said = bench.timed(f"nm-pmu exact {EXACT_LOOPS} {EXACT_RUNS}", deadline_s=_DEADLINE_S)
    expected = {"instructions": 2 * EXACT_LOOPS + 1, "branches": EXACT_LOOPS}
    return [
        bench.row("pmu.count_error_pct", errors_pct(said[event], number), event=event, host=host)
        for event, number in expected.items()
    ]


def _leaked(bench: Bench) -> Measurement:
    """What the guest's counter counts beyond what the plugin saw inside of the guest, an exit.

    The same without exits is what lies between the counter's reads and the marks.
    """

    def beyond(exits: int) -> list[int]:
        words = f"nm-pmu leak {LEAK_RUNS} {exits}"
        assert bench.host.instructions is not None
        out, intervals = instructions.logged(bench.host.instructions, bench.guest.shell, words)
        counted = json.loads(out)["instructions"]
        if len(intervals) != len(counted):
            raise MeasurementError(f"the emulator counted {len(intervals)} of {len(counted)} runs")
        return [count - one.guest for count, one in zip(counted, intervals, strict=True)]

    fixed = min(beyond(0))
    # each turn exits once to KVM and once to its user
    leaked = [(more - fixed) / (2 * LEAK_EXITS) for more in beyond(LEAK_EXITS)]
    return bench.row("pmu.leaked_host_instructions", leaked)


def _selector_write(bench: Bench, selector: int) -> Measurement:
    """Host instructions for a guest's write of an event selector, as for a config read."""
    log = bench.host.instructions
    assert log is not None
    every = instructions.series(log, bench.guest.shell, f"msr {selector:#x}")
    return bench.row("pmu.selector_write_instructions", [instructions.undisturbed(every, 1)])


def _floor(bench: Bench) -> Measurement:
    """Host instructions for two accesses to a port that KVM serves, with no counter in use."""
    log = bench.host.instructions
    assert log is not None
    values = []
    for _ in range(FLOOR_SERIES):
        every = instructions.series(log, bench.guest.shell, f"ports {FLOOR_PORT:#x}")
        values.append(instructions.undisturbed(every, 2))
    return bench.row("pmu.kernel_pair_instructions", values, port=f"{FLOOR_PORT:#x}")
