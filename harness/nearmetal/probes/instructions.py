# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions that the host executes for one thing a guest does, as its emulator counts them.

A plugin of the emulator (guest-images/emulator/nm-insns.c) counts them for each of the host's
CPUs, those of guests apart, and logs the counts when the probe in the guest executes a mark, a
NOP. So an interval from mark to mark holds all that one access costs outside of the guest: KVM,
QEMU, and whatever else that CPU did meanwhile. The virtual CPU is held on one CPU of the host.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import MeasurementError
from ..machines.guest import Guest
from ..machines.host import Host
from ..machines.shell import Shell

READS = 60
CLEAN_SHARE = 0.1
"""At least so many intervals of a series must be free of exits that are not the read's own."""
SAME_SHARE = 0.1
"""At least so many of these must have exactly the count that is taken for the undisturbed one."""

_BEGIN, _END = 1, 2
_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Interval:
    """What one CPU of the host did between two marks: instructions, and entries into a guest."""

    host: int
    guest: int
    entries: int


def parse(log: str) -> list[Interval]:
    """The intervals in lines of the plugin's log; those that changed the CPU are left out.

    A line is ``number cpu host guest entries``, counts since the emulator's start. Raises
    MeasurementError where begin and end do not take turns.
    """
    intervals: list[Interval] = []
    rows = [[int(word) for word in line.split()] for line in log.splitlines()]
    if any(len(row) != 5 for row in rows) or len(rows) % 2:
        raise MeasurementError(
            "the emulator's log of instructions is broken", detail="\n".join(log.splitlines()[-3:])
        )
    for begin, end in zip(rows[::2], rows[1::2], strict=True):
        if (begin[0], end[0]) != (_BEGIN, _END):
            raise MeasurementError(
                "the marks in the emulator's log of instructions do not alternate",
                detail=f"{begin}\n{end}",
            )
        if begin[1] == end[1]:
            intervals.append(Interval(*(end[i] - begin[i] for i in (2, 3, 4))))
    return intervals


def clean(intervals: Sequence[Interval], exits: int) -> list[Interval]:
    """The intervals with no exits but the ``exits`` that the read takes.

    Raises MeasurementError where a read took fewer, or nearly all took more: then reads take
    another path than the one that they stand for.
    """
    found = [one for one in intervals if one.entries == exits]
    fewer = any(one.entries < exits for one in intervals)
    if fewer or len(found) < max(1, len(intervals) * CLEAN_SHARE):
        counts = Counter(one.entries for one in intervals).most_common(4)
        raise MeasurementError(
            f"{len(found)} of {len(intervals)} reads took the {exits} exits that they should",
            detail=", ".join(f"{number} times {entries} exits" for entries, number in counts),
        )
    return found


def logged(log: Path, shell: Shell, command: str) -> tuple[str, list[Interval]]:
    """Run a command in a guest or on the host itself; what it printed, and its intervals.

    ``log`` is the plugin's; lines that were there before are left alone.
    """
    begun = log.stat().st_size
    out = shell.run(command, deadline_s=_DEADLINE_S).stdout
    with log.open("rb") as stream:
        stream.seek(begun)
        return out, parse(stream.read().decode())


def series(log: Path, shell: Shell, words: str, *, count: int = READS) -> list[Interval]:
    """Run ``nm-insns COUNT words`` in a guest or on the host itself; its intervals."""
    _, intervals = logged(log, shell, f"nm-insns {count} {words}")
    if not count / 2 <= len(intervals) <= count:
        raise MeasurementError(
            f"the emulator counted {len(intervals)} intervals of {count}",
            detail=f"nm-insns {count} {words}",
        )
    return intervals


@contextmanager
def pinned(host: Host, guest: Guest) -> Iterator[None]:
    """The guest's virtual CPUs on the host's last CPU, away from where interrupts go first.

    Without it the same read was counted with 9408 instructions on one CPU and 9628 on another.
    """
    shell = host.shell
    last = int(shell.run("nproc").stdout) - 1
    threads = [str(cpu["thread-id"]) for cpu in guest.qmp("query-cpus-fast")]

    def place(cpus: str) -> None:
        for thread in threads:
            shell.run(f"taskset -p -c {cpus} {thread}")

    place(str(last))
    try:
        yield
    finally:
        place(f"0-{last}")


def undisturbed(intervals: Sequence[Interval], exits: int) -> int:
    """The host's instructions for a read that nothing disturbed: the smallest count.

    The same way through the same code executes the same instructions, and what comes in between
    adds some: an interrupt, or a lock that another thread holds. So a median tells how busy the
    machine was, too. Raises MeasurementError where the count is a rare one.
    """
    found = Counter(one.host for one in clean(intervals, exits))
    least = min(found)
    if found[least] < found.total() * SAME_SHARE:
        raise MeasurementError(
            f"{found[least]} of {found.total()} reads took {least} instructions, the others more",
            detail=", ".join(f"{number} times {count}" for count, number in found.most_common(4)),
        )
    return least


def summary(intervals: Sequence[Interval]) -> dict[str, object]:
    """All intervals of a series in short, disturbed ones too; instructions of host and guest."""
    host = [one.host for one in intervals]
    common = Counter((one.host, one.entries) for one in intervals).most_common(5)
    return {
        "intervals": len(intervals),
        "host": {"min": min(host), "median": statistics.median(host), "max": max(host)},
        "most_common": [{"host": a, "exits": b, "intervals": n} for (a, b), n in common],
        "guest_median": statistics.median(one.guest for one in intervals),
        "by_exits": dict(sorted(Counter(one.entries for one in intervals).items())),
    }
