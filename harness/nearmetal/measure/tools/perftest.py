# SPDX-License-Identifier: GPL-2.0-or-later
"""perftest's ib_write_bw, ib_read_bw and their like (linux-rdma/perftest).

The table on standard output is what is read: its head has the unit, and it has a line for each
size. The file of ``--out_json`` has no unit, and is written anew for every size, so with ``-a`` it
holds the last one only; the server's table has that one only, too. In 4.5 keys and texts lack their
quotes, so that it is no JSON at all. Where there is one, it has to agree with the table's end.

Recorded from runs of perftest 4.5 (Debian 12) and 25.01 (Debian 13) between two ends of a
software RoCE device: tests/unit/data/tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ...core.errors import MeasurementError
from .reading import TO_GB_S, Reading, amount, complaint, tail

TOOL = "perftest"

_HEAD = re.compile(r"#bytes\s+#iterations\s+BW peak\[(\S+)\]\s+BW average\[(\S+)\]")
_ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+(\S+)\s+(\S+)\s+(\S+)")
_TITLE = re.compile(r"^\s+(\S.*) BW Test\s*$", re.M)
_ORDER = re.compile(r"PCIe relax order\s*:\s*(\w+)")
_ERRORS = (
    "Unable to",
    "Couldn't",
    "couldn't",
    "unrecognized option",
    "Unsupported memory type",
    "Failed",
    "failed",
    "Invalid",
    "Did not detect devices",
)
_MENDS: Mapping[str, str] = {
    "unrecognized option": "that perftest lacks the option; for CUDA build it with CUDA_H_PATH",
    "Unsupported memory type": "that perftest was built without CUDA; build it with CUDA_H_PATH",
    "No such device ID": "'nvidia-smi -L' lists the GPUs that there are",
    "Couldn't connect": "is the server's address right, and does a firewall let its port through?",
    "Did not detect devices": "no RDMA device: is its driver loaded (ibv_devices)?",
    "Unable to find the Infiniband": "'ibv_devices' lists the names of the devices that there are",
}


def parse(output: str, document: str | None = None) -> tuple[Reading, ...]:
    """The average bandwidth of each size, from a client's standard output.

    ``document`` is the text of its ``--out_json`` file, if it wrote one. Context: ``test`` (as
    ``RDMA_Write``), ``size`` in bytes, ``tool_relaxed_ordering`` (``on``, ``off``: what perftest
    asked for when it registered its memory; ``unknown`` where it doesn't say). Of a bidirectional
    test (``RDMA_Write_Bidirectional``) a figure is the sum of both directions.
    """
    head = _HEAD.search(output)
    title = _TITLE.search(output)
    if head is None or title is None:
        raise failure(output, "it printed no table of results")
    factor = TO_GB_S.get(head[2])
    if factor is None or head[1] != head[2]:
        raise MeasurementError(
            f"{TOOL}: '{head[2]}' is not a known unit", hint=f"known: {', '.join(TO_GB_S)}"
        )
    order = _ORDER.search(output)
    context = {
        "test": "_".join(title[1].split()),
        "tool_relaxed_ordering": order[1].lower() if order else "unknown",
    }
    rows = [_ROW.match(line) for line in output[head.end() :].splitlines()]
    found = [row for row in rows if row]
    if not found:
        raise failure(output, "its table of results is empty")
    readings = [
        Reading(
            "bandwidth",
            amount(TOOL, row[4], f"the average of {row[1]} bytes") * factor,
            {**context, "size": row[1]},
        )
        for row in found
    ]
    for row, reading in zip(found, readings, strict=True):
        _hold_against_rate(row[1], reading.value, _digit(row[4]) * factor, row[5])
    if document is not None:
        last = results(document)
        if (last["MsgSize"], last["BW_average"]) != (found[-1][1], found[-1][4]):
            raise MeasurementError(
                f"{TOOL}: its file says {last['BW_average']} for {last['MsgSize']} bytes,"
                f" and its table {found[-1][4]} for {found[-1][1]}",
                hint="the file may be of another run",
            )
    return tuple(readings)


def _digit(text: str) -> float:
    """What the last digit of a decimal number is worth."""
    return float(10 ** -len(text.partition(".")[2]))


def _hold_against_rate(size: str, value: float, rounding: float, rate: str) -> None:
    """MeasurementError unless size times rate is the bandwidth: so the unit is what it seems.

    ``value`` and what its last digit is worth are in GB/s, ``rate`` in millions a second.
    """
    per_s = amount(TOOL, rate, f"the rate of {size} bytes") * 1e6
    expected = int(size) * per_s / 1e9
    slack = rounding + int(size) * _digit(rate) * 1e6 / 1e9
    if value == 0 and per_s == 0:
        raise MeasurementError(f"{TOOL}: nothing was transferred with {size} bytes")
    if abs(value - expected) > slack:
        raise MeasurementError(
            f"{TOOL}: {size} bytes: its bandwidth is {value:g} GB/s, and {expected:g} by its rate",
            hint="its unit is not what its table says",
        )


_LINE = re.compile(r'^\s*"?([A-Za-z][^":{}]*?)"?\s*:\s*"?([^",{}]*)"?,?\s*$')


def results(document: str) -> dict[str, str]:
    """What a file of ``--out_json`` has of results and of the test, as texts.

    Its lines are read one by one, since only newer perftests write JSON.
    """
    if not document.strip():
        raise MeasurementError(f"{TOOL}: the file of --out_json is empty")
    if document.count("{") != document.count("}") or not document.rstrip().endswith("}"):
        raise MeasurementError(f"{TOOL}: the file of --out_json ends early", detail=tail(document))
    lines = (_LINE.match(line) for line in document.splitlines())
    found = {line[1].strip(): line[2].strip() for line in lines if line}
    lacks = [key for key in ("MsgSize", "BW_average") if key not in found]
    if lacks:
        raise MeasurementError(
            f"{TOOL}: the file of --out_json has no {lacks[0]}",
            detail=json.dumps(found),
            hint="a test of bandwidth is needed, without --output",
        )
    return found


_NO_MR = ("allocate MR", "create MR", "create mr", "reg MR", "reg_mr", "reg_dmabuf_mr")
_GPU = ("CUDA", "cuMem", "GPU buffer", "ROCm", "HIP", "hipMalloc")
_DMABUF = ("DMA-BUF", "DMABUF", "dmabuf", "cuMemGetHandleForAddressRange")


def _memory_region(output: str) -> str:
    """Why memory may not have been registered with the NIC, and what to do."""
    if any(word in output for word in _DMABUF):
        return (
            "the GPU's memory by dma-buf takes NVIDIA's open kernel modules, and a driver of the "
            "NIC that has it (Linux 5.12 or newer); without 'dmabuf' it takes nvidia-peermem"
        )
    if any(word in output for word in _GPU):
        return (
            "the NIC cannot reach the GPU's memory: 'modprobe nvidia-peermem' where the GPU is, or "
            "dmabuf: true"
        )
    return "may so much memory be locked ('ulimit -l unlimited')?"


def failure(output: str, otherwise: str, place: str = "") -> MeasurementError:
    """What a perftest that failed has said, as an error with the mend; ``place`` is its end."""
    said = complaint(output, _ERRORS)
    hint = next((mend for mark, mend in _MENDS.items() if mark in output), None)
    if any(mark in output for mark in _NO_MR):
        hint = _memory_region(output)
    where = f"{TOOL} on {place}" if place else TOOL
    return MeasurementError(f"{where}: {said or otherwise}", detail=tail(output), hint=hint)
