# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compared in one run: which patches are in, and what is switched on, a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.errors import UsageError
from ..core.model import VARIANTS, Variant
from .series import Enable, Series

TOGETHER = "+"
"""Joins the names of series that are on together."""


@dataclass(frozen=True)
class Config:
    """One variant, for one series where it is ``on``."""

    variant: Variant
    series: str | None = None
    linux_patches: tuple[Path, ...] = ()
    qemu_patches: tuple[Path, ...] = ()
    guest_patches: tuple[Path, ...] = ()
    applied: tuple[str, ...] = ()
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    qemu_args: tuple[str, ...] = ()
    accel: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Properties of QEMU's accelerator, by the module of KVM that the host has."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """Drivers by functions of the host that the guest gets."""
    setups: tuple[str, ...] = ()
    """The set-ups that its tests measure it in, each in a guest of its own; none: the plain one."""
    tests: tuple[str, ...] = ()
    """The tests that its series names; none means all that every variant runs."""

    @property
    def label(self) -> str:
        """A short name for files and steps."""
        return "-".join(word for word in (self.variant, self.series) if word)

    @property
    def named(self) -> tuple[str, ...]:
        """The tests that are for its series: a pair of series has none of its own."""
        return () if self.series is not None and TOGETHER in self.series else self.tests


def configs(series: Sequence[Series], wanted: Sequence[Variant]) -> tuple[Config, ...]:
    """The variants to run, in the order vanilla, off, on (once for each product series and pair).

    A series that has nothing to switch on yet has no ``on``.
    Raises UsageError where a patched variant is asked for and there is no product series.
    """
    product = [one for one in series if one.is_product and not one.draft]
    if not product and (patched := [variant for variant in wanted if variant != "vanilla"]):
        raise UsageError(
            f"there is no product series yet, so no variant '{patched[0]}'",
            hint="leave --variant out, or add a series to patches/series.yaml",
        )

    def patches(tree: str) -> tuple[Path, ...]:
        return tuple(path for one in product if one.tree == tree for path in one.patches())

    if "on" in wanted and not _has_switch(product):
        raise UsageError(
            "no series defines what its variant 'on' switches on",
            hint="add enable: to its entry in patches/series.yaml",
        )
    linux, qemu = patches("linux"), patches("qemu")
    applied = tuple(dict.fromkeys(one.name for one in product))
    result: list[Config] = []
    for variant in VARIANTS:
        if variant not in wanted:
            continue
        if variant == "vanilla":
            result.append(Config("vanilla"))
            continue
        if variant == "off":
            result.append(Config("off", None, linux, qemu, applied=applied))
            continue
        base = Config("on", None, linux, qemu, applied=applied)
        switched = [name for name in applied if _has_switch(_parts(product, [name]))]
        result += [_on(base, name, _parts(product, [name])) for name in switched]
        for names, tests in together(product).items():
            both = _on(base, TOGETHER.join(names), _parts(product, names))
            result.append(replace(both, tests=tests, setups=()))
    return tuple(result)


def together(series: Sequence[Series]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The pairs of series that are also measured together, and by which tests."""
    return {(other, one.name): tests for one in series for other, tests in one.together.items()}


def names_of(series: Sequence[Series]) -> tuple[str, ...]:
    """The names that a variant ``on`` may have, drafts' too."""
    pairs = [TOGETHER.join(names) for names in together(series)]
    return tuple(dict.fromkeys([*(one.name for one in series), *pairs]))


def _parts(series: Sequence[Series], names: Sequence[str]) -> list[Series]:
    return [one for name in names for one in series if one.name == name]


def _on(base: Config, name: str, parts: Sequence[Series]) -> Config:
    """The variant with what these parts enable."""
    enables = [one.enable for one in parts]
    guest = any(one.guest_kernel == "patched" for one in enables)
    return replace(
        base,
        series=name,
        guest_patches=base.linux_patches if guest else (),
        modules={key: dict(value) for one in enables for key, value in one.modules.items()},
        qemu_args=tuple(word for one in enables for word in one.qemu_arguments()),
        accel={key: dict(value) for one in enables for key, value in one.accel.items()},
        functions={key: driver for one in enables for key, driver in one.functions.items()},
        setups=tuple(dict.fromkeys(setup for one in enables for setup in one.setups)),
        tests=tuple(dict.fromkeys(test for one in parts for test in one.tests)),
    )


def available(series: Sequence[Series]) -> tuple[Variant, ...]:
    """The variants that the series at hand make possible."""
    product = [one for one in series if one.is_product and not one.draft]
    if not product:
        return ("vanilla",)
    return VARIANTS if _has_switch(product) else ("vanilla", "off")


def _has_switch(series: Sequence[Series]) -> bool:
    return any(one.enable != Enable() for one in series)
