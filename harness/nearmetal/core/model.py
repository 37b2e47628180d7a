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
class Subject:
    """What something was measured on: the one key of every result.

    ``series`` is what is on (variant ``on``), ``setup`` what is arranged otherwise than the
    variant alone says (measure.api.Setup), ``testbed`` the emulated host, None on a server.
    """

    variant: Variant
    series: str | None = None
    setup: str | None = None
    testbed: str | None = None

    @property
    def label(self) -> str:
        """A short name for files and steps, such as ``on-direct-direct-p2p``."""
        return "-".join(word for word in (self.variant, self.setup, self.series) if word)

    @property
    def keys(self) -> Mapping[str, str]:
        """What is told of it, by key; keys without a value are left out."""
        every = {
            "variant": self.variant,
            "series": self.series,
            "setup": self.setup,
            "testbed": self.testbed,
        }
        return {key: value for key, value in every.items() if value is not None}


SUBJECT_KEYS = ("variant", "series", "setup", "testbed")
"""The keys of a subject, which no measurement has in its context."""


@dataclass(frozen=True)
class Measurement:
    """One row of measured values; ``context`` tells rows of one name and subject apart.

    ``values`` are in ``unit``, in the order in which they were measured.
    """

    name: str
    subject: Subject
    unit: str
    values: tuple[float, ...]
    provenance: Provenance
    derived: bool = False
    context: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    @property
    def median(self) -> float:
        """The median of the values, in the row's unit."""
        return statistics.median(self.values)

    @property
    def variant(self) -> Variant:
        """The subject's variant."""
        return self.subject.variant

    @property
    def series(self) -> str | None:
        """The series that is on, if any."""
        return self.subject.series

    @property
    def where(self) -> Mapping[str, str]:
        """Set-up, context and testbed: all that tells rows of one variant and series apart."""
        subject = self.subject
        found = {} if subject.setup is None else {"setup": subject.setup}
        found |= self.context
        return found if subject.testbed is None else found | {"testbed": subject.testbed}


@dataclass(frozen=True)
class Missing:
    """A measurement that should have been made and was not, and why."""

    test: str
    subject: Subject
    reason: str
    names: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True)
class Skipped:
    """A measurement that is declared not to apply here, and why."""

    test: str
    subject: Subject
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
class Headline:
    """The figure that says what a series is worth: rows of one metric, before and after it.

    ``label`` are words for people. ``rows`` are selectors that all of its rows have; those of
    vanilla and off have ``before`` beside them, those of ``on`` ``after``. None: without that key.
    """

    metric: str
    label: str
    rows: Mapping[str, str | None] = field(default_factory=lambda: EMPTY)
    before: Mapping[str, str | None] = field(default_factory=lambda: EMPTY)
    after: Mapping[str, str | None] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True)
class Feature:
    """What a reader of a report wants to know of a series: its purpose, headlines and checks."""

    name: str
    purpose: str
    headlines: tuple[Headline, ...] = ()
    checks: tuple[str, ...] = ()


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
    series: tuple[Feature, ...] = ()
    """The series that the run could switch on, as series.yaml described them then."""
