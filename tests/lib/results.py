# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements and plans for tests, as a run would make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nearmetal.core.model import Measurement, Provenance, Subject, Variant
from nearmetal.judging.judge import Plan
from nearmetal.machines.emulators import EMULATORS
from nearmetal.machines.equipment import SERVER_HAS, SERVER_LACKS, Equipment
from nearmetal.measure import registry
from nearmetal.patches.variants import Config
from nearmetal.runs import plan as plans

PAIR = {"peer": "0000:03:00.0", "disk": "0000:04:00.0"}


def row(
    *values: float,
    name: str,
    variant: Variant = "vanilla",
    series: str | None = None,
    setup: str | None = None,
    testbed: str | None = None,
    unit: str | None = None,
    provenance: Provenance = "emulated",
    **context: str,
) -> Measurement:
    """A row; ``pass_`` stands for the context key ``pass``."""
    keys = {key.removesuffix("_"): value for key, value in context.items()}
    subject = Subject(variant, series, setup, testbed)
    known = registry.metrics().get(name)
    unit = unit or (known.unit if known else "exits")
    return Measurement(name, subject, unit, tuple(map(float, values)), provenance, context=keys)


def changed(one: Measurement, *, values: Sequence[float] | None = None, **subject: Any) -> Any:
    """The row with other values, or of another subject."""
    return dataclasses.replace(
        one,
        subject=dataclasses.replace(one.subject, **subject),
        values=one.values if values is None else tuple(values),
    )


def equipment(testbed: str | None) -> Equipment:
    """What the emulated host has when it is up; a server's for None. Subjects have no testbed."""
    if testbed is None:
        return Equipment(p2p=PAIR, has=SERVER_HAS, lacks=SERVER_LACKS)
    kind = EMULATORS[testbed]
    return Equipment(p2p=PAIR, functions={"imc": "0000:fe:00.1"}, has=kind.has, lacks=kind.lacks)


def work(
    tests: Sequence[str], configs: Sequence[Config | Variant], testbed: str | None = None
) -> tuple[plans.Work, ...]:
    """The units of these tests on these variants."""
    every = [one if isinstance(one, Config) else Config(one) for one in configs]
    return plans.work(every, tests, equipment(testbed))


def plan(
    tests: Sequence[str],
    configs: Sequence[Config | Variant],
    *,
    host: str = "testbed",
    testbed: str | None = None,
) -> Plan:
    """What a run of these tests on these variants has to give."""
    found = plans.expected(work(tests, configs, testbed), equipment(testbed))
    return Plan(tests=tuple(tests), names=found.names, host=host, testbed=testbed)
