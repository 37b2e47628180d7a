# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulator's log of instructions, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lib import results as made

from nearmetal.core.errors import MeasurementError
from nearmetal.core.model import Measurement, Variant
from nearmetal.measure.lspci.instructions import compared
from nearmetal.probes.instructions import Interval, clean, parse, summary, undisturbed

LOG = (Path(__file__).parent / "data" / "instructions" / "cf8-vanilla.log").read_text()
"""Forty reads of a config dword in vanilla, as the plugin logged them under load."""


def test_recorded_reads() -> None:
    intervals = parse(LOG)
    assert len(intervals) == 40
    assert 12 <= len(clean(intervals, 2)) < 40
    assert undisturbed(intervals, 2) == 9618
    assert {one.guest for one in intervals if one.host == 9618} == {1027}
    assert all(one.host > 9618 for one in intervals if one.entries > 2)


def test_disturbed_reads_are_told() -> None:
    told = summary(parse(LOG))
    assert told["intervals"] == 40
    assert told["guest_median"] == 1027
    by_exits = told["by_exits"]
    assert isinstance(by_exits, dict)
    assert sum(by_exits.values()) == 40


def test_one_read_with_fewer_exits_is_refused() -> None:
    reads = [Interval(100, 0, 2)] * 20
    assert clean(reads, 2) == reads
    with pytest.raises(MeasurementError, match="20 of 21 reads"):
        clean([*reads, Interval(90, 0, 1)], 2)


@pytest.mark.parametrize("exits", [0, 1])
def test_reads_that_take_another_path_are_refused(exits: int) -> None:
    with pytest.raises(MeasurementError, match=f"0 of 40 reads took the {exits} exits"):
        clean(parse(LOG), exits)


def test_a_count_that_hardly_any_read_took_is_refused() -> None:
    reads = [Interval(100 + number, 0, 2) for number in range(11)]
    with pytest.raises(MeasurementError, match="1 of 11 reads took 100 instructions"):
        undisturbed(reads, 2)
    assert undisturbed([*reads, Interval(100, 0, 2)], 2) == 100


def test_nothing_counted_is_refused() -> None:
    assert parse("") == []
    with pytest.raises(MeasurementError):
        clean([], 2)


def test_an_interval_that_changed_the_cpu_is_left_out() -> None:
    assert parse("1 0 100 7 1\n2 1 90 5 1\n1 1 95 5 1\n2 1 105 6 3\n") == [Interval(10, 1, 2)]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("2 1 100 7 1\n1 1 110 7 1\n", "do not alternate"),
        ("1 1 100 7 1\n1 1 110 7 1\n", "do not alternate"),
        ("1 1 100 7 1\n", "broken"),
        ("1 1 100 7 1\n2 1 110 7\n", "broken"),
    ],
)
def test_a_broken_log_is_refused(log: str, said: str) -> None:
    with pytest.raises(MeasurementError, match=said):
        parse(log)


def row(variant: Variant, path: str, *values: float, series: str | None = None) -> Measurement:
    name = "lspci.dword_instructions"
    return made.row(*values, name=name, variant=variant, series=series, path=path, testbed="amd")


def test_ratios_are_to_vanilla_s_row_of_the_same_context() -> None:
    rows = [
        row("vanilla", "cf8", 9000, 9000, 9001),
        row("vanilla", "ecam", 700),
        row("off", "cf8", 9000),
        row("on", "cf8", 3000, series="pci-config-cache"),
        row("on", "other", 3000, series="pci-config-cache"),
    ]
    found = compared(rows)
    assert [(one.variant, one.values) for one in found] == [("off", (1.0,)), ("on", (3.0,))]
    assert all(one.derived and one.unit == "times" for one in found)
    assert found[1].series == "pci-config-cache"
    assert found[1].where == {"path": "cf8", "testbed": "amd"}
    assert compared(rows[2:]) == []
