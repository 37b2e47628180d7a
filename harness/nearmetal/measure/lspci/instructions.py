# SPDX-License-Identifier: GPL-2.0-or-later
"""Part of lspci: instructions of the host for one config read, and for the floor of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...core.model import Measurement
from ...probes import instructions
from ..bench import Bench

SERIES = 3
"""A series gives one value, the count of an undisturbed read."""

ELCR = 0x4D0
"""Edge/level control of the first interrupt controller: KVM serves it with a few instructions."""


@dataclass(frozen=True)
class _Target:
    """Something to count: the probe's words, the exits that it takes, the row that it gives."""

    name: str
    words: str
    exits: int
    context: Mapping[str, str]


def _targets(
    bench: Bench, functions: Mapping[str, str], mapped: Collection[str], prefers_ecam: bool
) -> list[_Target]:
    """Registers that a cache may keep and one that it may not, of both kinds of functions.

    ``functions`` are the guest's, with their class; ``mapped`` those that it reads by ECAM,
    without an exit; ``prefers_ecam`` says that it reads the others so, too.
    """
    targets = []

    def add(function: str, address: str, register: str, offset: int) -> None:
        path, exits = ("ecam", 1) if prefers_ecam or offset >= 0x100 else ("cf8", 2)
        if address in mapped:
            path, exits = "ecam", 0
        targets.append(
            _Target(
                "lspci.dword_instructions",
                f"config /sys/bus/pci/devices/{address}/config {offset:#x}",
                exits,
                {"path": path, "function": function, "register": register},
            )
        )

    def first(kind: str) -> str | None:
        return min((address for address, have in functions.items() if have == kind), default=None)

    bridge, port = first("0600"), first("0604")
    assigned = first("0108") if bench.host.p2p else None
    for function, address in (("emulated", bridge), ("assigned", assigned)):
        if address is not None:
            add(function, address, "id", 0)
            add(function, address, "status", 4)
    for function, address in (("emulated", port), ("assigned", assigned)):
        if address is not None:
            add(function, address, "extended", 0x100)
    pair = _Target("exit.kernel_pair_instructions", f"ports {ELCR:#x}", 2, {"port": f"{ELCR:#x}"})
    return [*targets, pair]


def measure(
    bench: Bench,
    functions: Mapping[str, str],
    mapped: Collection[str] = (),
    prefers_ecam: bool = False,
) -> list[Measurement]:
    """The rows of both metrics; what was seen between is kept in ``logs``."""
    log = bench.host.instructions
    assert log is not None
    rows, kept = [], []
    with instructions.pinned(bench.host, bench.guest):
        for target in _targets(bench, functions, mapped, prefers_ecam):
            values = []
            for _ in range(SERIES):
                every = instructions.series(log, bench.guest.shell, target.words)
                kept.append({"words": target.words, **instructions.summary(every)})
                values.append(instructions.undisturbed(every, target.exits))
            rows.append(bench.row(target.name, values, **target.context))
    text = "\n".join(json.dumps(one) for one in kept)
    (bench.logs / f"{bench.label}-instructions.jsonl").write_text(text + "\n")
    return rows


def compared(rows: list[Measurement]) -> list[Measurement]:
    """What vanilla takes divided by what each other variant takes, from a whole run's rows."""
    counted = [row for row in rows if row.name == "lspci.dword_instructions"]
    vanilla = {_place(row): row for row in counted if row.variant == "vanilla"}
    return [
        dataclasses.replace(
            row,
            name="lspci.dword_instructions_ratio",
            unit="times",
            values=(base.median / row.median,),
            derived=True,
        )
        for row in counted
        if row.variant != "vanilla" and row.median and (base := vanilla.get(_place(row)))
    ]


def _place(row: Measurement) -> tuple[object, ...]:
    """What two rows have in common that are compared."""
    return row.subject.testbed, tuple(row.context.items())
