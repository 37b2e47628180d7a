# SPDX-License-Identifier: GPL-2.0-or-later
"""The history of runs. ``data/night.json`` is the report of a run on both emulated hosts, trimmed
to the figures and checks of two series; other nights are made from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nearmetal.cli.main import main
from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.nights import changes
from nearmetal.nights.changes import judge
from nearmetal.nights.history import Key, Night, Value, of_report, opened
from nearmetal.report import document

RECORDED = Path(__file__).parent / "data" / "night.json"
EXITS = "lspci.userspace_exits"
SWITCHES = "vmexit.agent.pmu_switches_per_sample"
AGENT = "vmexit.agent.exits_per_sample"


@functools.cache
def recorded() -> Night:
    return of_report(document.read(RECORDED), revision="c0ffee")


def night(day: int, **other: object) -> Night:
    """The recorded night, on a day of December."""
    found = recorded()
    changed = {"id": f"202612{day:02}-020000-1", "started": f"2026-12-{day:02}T02:00:00Z", **other}
    return dataclasses.replace(found, **changed)  # type: ignore[arg-type]


def on(one: Night, name: str, series: str) -> list[Key]:
    """The keys of a figure of a series."""
    found = [key for key in one.figures if key.name == name and key.series == series]
    assert found
    return found


def moved(one: Night, keys: list[Key], by: Callable[[float], float]) -> Night:
    """The night with other values for some keys."""
    figures = dict(one.figures)
    for key in keys:
        was = figures[key]
        assert was.median is not None
        figures[key] = Value(was.unit, was.provenance, tuple(map(by, was.values)), by(was.median))
    return dataclasses.replace(one, figures=figures)


def test_a_night_like_those_before_is_green() -> None:
    verdict = judge(night(3), [night(1), night(2)])
    assert verdict.good
    assert not verdict.changes
    assert verdict.line() == (
        "nearmetal 2026-12-03 02:00 on testbed: GREEN, "
        f"{len([1 for one in night(1).checks.values() if one.status == 'pass'])} of"
        f" {len(night(1).checks)} checks passed, 2 skipped"
    )


def test_one_more_exit_to_qemu_is_red_though_every_check_passes() -> None:
    keys = on(night(3), EXITS, "pci-config-cache")[:1]
    verdict = judge(moved(night(3), keys, lambda was: was + 1), [night(1), night(2)])
    assert not verdict.good
    (change,) = verdict.red
    assert change.kind == "worse"
    assert change.text.startswith(f"{EXITS}[on, pci-config-cache, ")
    assert change.text.endswith(", +1")
    assert "RED" in verdict.line()
    assert EXITS in verdict.line()


def test_one_more_switch_of_the_pmu_is_red() -> None:
    keys = on(night(3), SWITCHES, "pmu-passthrough")
    verdict = judge(moved(night(3), keys, lambda was: was + 1), [night(0), night(1), night(2)])
    assert {one.kind for one in verdict.red} == {"worse"}
    assert {one.key for one in verdict.red} == set(keys)
    assert SWITCHES in verdict.line()


def test_fewer_exits_are_told_and_are_no_alarm() -> None:
    keys = on(night(3), EXITS, "pci-config-cache")[:1]
    verdict = judge(moved(night(3), keys, lambda was: was - 1), [night(1), night(2)])
    assert [one.kind for one in verdict.changes] == ["better"]
    assert verdict.good


def test_a_ratio_within_the_spread_of_good_nights_is_no_change() -> None:
    keys = on(night(1), AGENT, "pci-config-cache")[:1]
    factors = {1: 1.01, 5: 1.05, 8: 1.08}
    past = [moved(night(day), keys, factor.__mul__) for day, factor in factors.items()]
    assert judge(moved(night(10), keys, lambda was: was * 1.06), past).good
    high = judge(moved(night(10), keys, lambda was: was * 1.3), past)
    assert [one.kind for one in high.red] == ["worse"]
    assert ".." in high.red[0].text


def test_times_of_an_emulated_machine_are_not_judged() -> None:
    keys = [key for key in night(1).figures if key.name == "lspci.pass_us"]
    assert keys
    assert judge(moved(night(3), keys, lambda was: was * 3), [night(1)]).good


def test_the_first_bad_run_is_named_with_what_changed() -> None:
    keys = on(night(1), EXITS, "pci-config-cache")[:1]
    builds = tuple(
        dataclasses.replace(one, series=(*one.series, "newcomer"))
        if one.role == "host-qemu" and one.series
        else dataclasses.replace(one, source="linux 7.3.5")
        if one.role == "host-kernel"
        else one
        for one in night(3).builds
    )

    def bad(day: int) -> Night:
        one = night(day, revision="bad" + str(day), builds=builds)
        return moved(one, keys, lambda was: was + 1)

    verdict = judge(bad(5), [night(1), night(2), bad(3), bad(4)])
    since = verdict.since[verdict.red[0].what]
    assert since.run == bad(3).id
    assert since.before == night(2).id
    assert "commits c0ffee .. bad3" in since.between
    assert "series newcomer added to the host qemu" in since.between
    assert any(one.startswith("base of the host kernel: ") for one in since.between)
    assert any(one.endswith("-> linux 7.3.5") for one in since.between)


def test_a_bad_night_is_not_what_later_ones_are_held_to() -> None:
    keys = on(night(1), EXITS, "pci-config-cache")[:1]
    bad = [moved(night(day), keys, lambda was: was + 1) for day in (2, 3, 4)]
    assert not judge(bad[2], [night(1), *bad[:2]]).good
    assert judge(night(5), [night(1), *bad]).good


def test_accepted_figures_are_the_new_ones() -> None:
    keys = on(night(1), EXITS, "pci-config-cache")[:1]
    new = [moved(night(day), keys, lambda was: was + 1) for day in (2, 3)]
    accepted = dataclasses.replace(new[0], accepted=True)
    assert judge(new[1], [night(1), accepted]).good
    assert judge(night(4), [night(1), accepted]).changes[0].kind == "better"


def test_a_check_that_fails_is_red_and_the_first_word() -> None:
    name = "pci-config-cache.cacheable-reads-stay-in-kernel"
    checks = dict(night(3).checks)
    checks[name] = dataclasses.replace(checks[name], status="fail", observed="9 exits")
    verdict = judge(night(3, checks=checks, verdict="fail"), [night(1), night(2)])
    assert verdict.red[0].text == f"{name} failed: 9 exits"
    assert verdict.since[name].before == night(2).id


def test_what_is_no_longer_measured_or_checked_is_red() -> None:
    figures, checks = dict(night(3).figures), dict(night(3).checks)
    key = on(night(3), EXITS, "pci-config-cache")[0]
    del figures[key]
    del checks["pci-config-cache.cacheable-reads-stay-in-kernel"]
    verdict = judge(night(3, figures=figures, checks=checks), [night(1)])
    assert [one.kind for one in verdict.red] == ["gone", "gone"]
    # a smaller run says nothing of what it was not asked for
    other = night(3, figures=figures, checks=checks, command="nearmetal run --only vmexit")
    assert judge(other, [night(1)]).good


def test_nights_of_another_host_say_nothing() -> None:
    keys = on(night(1), EXITS, "pci-config-cache")[:1]
    other = moved(night(1, host="server1"), keys, lambda was: was + 5)
    assert judge(night(2), [other]).base is None


def test_the_first_night_is_held_to_its_checks_alone() -> None:
    assert judge(night(1), []).good
    assert not judge(night(1, verdict="error"), []).good


# --- the file ---------------------------------------------------------------------------------


def test_what_is_read_is_what_was_added(tmp_path: Path) -> None:
    with opened(tmp_path / "h.sqlite") as history:
        assert history.add(night(2))
        assert history.add(night(1))
        assert not history.add(night(1, verdict="fail"))
    with opened(tmp_path / "h.sqlite") as history:
        assert history.nights() == [night(1), night(2)]
        assert history.night("latest") == night(2)


def test_an_addition_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    twice = (*night(1).builds, "no build")
    with opened(tmp_path / "h.sqlite") as history:
        with pytest.raises(AttributeError):
            history.add(night(1, builds=twice))
        assert history.ids() == []


def test_two_at_once_both_come_in(tmp_path: Path) -> None:
    def one(day: int) -> None:
        with opened(tmp_path / "h.sqlite") as history:
            history.add(night(day))

    threads = [threading.Thread(target=one, args=(day,)) for day in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened(tmp_path / "h.sqlite") as history:
        assert len(history.ids()) == 8


def test_a_file_that_is_no_history_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "h.sqlite").write_text("no database, but long enough to be read as one\n" * 50)
    with (
        pytest.raises(EnvironmentBroken, match="cannot be used"),
        opened(tmp_path / "h.sqlite"),
    ):
        pass


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "h.sqlite") as base:
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(EnvironmentBroken, match="format 99"), opened(tmp_path / "h.sqlite"):
        pass


def test_an_unknown_run_gets_the_nearest(tmp_path: Path) -> None:
    with opened(tmp_path / "h.sqlite") as history:
        history.add(night(1))
        with pytest.raises(UsageError) as raised:
            history.night("20261201-020000-2")
    assert "20261201-020000-1" in (raised.value.hint or "")


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two good nights and one with an exit more, as folders of runs."""
    for day, more in ((1, 0), (2, 0), (3, 1)):
        text = json.loads(RECORDED.read_text())
        text["run"] |= {"id": f"n{day}", "started": f"2026-12-0{day}T02:00:00Z"}
        for row in text["measurements"]:
            if row["name"] == EXITS and row["series"] == "pci-config-cache":
                row["values"] = [one + more for one in row["values"]]
                row["median"] += more
        folder = tmp_path / f"n{day}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(text))
    return tmp_path


def test_the_commands(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--results-dir", str(results)]
    assert main(["history", "add", "n1", "n2", "n3", "--revision", "abc", *at]) == 0
    assert main(["history", "list", *at]) == 0
    assert capsys.readouterr().out.count("good") == 2
    assert main(["history", "show", "n2", *at]) == 0
    capsys.readouterr()
    assert main(["history", "show", *at]) == 1
    said = capsys.readouterr().out
    assert "first seen in n3" in said
    assert "changed since n2: nothing that is recorded" in said
    assert main(["history", "show", "--line", *at]) == 1
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["history", "show", "--json", *at]) == 1
    assert json.loads(capsys.readouterr().out)["base"] == "n2"
    assert main(["history", "trend", EXITS, "--variant", "on", *at]) == 0
    assert "n3" in capsys.readouterr().out
    assert main(["history", "trend", "lspci.userspace_exit", *at]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["history", "accept", "n3", *at]) == 0
    assert main(["history", "show", *at]) == 0


def test_margins_are_what_the_words_say() -> None:
    assert changes.BASELINE == 7
    many = [night(day) for day in range(1, 12)]
    assert len(changes.good_nights(many)) == 7
