# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run sets out to measure: variants, tests and set-ups, as units; all of it is pure.

A unit is one test of one subject. Units that need the same host are measured on one, those that
need the same guest in one, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import UsageError
from ..core.model import Skipped, Subject
from ..core.text import nearest
from ..judging.expression import Reader
from ..machines.emulators import EMULATORS
from ..machines.equipment import Equipment
from ..measure import registry
from ..measure.api import Setup, Test, Unit
from ..patches.series import Known
from ..patches.variants import Config


def known(checks: Sequence[str] | None = None) -> Known:
    """The names that patches/series.yaml may use."""
    return Known(
        tests=tuple(registry.tests()),
        functions=registry.functions(),
        setups=registry.series_setups,
        checks=None if checks is None else tuple(checks),
        rows=lambda place, metric, selectors: Reader(place).rows(metric, selectors),
    )


@dataclass(frozen=True)
class Work:
    """A unit, and what it takes to measure it."""

    config: Config
    test: Test
    setup: Setup
    unit: Unit

    @property
    def subject(self) -> Subject:
        """What is measured."""
        return self.unit.subject

    @property
    def host_key(self) -> tuple[object, ...]:
        """What the host is booted with."""
        return self.config.linux_patches, self.setup.host_key

    @property
    def guest_key(self) -> tuple[object, ...]:
        """What the guest is made with, on one host."""
        config = self.config
        return config.variant, config.series, self.setup.guest_key


def resolve_tests(names: Sequence[str], equipment: Equipment | None = None) -> tuple[str, ...]:
    """The tests by name, all of them for none; UsageError with the nearest name.

    ``equipment`` is the host's, whose capabilities a test may lack.
    """
    every = registry.tests()
    able = {
        name: None if equipment is None else equipment.missing(test.needs)
        for name, test in every.items()
    }
    for name in names:
        if name not in every:
            raise UsageError(f"there is no test '{name}'", hint=nearest(name, every))
        if reason := able[name]:
            assert equipment is not None
            where = f"the {equipment.testbed} testbed" if equipment.testbed else "the host"
            have = ", ".join(one for one, lack in able.items() if lack is None)
            raise UsageError(
                f"{where} cannot run the test '{name}': {reason}", hint=f"it can run {have}"
            )
    return tuple(
        name for name, lack in able.items() if lack is None and (not names or name in names)
    )


def on_testbeds(names: Sequence[str], testbeds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The tests for each of the emulated hosts; one of several that has none of them is left out.

    UsageError as by ``resolve_tests``.
    """
    asked = resolve_tests(names)
    found = {}
    for kind in testbeds:
        equipment = equipment_of(kind)
        if len(testbeds) == 1:
            found[kind] = resolve_tests(names, equipment)
            continue
        can = resolve_tests((), equipment)
        if here := tuple(name for name in asked if name in can):
            found[kind] = here
    return found


def equipment_of(testbed: str) -> Equipment:
    """What is known of an emulated host before it is up."""
    kind = EMULATORS[testbed]
    return Equipment(testbed=kind.name, has=kind.has, lacks=kind.lacks)


def measured_by(config: Config, tests: Sequence[str]) -> tuple[str, ...]:
    """Those of the tests that a variant is measured by."""
    every = registry.tests()
    return tuple(
        test
        for test in tests
        if test in config.tests or (not config.tests and not every[test].opt_in)
    )


def work(configs: Sequence[Config], tests: Sequence[str], equipment: Equipment) -> tuple[Work, ...]:
    """All units of a run on a host, in order."""
    return tuple(
        Work(
            config,
            registry.tests()[name],
            setup,
            Unit(
                Subject(config.variant, config.series, setup.name, equipment.testbed),
                named=name in config.named,
            ),
        )
        for config in configs
        for name in measured_by(config, tests)
        for setup in _setups(config, registry.tests()[name], equipment)
    )


def _setups(config: Config, test: Test, equipment: Equipment) -> list[Setup]:
    """The set-ups that a test measures a variant in.

    Those that its series names, or else the plain one; then those that the variant always has.
    """
    named = [one for one in (test.plain, *test.setups) if one.name in config.setups]
    found = named or [test.plain]
    found += [one for one in test.setups if config.variant in one.variants and one not in found]
    return [one for one in found if equipment.missing(one.needs) is None]


def grouped(every: Sequence[Work]) -> list[list[list[Work]]]:
    """The units by host and, on each, by guest."""
    hosts: dict[tuple[object, ...], dict[tuple[object, ...], list[Work]]] = {}
    for one in every:
        hosts.setdefault(one.host_key, {}).setdefault(one.guest_key, []).append(one)
    return [list(guests.values()) for guests in hosts.values()]


@dataclass(frozen=True)
class Expected:
    """What units must give: names by subject and test, and what is declared not to apply."""

    names: Mapping[tuple[Subject, str], frozenset[str]]
    skipped: tuple[Skipped, ...]


def expected(every: Sequence[Work], equipment: Equipment) -> Expected:
    """The names that each unit must give on a host, and why it has not to give others."""
    names: dict[tuple[Subject, str], frozenset[str]] = {}
    skipped: list[Skipped] = []
    compared = any(one.config.variant == "vanilla" for one in every)
    for one in every:
        wanted: list[str] = []
        reasons: dict[str, list[str]] = {}
        lack = one.test.lacks(equipment, one.unit)
        for metric in one.test.metrics:
            beside = metric.derived is not None
            if beside and (not compared or one.config.variant == "vanilla"):
                continue
            if one.config.variant not in metric.variants or not metric.where(one.unit):
                continue
            if reason := lack or equipment.missing(metric.needs):
                reasons.setdefault(reason, []).append(metric.name)
            elif not metric.asked:
                wanted.append(metric.name)
        names[one.subject, one.test.name] = frozenset(wanted)
        skipped += [
            Skipped(one.test.name, one.subject, reason, tuple(left_out))
            for reason, left_out in reasons.items()
        ]
    return Expected(names, tuple(skipped))
