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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ...core.errors import MeasurementError
from .reading import TO_GB_S, Reading, amount, complaint, json_object, tail

TOOL = "nccl-tests"
VERSIONS = (1, 2, 3)
"""Versions of the file that are known."""

_PLACES = {"out_of_place": "out", "in_place": "in"}


def parse(document: str, ranks: int | None = None) -> tuple[Reading, ...]:
    """Bus bandwidth by size, from the file of ``-J``; ``ranks`` is how many there should be.

    Context: ``test`` (the program), ``size`` in bytes, ``type``, ``redop``, ``place`` (``in``,
    ``out``), and ``root`` where it differs. Results of 0 bytes are left out: so many ranks can't
    share so few bytes.
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
        raise MeasurementError(f"{TOOL}: its file has no results, so the test did not end")
    bounds = found.get("out_of_bounds")
    if not isinstance(bounds, dict) or bounds.get("count") != 0:
        raise MeasurementError(f"{TOOL}: values out of bounds: the data was wrong")
    program = PurePosixPath(str((found.get("args") or ["?"])[0])).name
    _enough(_ranks(found), ranks)
    sides: list[_Side] = []
    if not all(isinstance(result, dict) for result in results):
        raise MeasurementError(f"{TOOL}: its file has invalid results")
    for result in results:
        # the only place in which keys of a row are numbers
        named = {key: str(result.get(key)).strip() for key in ("size", "type", "redop", "root")}
        for key, place in _PLACES.items():
            side = result.get(key)
            if not isinstance(side, dict):
                continue
            size = named["size"]
            if not size.isdigit():
                raise MeasurementError(f"{TOOL}: '{size}' is not a size")
            _right(side.get("nwrong"), size)
            algbw, busbw = (
                amount(TOOL, side.get(which, ""), f"the bandwidth of {size}")
                for which in ("alg_bw", "bus_bw")
            )
            sides.append(_Side(named, place, algbw, busbw, 0.0))
    if not sides:
        raise MeasurementError(f"{TOOL}: its file has no results")
    return _readings(program, sides)


def _ranks(found: Mapping[str, Any]) -> int | None:
    """How many ranks there were, if the file says it: its devices are the processes' first ones."""
    config = found.get("config")
    if not isinstance(config, dict):
        return None
    processes, threads, gpus = (config.get(key) for key in ("devices", "nthreads", "ngpus"))
    if not isinstance(processes, list) or not isinstance(threads, int) or not isinstance(gpus, int):
        return None
    return len(processes) * threads * gpus


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


_COLUMNS = re.compile(r"^(.*?)(#[ \t]+size[ \t]+count[ \t]+type\b.*)$", re.M)
_UNITS = re.compile(r"^#\s+\(B\)\s+\(elements\).*$", re.M)
_BOUNDS = re.compile(r"^#\s*Out of bounds values\s*:\s*(\d+)\s+(\w+)", re.M)
_AVERAGE = re.compile(r"^#\s*Avg bus bandwidth\s*:\s*(\S+)", re.M)
_STARTING = re.compile(r"^# Collective test starting: (\S+)", re.M)
_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s", re.M)
_TAG = re.compile(
    r"(?:\w{3} \w{3} +\d+ [\d:]+ \d{4})?\[[^\]\s]*\d+,\d+\](?:\[[^\]\s]*\])?<std(?:out|err)>: ?"
)
"""What Open MPI writes before a line with --tag-output (4: [1,0]<stdout>:), or --output tag."""
_PIECE = re.compile(r"(?:(?<!\S)\d+(?:\.\d+|\.?\d*e[+-]\d+)(?!\S)\s*){3}")
"""Three numbers with a fraction: a piece of a row, since no library says such a thing."""
_AVERAGE_TOLERANCE = 0.05


def parse_table(output: str, program: str, ranks: int | None = None) -> tuple[Reading, ...]:
    """The same from the table on standard output, for versions without ``-J``.

    Lines may be tagged by mpirun or srun. What is not a row, such as a line of NCCL's log, is
    passed over unless a row may have got lost in it.
    """
    text = _untagged(output)
    heads = list(_COLUMNS.finditer(text))
    units = _UNITS.search(text)
    if not heads or units is None:
        raise _failure(text, "it printed no table")
    if len(heads) > 1:
        raise MeasurementError(
            f"{TOOL}: it printed {len(heads)} tables: were its processes started separately?",
            hint=_MPI,
        )
    bounds = _BOUNDS.search(text)
    if bounds is None:
        raise _failure(text, "its output ends early")
    if bounds[1] != "0" or bounds[2] != "OK":
        raise MeasurementError(f"{TOOL}: {bounds[1]} values out of bounds: the data was wrong")
    columns = _Columns.of(heads[0][2], units[0])
    _enough(len(set(_RANK.findall(text))) or None, ranks)
    rows, foreign = [], False
    for line in text[units.end() : bounds.start()].splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0].isdigit():
            rows.append(columns.row(line))
        elif _PIECE.search(line):
            raise MeasurementError(
                f"{TOOL}: a row of its table runs into other output",
                detail=line,
                hint="keep NCCL's log apart (NCCL_DEBUG_FILE), or leave NCCL_DEBUG out",
            )
        else:
            foreign = True
    if not rows:
        raise MeasurementError(f"{TOOL}: its table is empty", detail=tail(text))
    if foreign:
        _hold_against_average(text, rows)
    starting = _STARTING.search(text)
    test = PurePosixPath(starting[1] if starting else program).name
    return _readings(test, [one for row in rows for one in row])


@dataclass(frozen=True)
class _Side:
    """One half of a row: in place, or out of place. Bandwidths in GB/s."""

    result: Mapping[str, str]
    place: str
    algbw: float
    busbw: float
    rounding: float
    """What the last digit of ``busbw`` is worth."""


@dataclass(frozen=True)
class _Columns:
    """The columns of a table: those that name a row, then those of both halves."""

    naming: tuple[str, ...]
    ends: tuple[int, ...]
    """Where the naming columns end in a line: what is blank there is missing."""
    data: tuple[str, ...]
    timestamp: bool

    @classmethod
    def of(cls, head: str, units: str) -> _Columns:
        """From the two lines of the table's head; MeasurementError for columns not known."""
        found = [(word[0], word.end()) for word in re.finditer(r"\S+", head[1:])]
        names = [name for name, _ in found]
        first = next((at for at, name in enumerate(names) if name in ("time", "cputime")), 0)
        timestamp = names[-1] == "timestamp"
        data = names[first : len(names) - timestamp]
        half = len(data) // 2
        strange = set(names[3:first]) - {"redop", "root"}
        if (
            names[:3] != ["size", "count", "type"]
            or strange
            or data[:half] != data[half:]
            or data.count("algbw") != 2
            or data.count("busbw") != 2
            or not {"#wrong", "error"} & set(data)
        ):
            raise MeasurementError(f"{TOOL}: its table has other columns", detail=head)
        speeds = sum(1 for name in data if name.endswith("bw"))
        said = [unit for unit in re.findall(r"\(([^()]+)\)", units) if "/s" in unit]
        if said != ["GB/s"] * speeds:
            raise MeasurementError(f"{TOOL}: its table has other units", detail=units)
        ends = tuple(end + 1 for _, end in found[:first])
        return cls(tuple(names[:first]), ends, tuple(data), timestamp)

    def row(self, line: str) -> tuple[_Side, _Side]:
        """The halves of a row; MeasurementError for one that is not whole, or was wrong."""
        cells = line.split()
        if self.timestamp:
            cells = cells[:-2]
        names = cells[: len(cells) - len(self.data)]
        result = self._named(line, names)
        if result is None or not all(_is_number(cell) for cell in cells[len(names) :]):
            raise MeasurementError(f"{TOOL}: a line of its table is incomplete", detail=line)
        half = len(self.data) // 2
        sides = []
        for place, start in (("out", len(names)), ("in", len(names) + half)):
            side = dict(zip(self.data[:half], cells[start : start + half], strict=True))
            size = result["size"]
            if "#wrong" in side:
                _right(side["#wrong"], size)
            elif side["error"] != "N/A":
                # before 2.13 the largest deviation, which rounding makes; bounds judge it
                amount(TOOL, side["error"], f"the deviation of {size} bytes")
            busbw = side["busbw"]
            sides.append(
                _Side(
                    result,
                    place,
                    amount(TOOL, side["algbw"], f"the bandwidth of {size}"),
                    amount(TOOL, busbw, f"the bandwidth of {size}") * TO_GB_S["GB/s"],
                    10.0 ** -len(busbw.partition(".")[2]) if "e" not in busbw else 0.0,
                )
            )
        return sides[0], sides[1]

    def _named(self, line: str, words: Sequence[str]) -> dict[str, str] | None:
        """What names a row: redop and root are blank where a collective has none."""
        there = self.naming
        if len(words) != len(there):
            there = tuple(
                name
                for name, end in zip(self.naming, self.ends, strict=True)
                if line[end - 1 : end].strip()
            )
        if len(words) != len(there) or there[:3] != ("size", "count", "type"):
            return None
        if not words[1].isdigit() or _is_number(words[2]):
            return None
        return dict(zip(there, words, strict=True))


def _is_number(word: str) -> bool:
    if word == "N/A":
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True


def _untagged(output: str) -> str:
    """Lines without what mpirun, srun and their like write in front of them.

    Whatever is in front of the table's head is the tag of the process that prints the table.
    """
    text = _TAG.sub("", output)
    head = _COLUMNS.search(text)
    if head is None or not head[1].strip():
        return text
    return "\n".join(line.removeprefix(head[1]) for line in text.splitlines())


def _hold_against_average(text: str, rows: Sequence[tuple[_Side, _Side]]) -> None:
    """MeasurementError unless the rows give the average that is said: else one got lost."""
    said = _AVERAGE.search(text)
    if said is None:
        return
    sides = [side for row in rows for side in row]
    mean = sum(side.busbw for side in sides) / len(sides)
    average = amount(TOOL, said[1], "the average bandwidth")
    slack = max(side.rounding for side in sides) + _AVERAGE_TOLERANCE * average
    if abs(mean - average) > slack:
        raise MeasurementError(
            f"{TOOL}: its average is {average:g} GB/s, and {mean:g} by its rows: one got lost",
            hint="keep NCCL's log apart (NCCL_DEBUG_FILE), or leave NCCL_DEBUG out",
        )


def _readings(test: str, sides: Sequence[_Side]) -> tuple[Reading, ...]:
    """Rows as readings; MeasurementError for those of one rank, and for a row that comes twice."""
    sides = [side for side in sides if int(side.result["size"]) > 0]
    if not sides:
        raise MeasurementError(
            f"{TOOL}: all its results are of 0 bytes",
            hint="more bytes: -b and -e; each rank gets a share of them",
        )
    if all(side.busbw == 0 and side.algbw > 0 for side in sides):
        raise _one_rank()
    roots = {side.result.get("root") for side in sides}
    found: dict[tuple[tuple[str, str], ...], Reading] = {}
    for side in sides:
        context = {
            "test": test,
            "size": side.result["size"],
            "type": side.result["type"],
            "redop": side.result.get("redop") or "none",
            "place": side.place,
        }
        if len(roots) > 1:
            context["root"] = str(side.result.get("root")).strip()
        key = tuple(sorted(context.items()))
        if key in found:
            raise MeasurementError(
                f"{TOOL}: {side.result['size']} bytes come twice in one run",
                hint="sizes are rounded to what ranks can share: larger steps (-i, -f), or a "
                "larger -b; one run for each operation",
            )
        found[key] = Reading("bandwidth", side.busbw, context)
    return tuple(found.values())


_MPI = (
    "give 'gpus' (-g); processes that mpirun starts make up one test only if nccl-tests was built "
    "with MPI=1"
)


def _enough(found: int | None, wanted: int | None) -> None:
    """MeasurementError for one rank alone, and for other ranks than were started."""
    if found == 1:
        raise _one_rank()
    if None not in (found, wanted) and found != wanted:
        raise MeasurementError(f"{TOOL}: {found} ranks made up the test, not {wanted}", hint=_MPI)


def _one_rank() -> MeasurementError:
    return MeasurementError(
        f"{TOOL}: a single rank measures nothing, because no byte crosses a link", hint=_MPI
    )


_OTHER_FAILURES = ("rror", "nvalid", "USAGE", "not found", "signal", "Killed")


def _failure(text: str, otherwise: str) -> MeasurementError:
    """What NCCL or a test that failed has said: a warning, a failure, anything else.

    Lines of NCCL's log below a warning are passed over: they speak of failures that don't matter.
    """
    lines = [line for line in text.splitlines() if not re.search(r"NCCL (INFO|TRACE)\b", line)]
    rest = "\n".join(lines)
    said = next(
        (
            found
            for marks in (
                ("NCCL WARN",),
                ("failure",),
                _OTHER_FAILURES,
            )
            if (found := complaint(rest, marks))
        ),
        None,
    )
    return MeasurementError(f"{TOOL}: {said or otherwise}", detail=tail(text))
