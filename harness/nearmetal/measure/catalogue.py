# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of all measurements, their units and what they mean.

A name that is not here cannot be measured, checked or reported: a typing
error is found when a file is read and not after an hour's run.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.model import Variant


@dataclass(frozen=True)
class Entry:
    """A measurement's name, its unit, which test makes it, and what it means."""

    name: str
    unit: str
    test: str
    meaning: str
    better: str = "lower"
    """``lower``, ``higher`` or ``equal`` (neither is better)."""
    beside_vanilla: bool = False
    """Whether it compares a variant with vanilla, so that vanilla itself has none."""
    asked: bool = False
    """Whether it is measured only where an inventory asks for it."""
    only_on: bool = False
    """Whether it is of something that a guest has with a series alone, and on."""


_ENTRIES = (
    Entry("lspci.pass_us", "us", "lspci", "wall time of one lspci pass in the guest"),
    Entry("lspci.dword_ns", "ns", "lspci", "time of one 4-byte config read in the guest"),
    Entry("lspci.exits", "exits", "lspci", "config-access exits of one lspci pass"),
    Entry(
        "lspci.userspace_exits",
        "exits",
        "lspci",
        "config-access exits of one lspci pass that left the kernel for QEMU",
    ),
    Entry(
        "lspci.userspace_exits_cacheable",
        "exits",
        "lspci",
        "those of registers that the PCIe specification lets a cache keep",
    ),
    Entry(
        "lspci.uncacheable_dwords",
        "dwords",
        "lspci",
        "registers of all functions that the PCIe specification lets no cache keep",
        "equal",
    ),
    Entry(
        "lspci.byte_mismatches",
        "bytes",
        "lspci",
        "config bytes that differ between two passes, the second with the cache switched off",
    ),
    Entry("lspci.bytes_compared", "bytes", "lspci", "config bytes that were compared", "equal"),
    Entry(
        "lspci.dword_instructions",
        "instructions",
        "lspci",
        "instructions of the host, without the guest's own, for one 4-byte config read",
    ),
    Entry(
        "lspci.dword_instructions_ratio",
        "times",
        "lspci",
        "the same of vanilla, divided by the variant's",
        "higher",
        beside_vanilla=True,
    ),
    Entry(
        "exit.kernel_pair_instructions",
        "instructions",
        "lspci",
        "the same for two port accesses that KVM serves: the floor of a config read",
        "equal",
    ),
    Entry(
        "ecam.read_exits",
        "exits",
        "lspci",
        "exits for reads of config space by ECAM in one pass of lspci -xxxx",
    ),
    Entry(
        "ecam.functions",
        "functions",
        "lspci",
        "functions that the guest has, by what stands behind them",
        "equal",
    ),
    Entry(
        "ecam.mapped_functions",
        "functions",
        "lspci",
        "functions whose config space QEMU says it maps into the guest",
        "higher",
    ),
    Entry(
        "vmexit.agent.exits_per_sample",
        "exits/sample",
        "vmexit",
        "exits of all reasons while a monitoring agent runs, a sample",
    ),
    Entry(
        "vmexit.agent.userspace_exits_per_sample",
        "exits/sample",
        "vmexit",
        "exits to QEMU while a monitoring agent runs, a sample",
    ),
    Entry(
        "vmexit.agent.pmu_exits_per_sample",
        "exits/sample",
        "vmexit",
        "RDPMC and PMU MSR exits while a monitoring agent runs, a sample",
    ),
    Entry(
        "vmexit.agent.pmi_exits_per_sample",
        "exits/sample",
        "vmexit",
        "exits for overflows of counters while an agent that uses them runs, a sample",
    ),
    Entry(
        "vmexit.agent.pmu_switches_per_sample",
        "loads/sample",
        "vmexit",
        "loads of a mediated PMU while an agent that uses counters runs, a sample",
    ),
    Entry(
        "pmu.count_error_pct",
        "%",
        "vmexit",
        "how far the guest's counters are off for a loop of known length",
    ),
    Entry(
        "pmu.leaked_host_instructions",
        "instructions/exit",
        "vmexit",
        "what a counter of the guest counts beyond the guest's own instructions, an exit",
        "equal",
    ),
    Entry(
        "pmu.selector_write_instructions",
        "instructions",
        "vmexit",
        "instructions of the host, without the guest's own, for one write of an event selector",
    ),
    Entry(
        "vmexit.agent.samples_per_s",
        "samples/s",
        "vmexit",
        "samples that the agent took a second (it asks for 1000)",
        "higher",
    ),
    Entry("p2p.read_mib_s", "MiB/s", "p2p", "NVMe reads into the peer's memory", "higher"),
    Entry("p2p.write_mib_s", "MiB/s", "p2p", "NVMe writes from the peer's memory", "higher"),
    Entry("p2p.host_ram_mib_s", "MiB/s", "p2p", "the same transfers with guest RAM", "higher"),
    Entry("p2p.corrupt_bytes", "bytes", "p2p", "bytes that differ after a transfer"),
    Entry(
        "p2p.ram_bytes",
        "bytes",
        "p2p",
        "bytes of RAM that the initiator moved while it moved the peer's",
        "equal",
    ),
    Entry("p2p.ram_corrupt_bytes", "bytes", "p2p", "bytes of these that differ afterwards"),
    Entry(
        "p2p.bytes_direct",
        "bytes",
        "p2p",
        "peer-to-peer bytes that the switch carried straight to the peer",
        "equal",
    ),
    Entry(
        "p2p.bytes_redirected",
        "bytes",
        "p2p",
        "peer-to-peer bytes that ACS sent up to the root complex",
        "equal",
    ),
    Entry(
        "p2p.bytes_translated",
        "bytes",
        "p2p",
        "peer-to-peer bytes carried straight to the peer as translated requests (ATS)",
        "equal",
    ),
    Entry("p2p.iommu_faults", "faults", "p2p", "DMA faults that the host's IOMMU logged"),
    Entry(
        "p2p.tool_gb_s",
        "GB/s",
        "p2p",
        "bandwidth by a tool that is installed on a server, 10^9 bytes a second",
        "higher",
        asked=True,
    ),
    Entry("p2p.tool_latency_us", "us", "p2p", "latency by such a tool", asked=True),
    Entry(
        "imc.read_exits",
        "exits",
        "imc",
        "exits for one read of a memory controller's counter in the guest",
        only_on=True,
    ),
    Entry(
        "imc.read_userspace_exits",
        "exits",
        "imc",
        "those of them that went to QEMU",
        only_on=True,
    ),
    Entry(
        "imc.cas_read_error_pct",
        "%",
        "imc",
        "how far the guest's counts are off for a known number of bytes that a device read",
        only_on=True,
    ),
    Entry(
        "imc.cas_write_error_pct",
        "%",
        "imc",
        "the same for bytes that it wrote",
        only_on=True,
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
TESTS: tuple[str, ...] = ("lspci", "vmexit", "p2p", "imc")
FUNCTIONS: tuple[str, ...] = ("imc",)
"""Functions of a host that a guest may get by a driver of their own: ``imc`` is that of the memory
controllers, 8086:3451."""
GUEST_SETUPS: tuple[str, ...] = ("iommu", "iommufd", "direct")
"""The set-ups of p2p that are a guest on a host as every test has it (measure/p2p.py)."""


def planned(names: frozenset[str], variants: Sequence[Variant]) -> dict[Variant, frozenset[str]]:
    """Which of the names a run of these variants has to give for each of them."""
    compared = frozenset(name for name, entry in CATALOGUE.items() if entry.beside_vanilla)
    only_on = frozenset(name for name, entry in CATALOGUE.items() if entry.only_on)
    alone = names - compared
    beside = names if "vanilla" in variants else alone
    return {
        variant: (alone if variant == "vanilla" else beside)
        - (only_on if variant != "on" else frozenset())
        for variant in variants
    }


def nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """A hint that names the nearest known name, or lists all."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(set(known)))}"
