# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test works on: a guest that is up, the counting in its host, and the variant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import MeasurementError
from ..core.model import Measurement, Variant
from ..machines.guest import Guest
from ..machines.host import Host
from ..probes.tracing import Exits, Switches, Tracer, parse_exits
from .catalogue import CATALOGUE


@dataclass(frozen=True)
class Bench:
    """A guest on a host, and what is on in it. ``logs`` takes what a test wants to keep."""

    host: Host
    guest: Guest
    tracer: Tracer
    variant: Variant
    logs: Path
    series: str | None = None
    testbed: str | None = None
    setup: str | None = None
    """What is set up otherwise than the variant alone says (variants.Config.setup)."""

    @property
    def label(self) -> str:
        """A short name for files."""
        return "-".join(word for word in (self.variant, self.setup, self.series) if word)

    def row(self, name: str, values: Iterable[float], **context: str) -> Measurement:
        """A measurement of this bench; ``context`` tells rows of one name apart."""
        if self.setup:
            context["setup"] = self.setup
        row = rows(self.host, self.variant, self.series, self.testbed)
        return row(name, values, **context)

    def traced(
        self, label: str, command: str, *, deadline_s: float, switches: Switches | None = None
    ) -> tuple[dict[str, Any], Exits]:
        """Run a probe that marks its interval in the guest; its JSON line and the exits in it.

        The histograms' text is kept in ``logs``. MeasurementError when the probe fails, when
        either kernel breaks meanwhile, or when events were lost. ``switches`` counts the loads
        of a mediated PMU, too.
        """
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


def rows(host: Host, variant: Variant, series: str | None, testbed: str | None) -> Row:
    """What makes the measurements of a variant on a host."""

    def row(name: str, values: Iterable[float], **context: str) -> Measurement:
        if testbed:
            context["testbed"] = testbed
        return Measurement(
            name=name,
            variant=variant,
            unit=CATALOGUE[name].unit,
            values=tuple(float(value) for value in values),
            provenance=host.facts.provenance,
            series=series,
            context=context,
        )

    return row


def _json_line(command: str, out: str) -> dict[str, Any]:
    try:
        said = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise MeasurementError(f"'{command}' printed no JSON line in the guest", detail=out[-500:])
    return said


Test = Callable[[Bench], list[Measurement]]
