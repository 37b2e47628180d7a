# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test works on: a host, a guest that is up, the counting in its host, and the unit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import MeasurementError
from ..core.model import Measurement, Missing, Skipped, Subject, Variant
from ..machines.guest import Guest
from ..machines.host import Host
from ..probes.tracing import Exits, Switches, Tracer, parse_exits
from . import registry
from .api import PLAIN, Setup, Unit

Found = Measurement | Missing | Skipped
"""What a test gives: rows, and what it could not measure or what does not apply."""


@dataclass(frozen=True)
class Bench:
    """One unit on a host. ``logs`` takes what a test wants to keep.

    ``vm`` and ``tracer`` are None in a bare set-up, which has no guest.
    """

    host: Host
    vm: Guest | None
    tracer: Tracer | None
    unit: Unit
    logs: Path
    setup: Setup = PLAIN

    @property
    def guest(self) -> Guest:
        """The guest, which the set-up must have."""
        assert self.vm is not None
        return self.vm

    @property
    def subject(self) -> Subject:
        """What is measured."""
        return self.unit.subject

    @property
    def variant(self) -> Variant:
        """The subject's variant."""
        return self.subject.variant

    @property
    def label(self) -> str:
        """A short name for files."""
        return self.subject.label

    def row(self, name: str, values: Iterable[float], **context: str) -> Measurement:
        """A measurement of this bench; ``context`` tells rows of one name apart."""
        return rows(self.host, self.subject)(name, values, **context)

    def traced(
        self, label: str, command: str, *, deadline_s: float, switches: Switches | None = None
    ) -> tuple[dict[str, Any], Exits]:
        """Run a probe that marks its interval in the guest; its JSON line and the exits in it.

        The histograms' text is kept in ``logs``. MeasurementError when the probe fails, when
        either kernel breaks meanwhile, or when events were lost. ``switches`` counts the loads
        of a mediated PMU, too.
        """
        assert self.tracer is not None
        self.tracer.on(switches=switches)
        out = self.guest.shell.run(command, deadline_s=deadline_s).stdout
        raw = self.tracer.raw()
        self.tracer.off()
        (self.logs / f"{self.label}-{label}.hist").write_text(raw)
        self.guest.check()
        return _json_line(command, out), parse_exits(raw)

    def timed(self, command: str, *, deadline_s: float) -> dict[str, Any]:
        """Run a probe in the guest with no counting in the host; its JSON line.

        Times come from here: histograms make an exit several times slower.
        """
        out = self.guest.shell.run(command, deadline_s=deadline_s).stdout
        self.guest.check()
        return _json_line(command, out)


Row = Callable[..., Measurement]
"""(name, values, **context): a measurement; ``context`` tells rows of one name apart."""


def rows(host: Host, subject: Subject) -> Row:
    """What makes the measurements of a subject on a host.

    It raises ValueError for a context that the metric does not declare: a fault of the test.
    """

    def row(name: str, values: Iterable[float], **context: str) -> Measurement:
        metric = registry.metrics()[name]
        for key, value in context.items():
            if not metric.allows(key, value):
                raise ValueError(f"{name} does not declare the context {key}={value}")
        return Measurement(
            name=name,
            subject=subject,
            unit=metric.unit,
            values=tuple(float(value) for value in values),
            provenance=host.facts.provenance,
            context=context,
        )

    return row


def _json_line(command: str, out: str) -> dict[str, Any]:
    try:
        said = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise MeasurementError(
            f"'{command}' printed no line of JSON in the guest", detail=out[-500:]
        )
    return said
