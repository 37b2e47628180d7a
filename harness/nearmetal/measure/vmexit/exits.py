# SPDX-License-Identifier: GPL-2.0-or-later
"""Which exits are for the core PMU."""

from __future__ import annotations

from ...probes.tracing import Exits

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
