# SPDX-License-Identifier: GPL-2.0-or-later
"""nccl-tests (NVIDIA/nccl-tests): the file of ``-J`` (2.17.4 and later), or the table.

The bus bandwidth is read: what each link carried, which can be held against a link's speed (the
project's doc/PERFORMANCE.md). A result with wrong elements is an error, whatever its speed.

The file holds the whole environment of the process, passwords and all: ``without_environment``
is what may be kept. In files of version 1 some words are written wrong (``bandwidith``).
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from ...core.errors import MeasurementError
from .reading import TO_GB_S, Reading, amount, complaint, json_object, tail

TOOL = "nccl-tests"
VERSIONS = (1, 2, 3)
"""Versions of the file that are known."""

_PLACES = {"out_of_place": "out", "in_place": "in"}


def parse(document: str) -> tuple[Reading, ...]:
    """Bus bandwidth by size, from the file of ``-J``.

    Context: ``test`` (the program), ``size`` in bytes, ``type``, ``redop``, ``place`` (``in``,
    ``out``).
    """
    found = json_object(TOOL, document)
    version = found.get("version")
    if version not in VERSIONS:
        raise MeasurementError(
            f"{TOOL}: its file is of version {version}; known are {VERSIONS[0]} to {VERSIONS[-1]}",
            hint="leave -J out (json: false): the table is read as well",
        )
    if errors := [str(one) for one in found.get("errors") or () if one]:
        raise MeasurementError(f"{TOOL}: {' '.join(errors[0].split())[:200]}")
    results = found.get("results")
    if "end_time" not in found or not isinstance(results, list) or not results:
        raise MeasurementError(f"{TOOL}: its file has no results: the test has not ended")
    bounds = found.get("out_of_bounds")
    if not isinstance(bounds, dict) or bounds.get("count") != 0:
        raise MeasurementError(f"{TOOL}: values out of bounds: the data was wrong")
    program = PurePosixPath(str((found.get("args") or ["?"])[0])).name
    readings: list[Reading] = []
    for result in results:
        for key, place in _PLACES.items():
            side = result.get(key)
            if side is None:
                continue
            _right(side.get("nwrong"), result.get("size"))
            readings.append(
                Reading(
                    "bandwidth",
                    amount(TOOL, side.get("bus_bw", ""), f"the bandwidth of {result.get('size')}"),
                    _context(program, result, place),
                )
            )
    if not readings:
        raise MeasurementError(f"{TOOL}: its file has no results")
    return tuple(readings)


def _context(program: str, result: dict[str, Any], place: str) -> dict[str, str]:
    return {
        "test": program,
        "size": str(result.get("size")),
        "type": str(result.get("type")),
        "redop": str(result.get("redop")),
        "place": place,
    }


def _right(wrong: Any, size: Any) -> None:
    """MeasurementError if elements were wrong; None and N/A: they were not compared."""
    if wrong in (None, "N/A"):
        return
    if amount(TOOL, wrong, "the number of wrong elements") != 0:
        raise MeasurementError(f"{TOOL}: {wrong} elements of {size} bytes were wrong")


def without_environment(document: str) -> str:
    """The file of ``-J`` without the environment of the process, for keeping."""
    found = json_object(TOOL, document)
    found.pop("env", None)
    return json.dumps(found, indent=1)


_COLUMNS = re.compile(r"^#\s+size\s+count\s+type\b.*$", re.M)
_UNITS = re.compile(r"^#\s+\(B\)\s+\(elements\).*$", re.M)
_BOUNDS = re.compile(r"^#\s*Out of bounds values\s*:\s*(\d+)\s+(\w+)", re.M)
_STARTING = re.compile(r"^# Collective test starting: (\S+)", re.M)


def parse_table(output: str, program: str) -> tuple[Reading, ...]:
    """The same from the table on standard output, for versions without ``-J``."""
    head, units = _COLUMNS.search(output), _UNITS.search(output)
    if head is None or units is None:
        said = complaint(output, ("failure", "NCCL", "error", "Invalid", "USAGE"))
        raise MeasurementError(
            f"{TOOL}: {said}" if said else f"{TOOL}: it printed no table", detail=tail(output)
        )
    names = head[0][1:].split()
    places = [index for index, name in enumerate(names) if name == "busbw"]
    if len(places) != 2 or names[:2] != ["size", "count"]:
        raise MeasurementError(f"{TOOL}: its table has other columns", detail=head[0])
    if [unit for unit in re.findall(r"\(([^()]+)\)", units[0]) if "/s" in unit] != ["GB/s"] * 4:
        raise MeasurementError(f"{TOOL}: its table has other units", detail=units[0])
    bounds = _BOUNDS.search(output)
    if bounds is None:
        raise MeasurementError(f"{TOOL}: its output ends early", detail=tail(output))
    if bounds[1] != "0" or bounds[2] != "OK":
        raise MeasurementError(f"{TOOL}: {bounds[1]} values out of bounds: the data was wrong")
    starting = _STARTING.search(output)
    test = PurePosixPath(starting[1] if starting else program).name
    readings: list[Reading] = []
    for line in output[units.end() : bounds.start()].splitlines():
        cells = line.split()
        if not cells or not cells[0].isdigit():
            continue
        if len(cells) != len(names):
            raise MeasurementError(f"{TOOL}: a line of its table is not whole", detail=line)
        result = dict(zip(names[:4], cells, strict=False))
        for place, index in zip(("out", "in"), places, strict=True):
            _right(cells[index + 1], cells[0])
            readings.append(
                Reading(
                    "bandwidth",
                    amount(TOOL, cells[index], f"the bandwidth of {cells[0]}") * TO_GB_S["GB/s"],
                    _context(test, result, place),
                )
            )
    if not readings:
        raise MeasurementError(f"{TOOL}: its table is empty", detail=tail(output))
    return tuple(readings)
