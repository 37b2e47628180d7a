# SPDX-License-Identifier: GPL-2.0-or-later
"""nvbandwidth's JSON (NVIDIA/nvbandwidth, ``--json``; its json_output.cpp, v0.8).

Cells are texts: a number of six digits, or ``N/A`` for a pair that was not measured. The unit is
at the end of the description. A test that gives several matrices (bidirectional ones: two
directions and their total) has them all in one, one below the other, with description and
``sum`` of the last one; that one is read, and its sum has to be the one that is said.

nvbandwidth ends with status 0 also when tests were waived (no two GPUs, no access to peers) or
broke: these are errors here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ...core.errors import MeasurementError
from .reading import TO_GB_S, TO_US, Quantity, Reading, amount, json_object, tail

TOOL = "nvbandwidth"
_UNIT = re.compile(r"\(([^()]+)\)\s*$")
_TEXT = re.compile(r"^(?:nvbandwidth Version: (v[\d.]+)|Running \w+\.|SUM \w+ [\d.]+)", re.M)
"""What versions without JSON print, and newer ones without -j."""
_SUM_TOLERANCE = 1e-4
"""Cells have six digits, their sum has more."""


def parse(output: str, wanted: Collection[str] = ()) -> tuple[Reading, ...]:
    """All cells of all tests; MeasurementError if one of them, or of ``wanted``, gave none.

    Context: ``test``, ``row`` and ``column`` of the matrix (numbers of GPUs, or 0 for the CPU).
    """
    if (text := _TEXT.search(output)) and '"nvbandwidth"' not in output:
        version = text[1] or "it"
        raise MeasurementError(
            f"{TOOL}: {version} printed text, and no JSON",
            hint="JSON needs v0.5 or newer",
            detail=tail(output),
        )
    whole = json_object(TOOL, output)
    document = whole.get("nvbandwidth")
    if not isinstance(document, dict):
        raise MeasurementError(f"{TOOL}: its JSON has no 'nvbandwidth'", detail=output[:500])
    tests = document.get("testcases") or []
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise MeasurementError(f"{TOOL}: its JSON has invalid tests", detail=output[:500])
    # v0.8 keeps an error of a running test beside the tests
    error = document.get("error") or next(
        (test.get("error") for test in tests if test.get("error")), None
    )
    if error:
        raise MeasurementError(f"{TOOL}: {' '.join(str(error).split())[:200]}")
    readings: list[Reading] = []
    for test in tests:
        readings += _cells(test)
    there = {str(test.get("name")) for test in tests}
    lacks = sorted(set(wanted) - there)
    if lacks or not tests:
        raise MeasurementError(
            f"{TOOL}: it has no results of {', '.join(lacks) or 'any test'}",
            hint="'nvbandwidth --list' has the names of its tests",
        )
    return tuple(readings)


def _cells(test: dict[str, Any]) -> list[Reading]:
    name, status = str(test.get("name")), str(test.get("status"))
    if status != "Passed":
        waived = status == "Waived"
        raise MeasurementError(
            f"{TOOL}: {name}: {status}",
            hint="it needs two GPUs that have access to each other (nvidia-smi topo -p2p rw)"
            if waived
            else "run it by hand with -t and without -j: it says more",
        )
    description = str(test.get("bandwidth_description", ""))
    unit = _UNIT.search(description)
    quantity: Quantity
    if unit and unit[1] in TO_GB_S:
        quantity, factor = "bandwidth", TO_GB_S[unit[1]]
    elif unit and unit[1] in TO_US:
        quantity, factor = "latency", TO_US[unit[1]]
    else:
        raise MeasurementError(f"{TOOL}: {name}: no known unit in '{description}'")
    matrix = _last(name, test)
    found = [
        Reading(
            quantity,
            amount(TOOL, cell, f"{name}, row {i}, column {j}") * factor,
            {"test": name, "row": str(i), "column": str(j)},
        )
        for i, row in enumerate(matrix)
        for j, cell in enumerate(row)
        if cell != "N/A"
    ]
    # before v0.3 pairs that were not measured are 0
    found = [one for one in found if one.value > 0]
    if not found:
        raise MeasurementError(f"{TOOL}: {name}: no pair was measured")
    return found


def _last(name: str, test: dict[str, Any]) -> list[list[str]]:
    """The last of the matrices that a test gave, told by its sum."""
    every = test.get("bandwidth_matrix")
    if (
        not isinstance(every, list)
        or not every
        or not all(isinstance(row, list) and len(row) == len(every[0]) for row in every)
    ):
        raise MeasurementError(f"{TOOL}: {name}: it has no matrix")
    said = amount(TOOL, test.get("sum", ""), f"the sum of {name}")
    for count in (1, 3, 2):
        if len(every) % count:
            continue
        last: list[list[str]] = every[len(every) - len(every) // count :]
        cells = [
            amount(TOOL, cell, f"a cell of {name}") for row in last for cell in row if cell != "N/A"
        ]
        if abs(sum(cells) - said) <= _SUM_TOLERANCE * max(said, 1.0):
            return last
    raise MeasurementError(f"{TOOL}: {name}: the sum of its cells is not {said:g}, as it says")
