# SPDX-License-Identifier: GPL-2.0-or-later
"""Two reports compared: which rows belong together, and what counts as a change."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import pytest
from lib import results as made
from rich.console import Console

from nearmetal.core.errors import UsageError
from nearmetal.core.model import Measurement, Provenance, Report, RunInfo
from nearmetal.report.compare import (
    Comparison,
    compare,
    render_json,
    render_rich,
    render_text,
    summary,
)


def row(*values: float, name: str = "lspci.exits", **keys: Any) -> Measurement:
    return made.row(*values, name=name, **keys)


def speed(value: float, provenance: Provenance = "hardware") -> Measurement:
    return row(value, name="p2p.read_mib_s", provenance=provenance)


def report(*rows: Measurement, run: str = "run-1") -> Report:
    info = RunInfo(run, "2026-11-22T22:15:01Z", "2026-11-22T22:16:01Z", "testbed", "", 1, True, 0)
    return Report(info, (), rows, ())


def both(a: Measurement, b: Measurement, tolerance: float = 0.0) -> Comparison:
    return compare(report(a), report(b, run="run-2"), tolerance)


def test_rows_match_by_name_variant_series_and_context_whatever_the_order() -> None:
    a = report(row(1, path="cf8", x="1"), row(2, path="ecam", x="1"), row(3, series="s"))
    b = report(row(3, series="s"), row(2, x="1", path="ecam"), row(4, path="cf8", x="1"))
    rows = compare(a, b).rows
    assert [(each.a, each.b, each.verdict) for each in rows] == [
        (1, 4, "worse"),
        (2, 2, "same"),
        (3, 3, "same"),
    ]
    assert rows[0].ratio == 4


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "verdict"),
    [
        (row(768, 768), row(768, 768), 0, "same"),
        (row(768, 768), row(769, 769), 0, "worse"),
        (row(768, 768), row(64, 64), 0, "better"),
        (row(10, 12, 14), row(13, 15, 17), 0, "same"),
        (row(10, 12, 14), row(14.1, 15, 17), 0, "worse"),
        (row(100), row(104), 0.05, "same"),
        (row(100), row(106), 0.05, "worse"),
        (row(0), row(1), 0.05, "worse"),
        (speed(40), speed(50), 0, "better"),
        (speed(40), speed(30), 0, "worse"),
        (speed(40, "emulated"), speed(30, "emulated"), 0, "no proof"),
        (speed(40, "emulated"), speed(40, "emulated"), 0, "same"),
        (row(0.001, 0.001), row(0.004, 0.004), 0.1, "same"),
        (row(0.001, 0.001), row(0.02, 0.02), 0.1, "worse"),
        (row(1, name="of.a.newer.version"), row(2, name="of.a.newer.version"), 0, "differs"),
        (row(1), row(math.nan), 0, "differs"),
        (row(1), row(), 0, "differs"),
    ],
)
def test_a_change_is_one_beyond_the_spread_and_the_tolerance(
    a: Measurement, b: Measurement, tolerance: float, verdict: str
) -> None:
    (found,) = both(a, b, tolerance).rows
    assert found.verdict == verdict
    assert found.beyond_spread == (verdict != "same")


def test_only_what_changed_is_shown_unless_all_is_asked_for() -> None:
    found = compare(
        report(row(1, path="cf8"), row(5, path="ecam"), speed(4, "emulated")),
        report(row(1, path="cf8"), row(7, path="ecam"), speed(9, "emulated"), run="run-2"),
    )
    text = render_text(found)
    assert "ecam" in text
    assert "cf8" not in text
    assert "p2p.read_mib_s" not in text
    assert "1 worse, 1 no proof, 1 same" in text
    every = render_text(found, every=True)
    assert "cf8" in every
    assert "p2p.read_mib_s" in every
    rows = json.loads(render_json(found))["rows"]
    assert [(one["name"], one["a"], one["b"], one["verdict"]) for one in rows] == [
        ("lspci.exits", 5, 7, "worse")
    ]
    assert len(json.loads(render_json(found, every=True))["rows"]) == 3
    same = both(row(1), row(1))
    assert render_text(same).endswith("apart\n\n1 same\n")


def test_json_holds_no_number_that_is_none() -> None:
    (one,) = json.loads(render_json(both(row(1), row(math.nan))))["rows"]
    assert one["b"] is None


def test_rows_of_one_report_alone_are_shown_as_such() -> None:
    comparison = compare(report(row(1), row(5, path="cf8")), report(row(1), row(7, path="ecam")))
    assert {(each.a, each.b, each.verdict) for each in comparison.rows} == {
        (1, 1, "same"),
        (5, None, "only in a"),
        (None, 7, "only in b"),
    }
    assert len(comparison.changed) == 2
    assert summary(comparison) == "1 only in a, 1 only in b, 1 same"


def test_a_ratio_to_nothing_is_none() -> None:
    (found,) = both(row(0), row(5)).rows
    assert found.ratio is None


def test_emulated_and_hardware_are_compared_only_on_request() -> None:
    a, b = report(row(1)), report(row(1, provenance="hardware"))
    with pytest.raises(UsageError, match="emulated") as caught:
        compare(a, b)
    assert "--mix-provenance" in (caught.value.hint or "")
    assert compare(a, b, mix_provenance=True).rows[0].verdict == "same"


def test_two_rows_that_nothing_tells_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="two rows of lspci"):
        compare(report(row(1, path="cf8"), row(2, path="cf8")), report())


def test_two_units_are_refused() -> None:
    with pytest.raises(UsageError, match="in exits in one report and in us"):
        both(row(1), row(1, unit="us"))


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        both(row(1), row(1), tolerance)


def test_the_text_is_fit_for_a_mail() -> None:
    a = report(
        row(768, 768, testbed="amd", path="cf8"),
        row(812.25, name="vmexit.agent.userspace_exits_per_sample", unit="exits/sample"),
    )
    cached = [dataclasses.replace(each, values=(each.values[0] / 4,)) for each in a.measurements]
    text = render_text(compare(a, report(*cached, run="run-2"), 0.05))
    assert text.isascii()
    assert all(len(line) <= 78 and line == line.rstrip() for line in text.splitlines())
    for words in ("a: run-1", "b: run-2", "cf8 amd", "768", "192", "0.250", "better", "5 % apart"):
        assert words in text
    assert text.endswith("2 better\n")


def test_the_terminal_shows_every_row_and_the_counts() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_rich(both(row(768), row(64))))
    text = console.export_text()
    for words in ("lspci.exits", "768", "64", "0.083", "better", "1 better"):
        assert words in text


def test_nothing_measured_is_said() -> None:
    assert summary(compare(report(), report())) == "nothing to compare"
