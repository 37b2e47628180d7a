# SPDX-License-Identifier: GPL-2.0-or-later
"""vmexit: exits by reason and sample while a monitoring agent runs in the guest."""

from __future__ import annotations

import json
from pathlib import Path

from ...core.model import Measurement
from ...machines.equipment import ARRANGED, INSTRUCTIONS
from ..api import Keys, Metric, Setup, Test, Unit
from ..bench import Bench
from . import counters
from .exits import pmu_exits

RUNS = 3
COUNTED_SAMPLES = 40
SAMPLES = 50
_DEADLINE_S = 300.0


def with_counters(unit: Unit) -> bool:
    """Whether the agents that use counters are run: where no series is on, or one for them."""
    return unit.subject.series is None or unit.named


def only_counters(unit: Unit) -> bool:
    """Whether only counters differ, so that the agent that reads config space tells little."""
    return unit.subject.setup is not None or (unit.subject.series is not None and unit.named)


def at_its_rate(unit: Unit) -> bool:
    """Whether the rate of the agent's samples is measured."""
    return not only_counters(unit)


def measure(bench: Bench) -> list[Measurement]:
    """All rows of the vmexit test: exits from counted runs, the rate from runs without counting."""
    rows = _monitoring_agent(bench, 1 if only_counters(bench.unit) else RUNS)
    if not with_counters(bench.unit):
        return rows
    return rows + counters.measure(bench, by_cause=only_counters(bench.unit))


def _monitoring_agent(bench: Bench, runs: int = RUNS) -> list[Measurement]:
    """Its rows; one run counts exits and takes no time."""
    total, user, pmu, rate = [], [], [], []
    functions, pmu_counters = "", ""
    by_reason = []
    for number in range(runs):
        said, exits = bench.traced(
            f"agent-{number}", f"nm-agent {COUNTED_SAMPLES}", deadline_s=_DEADLINE_S
        )
        samples = said["samples"]
        total.append(exits.total / samples)
        user.append(exits.total_userspace / samples)
        pmu.append(pmu_exits(exits) / samples)
        functions, pmu_counters = str(said["functions"]), str(said["pmu_counters"])
        by_reason.append({"exit": dict(exits.reasons), "userspace": dict(exits.userspace), **said})
    for _ in range(runs if runs > 1 else 0):
        said = bench.timed(f"nm-agent {SAMPLES}", deadline_s=_DEADLINE_S)
        rate.append(said["samples"] / (said["ns"] / 1e9))
    (bench.logs / f"{bench.label}-agent.json").write_text(json.dumps(by_reason, indent=1))
    context = {"functions": functions, "pmu_counters": pmu_counters}
    rows = [
        bench.row("vmexit.agent.exits_per_sample", total, **context),
        bench.row("vmexit.agent.userspace_exits_per_sample", user, **context),
        bench.row("vmexit.agent.pmu_exits_per_sample", pmu, **context),
    ]
    if rate:
        rows.append(bench.row("vmexit.agent.samples_per_s", rate, **context))
    return rows


MEDIATED = Setup(
    "mediated",
    variants=("vanilla",),
    needs=(ARRANGED,),
    modules={
        "kvm_amd": {"enable_mediated_pmu": "Y"},
        "kvm_intel": {"enable_mediated_pmu": "Y"},
    },
)
"""KVM's mediated PMU, for the agents that use performance counters."""

_NUMBER = "[0-9]+"
_AGENT: Keys = {"functions": _NUMBER, "pmu_counters": _NUMBER}
_COUNTERS: Keys = {"agent": counters.AGENTS, "fixed_counters": _NUMBER}

METRICS = (
    Metric(
        "vmexit.agent.exits_per_sample",
        "exits/sample",
        "exits for any reason per sample of a monitoring agent",
        keys=_AGENT,
    ),
    Metric(
        "vmexit.agent.userspace_exits_per_sample",
        "exits/sample",
        "exits to QEMU per sample of a monitoring agent",
        keys=_AGENT,
    ),
    Metric(
        "vmexit.agent.pmu_exits_per_sample",
        "exits/sample",
        "RDPMC and PMU MSR exits per sample of a monitoring agent",
        keys={**_AGENT, **_COUNTERS},
    ),
    Metric(
        "vmexit.agent.pmi_exits_per_sample",
        "exits/sample",
        "exits for counter overflows per sample of an agent that uses counters",
        keys=_COUNTERS,
        where=with_counters,
    ),
    Metric(
        "vmexit.agent.pmu_switches_per_sample",
        "loads/sample",
        "loads of a mediated PMU per sample of an agent",
        keys=_COUNTERS,
        where=with_counters,
    ),
    Metric(
        "vmexit.agent.pmu_switches_by_cause",
        "loads/sample",
        "loads of a mediated PMU per sample of an agent, by what came before them",
        keys={**_COUNTERS, "cause": counters.CAUSES},
        where=only_counters,
    ),
    Metric(
        "pmu.count_error_pct",
        "%",
        "error of the guest's counters for a loop of known length",
        keys={"event": ("instructions", "branches"), "host": ("idle", "busy")},
        where=with_counters,
    ),
    Metric(
        "pmu.leaked_host_instructions",
        "instructions/exit",
        "instructions counted per exit that are not the guest's own",
        "equal",
        where=with_counters,
        needs=(INSTRUCTIONS,),
    ),
    Metric(
        "pmu.selector_write_instructions",
        "instructions",
        "instructions of the host, without the guest's own, for one write of an event selector",
        where=with_counters,
        needs=(INSTRUCTIONS,),
    ),
    Metric(
        "pmu.kernel_pair_instructions",
        "instructions",
        "instructions of the host for two port accesses that KVM serves, no counter in use",
        keys={"port": ("0x4d0",)},
        where=with_counters,
        needs=(INSTRUCTIONS,),
    ),
    Metric(
        "vmexit.agent.samples_per_s",
        "samples/s",
        "samples taken by the agent per second (target: 1000)",
        "higher",
        keys=_AGENT,
        where=at_its_rate,
    ),
)

TEST = Test(
    "vmexit",
    "Exits under a monitoring agent (vmexit)",
    measure,
    METRICS,
    order=20,
    setups=(MEDIATED,),
    checks=Path(__file__).with_name("checks.yaml"),
)
