# SPDX-License-Identifier: GPL-2.0-or-later
"""One figure of a tool, and what the readers of the tools share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.errors import MeasurementError

Quantity = Literal["bandwidth", "latency"]


@dataclass(frozen=True)
class Reading:
    """A figure of a tool: a bandwidth in GB/s (10^9 bytes), or a latency in microseconds.

    ``context`` tells the figures of one run of the tool apart (test, size, pair of GPUs).
    """

    quantity: Quantity
    value: float
    context: Mapping[str, str] = field(default_factory=dict)


TO_GB_S: Mapping[str, float] = {
    "GB/s": 1.0,
    "Gb/sec": 0.125,
    "MiB/sec": (1 << 20) / 1e9,
    # perftest 4.5's word for MiB/sec: its bytes are divided by 2^20 all the same
    "MB/sec": (1 << 20) / 1e9,
}
"""What a unit of bandwidth, as tools write it, is in GB/s."""

TO_US: Mapping[str, float] = {"us": 1.0, "ns": 1e-3}
"""What a unit of time is in microseconds."""


def amount(tool: str, text: str | float, what: str) -> float:
    """A number that can be one of a bandwidth or a time; MeasurementError for any other."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise MeasurementError(f"{tool}: {what} is '{text}', and no number") from None
    if not math.isfinite(value) or value < 0:
        raise MeasurementError(f"{tool}: {what} is {text}")
    return value


def json_object(tool: str, text: str) -> dict[str, Any]:
    """The JSON object that a tool wrote, behind whatever its libraries said first."""
    if not text.strip():
        raise MeasurementError(f"{tool}: its output is empty")
    start = text.find("{")
    try:
        found, _ = json.JSONDecoder().raw_decode(text[max(start, 0) :])
    except ValueError as error:
        raise MeasurementError(
            f"{tool}: its output is not complete JSON: {error}", detail=tail(text)
        ) from None
    if not isinstance(found, dict):
        raise MeasurementError(f"{tool}: its JSON is not an object", detail=tail(text))
    return found


def tail(text: str, lines: int = 10) -> str:
    """The last lines that say something, for the detail of an error."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def complaint(text: str, marks: Sequence[str]) -> str | None:
    """The first line that has one of the marks of an error, or None."""
    for line in text.splitlines():
        if any(mark in line for mark in marks):
            return " ".join(line.split())[:200]
    return None
