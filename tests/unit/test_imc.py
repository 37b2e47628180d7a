# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory controllers' counters: what perf prints, and where registers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearmetal.core.errors import MeasurementError
from nearmetal.measure import imc

DATA = Path(__file__).parent / "data"


@pytest.fixture
def said() -> str:
    """perf 6.12 in a guest of the emulated host, while its disk read 64 MiB from memory."""
    return (DATA / "perf-stat-imc.txt").read_text()


def test_counts_are_summed_by_event(said: str) -> None:
    sums = imc.parse_perf(said)
    assert set(sums) == {imc.CAS_READ, imc.CAS_WRITE, imc.FREE_READ, imc.FREE_WRITE}
    assert imc.error_pct(sums[imc.CAS_READ]) == pytest.approx(0.83, abs=0.005)
    assert sums[imc.FREE_READ] == sums[imc.CAS_READ]
    assert sums[imc.CAS_WRITE] < 1000


def test_a_pmu_that_is_missing_is_told(said: str) -> None:
    without = "".join(line for line in said.splitlines(True) if "uncore_imc_11/" not in line)
    with pytest.raises(MeasurementError, match="did not report uncore_imc_11/"):
        imc.parse_perf(without)


@pytest.mark.parametrize(
    ("old", "new"),
    [("132482,", "<not supported>,"), (",100.00,,\n", ",49.80,,\n")],
    ids=["not-supported", "multiplexed"],
)
def test_an_event_that_did_not_count_all_the_time_is_told(said: str, old: str, new: str) -> None:
    assert old in said
    with pytest.raises(MeasurementError, match="did not count uncore_imc_0/"):
        imc.parse_perf(said.replace(old, new, 1))


def test_registers_are_where_config_space_says() -> None:
    """As the emulated host has it (series icx-imc): lspci -xxx of its function."""
    config = bytes.fromhex("ffbf0100 00000000 80e01f00 80e13f00 00e36f00 80e5bf00".replace(" ", ""))
    assert imc.addresses(bytes(imc.MMIO_BASE) + config) == [
        0xDFFF880000,
        0xDFFF980000,
        0xDFFFB00000,
        0xDFFFD80000,
    ]
    with pytest.raises(MeasurementError, match="root"):
        imc.addresses(bytes(64))


def test_every_pmu_is_asked_once() -> None:
    assert len(set(imc.events(imc.CAS_READ, imc.FREE_READ))) == 12 + 4
