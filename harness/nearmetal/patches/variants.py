# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compared in one run: which patches are in, and what is switched on, a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import UsageError
from ..core.model import VARIANTS, Variant
from .series import Enable, Series


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


def configs(series: Sequence[Series], wanted: Sequence[Variant]) -> tuple[Config, ...]:
    """The variants to run, in the order vanilla, off, on (once for each product series).

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
            "no series says what its variant 'on' switches on",
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
        for name in applied:
            parts = [one for one in product if one.name == name]
            if not _has_switch(parts):
                continue
            modules = {
                key: dict(value) for one in parts for key, value in one.enable.modules.items()
            }
            accel = {key: dict(value) for one in parts for key, value in one.enable.accel.items()}
            words = tuple(word for one in parts for word in one.enable.qemu_arguments())
            guest = any(one.enable.guest_kernel == "patched" for one in parts)
            setups = tuple(setup for one in parts for setup in one.enable.setups)
            result.append(
                Config(
                    "on",
                    name,
                    linux,
                    qemu,
                    linux if guest else (),
                    applied,
                    modules,
                    words,
                    accel,
                    {key: driver for one in parts for key, driver in one.enable.functions.items()},
                    tuple(dict.fromkeys(setups)),
                    tests=tuple(dict.fromkeys(test for one in parts for test in one.tests)),
                )
            )
    return tuple(result)


def available(series: Sequence[Series]) -> tuple[Variant, ...]:
    """The variants that the series at hand make possible."""
    product = [one for one in series if one.is_product and not one.draft]
    if not product:
        return ("vanilla",)
    return VARIANTS if _has_switch(product) else ("vanilla", "off")


def _has_switch(series: Sequence[Series]) -> bool:
    return any(one.enable != Enable() for one in series)
