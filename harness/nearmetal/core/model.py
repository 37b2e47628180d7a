# SPDX-License-Identifier: GPL-2.0-or-later
"""What flows between the layers: frozen records, and nothing that acts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Provenance = Literal["hardware", "emulated"]
Status = Literal["pass", "fail", "error", "skip"]
Variant = Literal["vanilla", "off", "on"]

VARIANTS: tuple[Variant, ...] = ("vanilla", "off", "on")

EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Measurement:
    """One row of measured values; ``context`` tells rows of one name apart.

    ``values`` are in ``unit``, in the order in which they were measured.
    """

    name: str
    variant: Variant
    unit: str
    values: tuple[float, ...]
    provenance: Provenance
    series: str | None = None
    derived: bool = False
    context: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    @property
    def median(self) -> float:
        """The median of the values, in the row's unit."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Missing:
    """A measurement that should have been made and was not, and why."""

    test: str
    variant: Variant
    reason: str
    names: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True)
class Skipped:
    """A measurement that is declared not to apply here, and why."""

    test: str
    variant: Variant
    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """Something that was built or fetched, and exactly from what."""

    role: Literal["host-kernel", "guest-kernel", "host-qemu", "emulator", "image"]
    variant: Variant
    source: str
    sha256: str
    series: tuple[str, ...] = ()
    testbed: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check."""

    name: str
    status: Status
    observed: str
    expected: str
    reason: str


@dataclass(frozen=True)
class RunInfo:
    """When, where and by which command a run was made; times in seconds."""

    id: str
    started: str
    finished: str
    host: str
    command: str
    seconds: float
    cold: bool
    boot_retries: int


@dataclass(frozen=True)
class Report:
    """A whole run, as report.json holds it."""

    run: RunInfo
    builds: tuple[Build, ...]
    measurements: tuple[Measurement, ...]
    checks: tuple[CheckResult, ...]
