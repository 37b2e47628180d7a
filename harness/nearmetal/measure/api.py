# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test of the main job says of itself: metrics, set-ups, needs, checks.

Each test is a package below ``measure`` (or of somebody else, see ``registry``) that defines
``TEST``. Plan, help, schemas, checks, report and page are made from these records; nothing
outside of the package knows its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.model import VARIANTS, Measurement, Missing, Skipped, Subject, Variant
from ..machines.equipment import Equipment

if TYPE_CHECKING:
    from ..machines.guest import GuestParts
    from ..machines.host import Host
    from .bench import Bench

Better = Literal["lower", "higher", "equal"]
Keys = Mapping[str, tuple[str, ...] | str]
"""Context keys, each with its values or a regular expression for them."""


@dataclass(frozen=True)
class Unit:
    """One subject as one test sees it; ``named``: its series names the test as the one for it."""

    subject: Subject
    named: bool = False


def everywhere(unit: Unit) -> bool:
    """A metric that each unit of its test has."""
    return True


ANY = ".*"
"""A context key whose values nobody can list: any text."""


@dataclass(frozen=True)
class Metric:
    """A measurement's name, its unit and what it means; its rows have just these context keys.

    ``keys`` are the context keys that rows may have, with the values or, as one text, a regular
    expression for them; ``*`` stands for all others. ``variants`` and ``where`` say for which
    units the metric exists; ``needs`` names capabilities of the host (machines.equipment) without
    which it is skipped.
    """

    name: str
    unit: str
    meaning: str
    better: Better = "lower"
    """``equal``: neither is better."""
    keys: Keys = field(default_factory=dict)
    variants: tuple[Variant, ...] = VARIANTS
    where: Callable[[Unit], bool] = everywhere
    needs: tuple[str, ...] = ()
    derived: Callable[[list[Measurement]], list[Measurement]] | None = None
    """Makes its rows from all others of a run, beside vanilla's: vanilla itself has none."""
    asked: bool = False
    """Whether it is measured only where an inventory asks for it."""

    def allows(self, key: str, value: str) -> bool:
        """Whether a row may have a context key with this value."""
        known = self.keys.get(key, self.keys.get("*"))
        if known is None:
            return False
        return bool(re.fullmatch(known, value)) if isinstance(known, str) else value in known


@dataclass(frozen=True)
class Setup:
    """What is arranged otherwise than a variant alone says, for the tests that declare it.

    Without ``name`` it is the plain one. ``variants`` have it beside their plain one wherever the
    host has the capabilities of ``needs``; any other variant only if its series names it in
    ``enable.setups``, and then has no plain one.
    """

    name: str | None = None
    variants: tuple[Variant, ...] = ()
    needs: tuple[str, ...] = ()
    iommu: bool = True
    """Whether the emulated host's kernel turns its IOMMU on."""
    ats: bool = False
    """Whether the emulated host's initiator has ATS."""
    bare: bool = False
    """Measured on the host itself, without a guest."""
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Parameters of modules of the host's kernel, in place of the variant's."""
    iommufd: bool = False
    """Whether the guest's functions are assigned by iommufd and not by the type1 container."""
    control: bool = False
    """Whether QEMU isn't told what the variant switches on."""
    shape: Callable[[Host, GuestParts], GuestParts] | None = None
    """What else the guest is to be on this host; raises MeasurementError where it cannot be."""
    after: Callable[[Host], None] | None = None
    """Called when the guest is gone; raises MeasurementError where something was left."""

    @property
    def host_key(self) -> tuple[bool, bool]:
        """What the emulated host is booted with."""
        return self.iommu, self.ats

    @property
    def guest_key(self) -> tuple[object, ...]:
        """What the guest is made with: set-ups with one key share a guest."""
        modules = tuple((name, tuple(one.items())) for name, one in self.modules.items())
        return self.bare, modules, self.iommufd, self.control, self.shape, self.after


PLAIN = Setup()


def nothing_lacks(equipment: Equipment, unit: Unit) -> str | None:
    """A test that every host has what it needs for."""
    return None


@dataclass(frozen=True)
class Test:
    """A test of the main job.

    ``measure`` gives all rows of one unit, and what of it could not be measured. ``lacks`` says
    what a host has not that it needs, or None; then the unit is skipped with that reason.
    """

    name: str
    title: str
    measure: Callable[[Bench], Sequence[Measurement | Missing | Skipped]]
    metrics: tuple[Metric, ...]
    order: int
    """Its place in a run and in a report."""
    plain: Setup = PLAIN
    """How it is measured on every variant; its name is in the rows' ``setup``."""
    setups: tuple[Setup, ...] = ()
    """In what else it can be measured."""
    needs: tuple[str, ...] = ()
    """Capabilities of the host without which it is not run (machines.equipment)."""
    lacks: Callable[[Equipment, Unit], str | None] = nothing_lacks
    opt_in: bool = False
    """Whether only variants run it whose series name it."""
    functions: tuple[str, ...] = ()
    """Functions of a host, by the inventory's names, that it is about."""
    checks: Path | None = None
    """A file of checks that come with it."""

    __test__ = False  # pytest takes classes of this name for its own

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its metrics."""
        return tuple(metric.name for metric in self.metrics)

    def setup(self, name: str | None) -> Setup | None:
        """One of its set-ups by name, the plain one too."""
        return next((one for one in (self.plain, *self.setups) if one.name == name), None)
