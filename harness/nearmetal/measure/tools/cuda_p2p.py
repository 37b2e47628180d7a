# SPDX-License-Identifier: GPL-2.0-or-later
"""p2pBandwidthLatencyTest of NVIDIA/cuda-samples: matrices as text on standard output.

It says first which GPU can access which. A pair that cannot is measured all the same, by way of
the host's memory, in the matrices named ``P2P=Enabled`` too: such cells are no peer-to-peer, and
``access`` tells them apart. The diagonal is a copy within one GPU and is left out.
"""

from __future__ import annotations

import re

from ...core.errors import MeasurementError
from .reading import TO_GB_S, TO_US, Reading, amount, complaint, tail

TOOL = "p2pBandwidthLatencyTest"

_ACCESS = re.compile(r"^Device=(\d+) (CAN|CANNOT) Access Peer Device=(\d+)\s*$", re.M)
_TITLE = re.compile(
    r"^(?:(Unidirectional|Bidirectional) )?P2P=(Enabled|Disabled) (Bandwidth|Latency)"
    r"(?: \((P2P Writes|P2P Reads)\))? Matrix \((\S+)\)\s*$"
)
_COLUMNS = re.compile(r"^\s*(D\\D|GPU|CPU)((?:\s+\d+)+)\s*$")
_ROW = re.compile(r"^\s*(\d+)((?:\s+[\d.naif-]+)+)\s*$")
_NEEDED = ("unidirectional-write", "bidirectional", "latency-write")


def parse(output: str) -> tuple[Reading, ...]:
    """Bandwidth and latency of each pair of two GPUs.

    Context: ``test`` (``unidirectional-write``, ``unidirectional-read``, ``bidirectional``,
    ``latency-write``, ``latency-read``), ``p2p`` (``enabled`` or ``disabled``), ``access``
    (``peer``, or ``host`` where the bytes went by way of the host's memory), ``row``, ``column``.
    The latencies are those that the GPU measured, a bidirectional bandwidth is the sum of both
    directions. Where no GPU can access another, as in a VM without peer-to-peer, only the matrices
    named ``P2P=Disabled`` are read: those named ``P2P=Enabled`` are the same once more.
    """
    if broke := complaint(output, ("Cuda failure", "CUDA error")):
        raise MeasurementError(f"{TOOL}: {broke}", detail=tail(output))
    access = {(int(a), int(b)): can == "CAN" for a, can, b in _ACCESS.findall(output)}
    if not access:
        raise MeasurementError(
            f"{TOOL}: it found no two GPUs", detail=tail(output), hint="see 'nvidia-smi -L'"
        )
    gpus = max(max(pair) for pair in access) + 1
    readings: list[Reading] = []
    tests: set[tuple[str, str]] = set()
    lines = iter(output.splitlines())
    for line in lines:
        title = _TITLE.match(line)
        if title is None:
            continue
        direction, p2p, quantity, method, unit = title.groups()
        kind = "read" if method == "P2P Reads" else "write"
        if quantity == "Bandwidth":
            test = "bidirectional" if direction == "Bidirectional" else f"unidirectional-{kind}"
            factor = TO_GB_S.get(unit)
        else:
            test, factor = f"latency-{kind}", TO_US.get(unit)
        if factor is None:
            raise MeasurementError(f"{TOOL}: '{unit}' is not a unit of {quantity.lower()}")
        columns = _COLUMNS.match(next(lines, ""))
        rows = [_ROW.match(next(lines, "")) for _ in range(gpus)]
        cells = [row[2].split() for row in rows if row and columns]
        if len(cells) != gpus or any(len(row) != gpus for row in cells):
            raise MeasurementError(
                f"{TOOL}: the matrix '{line.strip()}' is incomplete", detail=tail(output)
            )
        tests.add((test, p2p))
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                if i == j or (p2p == "Enabled" and not any(access.values())):
                    continue
                peer = p2p == "Enabled" and access.get((i, j), False)
                readings.append(
                    Reading(
                        "bandwidth" if quantity == "Bandwidth" else "latency",
                        amount(TOOL, cell, f"{test}, row {i}, column {j}") * factor,
                        {
                            "test": test,
                            "p2p": p2p.lower(),
                            "access": "peer" if peer else "host",
                            "row": str(i),
                            "column": str(j),
                        },
                    )
                )
    lacks = [test for test in _NEEDED if (test, "Enabled") not in tests]
    if lacks:
        raise MeasurementError(f"{TOOL}: its output ends before {lacks[0]}", detail=tail(output))
    return tuple(readings)
