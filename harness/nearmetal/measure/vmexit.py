# SPDX-License-Identifier: GPL-2.0-or-later
"""vmexit: exits by reason and sample while a monitoring agent runs in the guest."""

from __future__ import annotations

import json

from ..core.model import Measurement
from ..probes.tracing import Exits
from . import pmu
from .bench import Bench

NAMES = (
    "vmexit.agent.exits_per_sample",
    "vmexit.agent.userspace_exits_per_sample",
    "vmexit.agent.pmu_exits_per_sample",
    "vmexit.agent.samples_per_s",
    *pmu.NAMES,
)
TESTBED_NAMES = pmu.TESTBED_NAMES
PMU_SERIES = "pmu-passthrough"
"""The agents that use counters are run where no series is on, or the one that is for them."""

RUNS = 3
COUNTED_SAMPLES = 40
SAMPLES = 50
_DEADLINE_S = 300.0

RDPMC_REASONS = ("111", "15")
"""Exit reason of RDPMC: SVM_EXIT_RDPMC 0x6f, EXIT_REASON_RDPMC 15."""


def is_pmu_msr(msr: int) -> bool:
    """Whether an MSR belongs to the core PMU (arch/x86/include/asm/msr-index.h)."""
    ranges = (
        (0xC1, 0xC8),  # IA32_PMC0..7
        (0x186, 0x18D),  # IA32_PERFEVTSEL0..7
        (0x309, 0x30C),  # IA32_FIXED_CTR0..3
        (0x329, 0x329),  # IA32_PERF_METRICS
        (0x345, 0x345),  # IA32_PERF_CAPABILITIES
        (0x38D, 0x392),  # IA32_FIXED_CTR_CTRL, IA32_PERF_GLOBAL_*
        (0x4C1, 0x4C8),  # IA32_A_PMC0..7
        (0xC0000300, 0xC0000303),  # AMD PERF_CNTR_GLOBAL_*
        (0xC0010000, 0xC0010007),  # AMD K7 PERF_CTL0..3, PERF_CTR0..3
        (0xC0010200, 0xC001020B),  # AMD PERF_CTL0..5, PERF_CTR0..5
    )
    return any(first <= msr <= last for first, last in ranges)


def pmu_exits(exits: Exits) -> int:
    """RDPMC exits and exits for the core PMU's MSRs."""
    rdpmc = sum(count for reason, count in exits.reasons.items() if reason in RDPMC_REASONS)
    return rdpmc + sum(count for (msr, _), count in exits.msr.items() if is_pmu_msr(msr))


def measure(bench: Bench) -> list[Measurement]:
    """All rows of the vmexit test: exits from counted runs, the rate from runs without counting."""
    if bench.series not in (None, PMU_SERIES):
        return _monitoring_agent(bench)
    # where only counters differ, the agent that reads config space has little to tell
    only_counters = bench.series == PMU_SERIES or bench.setup is not None
    return _monitoring_agent(bench, 1 if only_counters else RUNS) + pmu.measure(bench)


def _monitoring_agent(bench: Bench, runs: int = RUNS) -> list[Measurement]:
    """Its rows; one run counts exits and takes no time."""
    total, user, pmu, rate = [], [], [], []
    functions, counters = "", ""
    by_reason = []
    for number in range(runs):
        said, exits = bench.traced(
            f"agent-{number}", f"nm-agent {COUNTED_SAMPLES}", deadline_s=_DEADLINE_S
        )
        samples = said["samples"]
        total.append(exits.total / samples)
        user.append(exits.total_userspace / samples)
        pmu.append(pmu_exits(exits) / samples)
        functions, counters = str(said["functions"]), str(said["pmu_counters"])
        by_reason.append({"exit": dict(exits.reasons), "userspace": dict(exits.userspace), **said})
    for _ in range(runs if runs > 1 else 0):
        said = bench.timed(f"nm-agent {SAMPLES}", deadline_s=_DEADLINE_S)
        rate.append(said["samples"] / (said["ns"] / 1e9))
    (bench.logs / f"{bench.label}-agent.json").write_text(json.dumps(by_reason, indent=1))
    context = {"functions": functions, "pmu_counters": counters}
    rows = [
        bench.row("vmexit.agent.exits_per_sample", total, **context),
        bench.row("vmexit.agent.userspace_exits_per_sample", user, **context),
        bench.row("vmexit.agent.pmu_exits_per_sample", pmu, **context),
    ]
    if rate:
        rows.append(bench.row("vmexit.agent.samples_per_s", rate, **context))
    return rows
