# SPDX-License-Identifier: GPL-2.0-or-later
"""The report on disk: whole files only, the agreed format, a page that stands by itself."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from lib import results as made
from rich.console import Console

from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.core.model import (
    Build,
    CheckResult,
    Feature,
    Headline,
    Measurement,
    Report,
    RunInfo,
    Variant,
)
from nearmetal.core.text import number
from nearmetal.report.cards import cards, short
from nearmetal.report.document import find_logs, publish, read, write, write_atomically
from nearmetal.report.junit import junit
from nearmetal.report.markdown import render_headlines, update_readme
from nearmetal.report.page import render_html
from nearmetal.report.plot import draw
from nearmetal.report.tables import (
    render_readme_table,
    render_terminal,
    verdict,
)

RUN = RunInfo(
    id="20261122T221501-a1b2",
    started="2026-11-22T22:15:01Z",
    finished="2026-11-22T22:21:13Z",
    host="testbed",
    command="nearmetal run --variant vanilla",
    seconds=372.4,
    cold=False,
    boot_retries=1,
)
PANIC = "\x1b[31mKernel panic\x1b[0m - not syncing: <bad> & \x00worse"
VARIANTS: tuple[tuple[Variant, str | None], ...] = (
    ("vanilla", None), ("off", None), ("on", "pci-config-cache")
)  # fmt: skip
REPORT = Report(
    run=RUN,
    builds=(
        Build("host-kernel", "vanilla", "linux 7.3.4", "ab" * 32),
        Build("emulator", "vanilla", "qemu 10.0.13", "cd" * 32, ("tcg-core-pmu",), "amd"),
    ),
    measurements=(
        made.row(768, 768, name="lspci.exits", testbed="amd", path="cf8"),
        dataclasses.replace(
            made.row(
                64, name="lspci.userspace_exits", variant="on", series="pci-config-cache",
                testbed="amd", path="cf8",
            ),
            derived=True,
        ),
        *(
            made.row(
                value, value, name="lspci.userspace_exits", variant=variant, series=series,
                testbed=testbed, path="cf8", pass_="second",
            )
            for testbed, values in (("amd", (1664, 1664, 565)), ("intel", (288, 288, 11)))
            for (variant, series), value in zip(VARIANTS, values, strict=True)
        ),
        made.row(40.5, 41.25, 44.0, name="p2p.read_mib_s", testbed="amd", setup="iommu"),
    ),
    checks=(
        CheckResult("lspci.good", "pass", "median x = 1", "1", "because"),
        CheckResult("p2p.data-intact", "fail", "maximum y = 5", "0 bytes differ", "`y` is false."),
        CheckResult("vmexit.lost", "error", "", "some", "not measured: panic"),
        CheckResult("own", "skip", "", "some", "not on this host"),
        CheckResult("measured:vmexit:vanilla", "error", "", "x", f"the guest died\n{PANIC}"),
    ),
    series=(
        Feature(
            "pci-config-cache",
            "Serves reads.",
            (Headline("lspci.userspace_exits", "exits to QEMU", {"pass": "second"}),),
            ("lspci.good", "off.not-judged-here"),
        ),
        Feature("pmu-passthrough", "Of which this run has nothing."),
    ),
)  # fmt: skip


def with_checks(*checks: CheckResult) -> Report:
    return dataclasses.replace(REPORT, checks=checks)


# --- report.json ------------------------------------------------------------------------------


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    write(REPORT, tmp_path)
    assert read(tmp_path) == REPORT
    assert read(tmp_path / "report.json") == REPORT
    cold = dataclasses.replace(REPORT, run=dataclasses.replace(RUN, cold=True))
    write(cold, tmp_path)
    assert read(tmp_path) == cold


def test_the_format_is_the_designs(tmp_path: Path) -> None:
    write(REPORT, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text())
    assert list(document) == ["schema", "run", "builds", "measurements", "checks", "series"]
    assert document["schema"] == 1
    assert document["run"]["warm_s"] == 372.4
    assert "cold_s" not in document["run"]
    assert document["measurements"][-1]["median"] == 41.25
    assert document["measurements"][1]["series"] == "pci-config-cache"
    assert document["measurements"][0]["series"] is None
    assert document["builds"][1]["series"] == ["tcg-core-pmu"]
    assert document["checks"][4]["reason"].endswith(PANIC)


def test_what_json_cannot_hold_becomes_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    row = made.row(math.inf, 1.0, name="lspci.exits")
    empty = made.row(name="lspci.pass_us")
    write(dataclasses.replace(REPORT, measurements=(row, empty)), tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert not re.search("NaN|Infinity", text)
    found = read(tmp_path).measurements
    assert math.isnan(found[0].values[0])
    assert found[0].values[1] == 1.0
    assert found[1].values == ()


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda d: d.pop("run"), "the document"),
        (lambda d: d["run"].pop("warm_s"), "run"),
        (lambda d: d["run"].update(cold_s=1.0), "run"),
        (lambda d: d["measurements"][0].update(provenance="guessed"), "measurements[0].provenance"),
        (lambda d: d["checks"][0].update(status="passed"), "checks[0].status"),
        (lambda d: d["measurements"][0].update(values="768"), "measurements[0].values"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.update(schema=0), "schema"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(tmp_path: Path, spoil, where: str) -> None:  # type: ignore[no-untyped-def]
    write(REPORT, tmp_path)
    path = tmp_path / "report.json"
    document = json.loads(path.read_text())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    assert where in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_newer_format_is_told_apart_from_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 2}')
    with pytest.raises(UsageError, match="format 2"):
        read(tmp_path)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no report"):
        read(tmp_path)
    (tmp_path / "report.json").write_bytes(b"{\xff")
    with pytest.raises(UsageError, match="not JSON"):
        read(tmp_path)


def test_a_report_that_breaks_the_schema_is_not_written(tmp_path: Path) -> None:
    broken = dataclasses.replace(REPORT, run=dataclasses.replace(RUN, started="yesterday"))
    with pytest.raises(ValueError, match=r"run\.started"):
        write(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- atomic writes and results/latest -----------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(EnvironmentBroken, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.hint
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_a_file_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    path, reader = tmp_path / "report.json", tmp_path / "reader"
    write_atomically(path, "old")
    reader.hardlink_to(path)
    write_atomically(path, "new")
    assert (path.read_text(), reader.read_text()) == ("new", "old")


def test_an_interrupted_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "report.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentBroken):
        write_atomically(tmp_path / "file" / "report.json", "x")


def test_latest_points_to_the_newest_run_by_a_relative_link(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        link = publish(tmp_path, run)
        assert link.readlink() == Path(run)
        assert link.resolve() == tmp_path / run
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_latest_survives_a_run_that_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / "two").mkdir()
    assert publish(tmp_path, "two").resolve() == tmp_path / "two"


def test_latest_is_not_made_for_no_run_nor_over_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run 'none'"):
        publish(tmp_path, "none")
    (tmp_path / "latest").mkdir()
    (tmp_path / "one").mkdir()
    with pytest.raises(UsageError):
        publish(tmp_path, "latest")
    with pytest.raises(EnvironmentBroken, match="not a link"):
        publish(tmp_path, "one")


# --- junit.xml ----------------------------------------------------------------------------------


def suite_of(report: Report) -> ElementTree.Element:
    root = ElementTree.fromstring(junit(report))
    assert root.tag == "testsuites"
    assert root.attrib == {}
    (suite,) = root
    return suite


def test_junit_has_one_case_a_check_with_its_verdict() -> None:
    suite = suite_of(REPORT)
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        "lspci.good": [],
        "p2p.data-intact": ["failure"],
        "vmexit.lost": ["error"],
        "own": ["skipped"],
        "measured:vmexit:vanilla": ["error"],
    }
    assert {name: case.get("classname") for name, case in cases.items()} == {
        "lspci.good": "nearmetal.lspci",
        "p2p.data-intact": "nearmetal.p2p",
        "vmexit.lost": "nearmetal.vmexit",
        "own": "nearmetal.checks",
        "measured:vmexit:vanilla": "nearmetal.vmexit",
    }
    counts = [suite.get(key) for key in ("tests", "failures", "errors", "skipped")]
    assert counts == ["5", "1", "2", "1"]
    failure = cases["p2p.data-intact"][0]
    assert failure.get("message") == "`y` is false."
    assert "observed: maximum y = 5" in (failure.text or "")


def test_junit_obeys_the_schema_that_is_strictest() -> None:
    """Ant's: the order of elements, what must be there, and no more."""
    suite = suite_of(REPORT)
    order = [child.tag for child in suite]
    assert order == ["properties", *["testcase"] * 5, "system-out", "system-err"]
    needed = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors"}
    assert set(suite.attrib) == needed | {"time", "skipped"}
    assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}", suite.get("timestamp", ""))
    assert float(suite.get("time", "")) == pytest.approx(372.4)
    for case in suite.findall("testcase"):
        assert set(case.attrib) == {"name", "classname", "time"}
        for child in case:
            extra = set() if child.tag == "skipped" else {"type"}
            assert set(child.attrib) == {"message"} | extra


def test_a_console_with_escapes_and_zeros_stays_valid_xml() -> None:
    text = ElementTree.tostring(suite_of(REPORT), encoding="unicode", method="text")
    assert "Kernel panic - not syncing: <bad> & worse" in text
    assert not set(text) & {"\x1b", "\x00"}


# --- report.html --------------------------------------------------------------------------------


class Page(HTMLParser):
    """What of a page matters here: its tags in order, its ids, its references, its text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.unfolded = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href", "srcset", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if "details" not in self.open:
            self.unfolded += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(REPORT, [Path("consoles/guest 1.log"), Path("host.log")])


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(not re.match(r"(?:[a-z]+:)?//", target) for target in page.references)
    assert "@import" not in html
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    inner = [target[1:] for target in page.references if target.startswith("#")]
    inner += re.findall(r"url\(#([^)]+)\)", html)
    assert inner
    assert set(inner) <= set(page.ids)


def test_the_page_links_to_the_logs_in_the_runs_folder(html: str) -> None:
    references = Page(html).references
    assert {"consoles/guest%201.log", "host.log"} <= set(references)


def test_the_page_begins_with_the_verdict_and_shows_what_failed_first(html: str) -> None:
    words = Page(html).words
    places = [
        words.index(text)
        for text in (
            "Failed",
            "1 passed, 1 failed, 2 could not be judged, 1 skipped",
            "vmexit.lost",
            "Kernel panic - not syncing: <bad> & worse",
            "p2p.data-intact",
            "1664 → 565",
            "lspci.good",
            "not on this host",
            "41.25 MiB/s",
            "ab" * 32,
            "guest 1.log",
            "They never prove nanoseconds",
        )
    ]
    assert places == sorted(places)
    assert "\x1b" not in words
    assert "<bad>" not in html


def test_a_run_on_hardware_is_not_called_emulated() -> None:
    rows = tuple(dataclasses.replace(r, provenance="hardware") for r in REPORT.measurements)
    words = Page(render_html(dataclasses.replace(REPORT, measurements=rows))).words
    assert "come from an emulated machine" not in words
    assert "Hardware figures" in words


def test_a_page_of_an_empty_run_says_so() -> None:
    words = Page(render_html(Report(RUN, (), (), ()))).words
    for text in ("Nothing was checked", "Nothing was measured", "None were kept"):
        assert text in words


def test_a_series_has_a_card_with_its_purpose_headline_and_checks(html: str) -> None:
    words = " ".join(Page(html).words.split())
    places = [
        words.index(text)
        for text in (
            "The series",
            "pci-config-cache",
            "Serves reads.",
            "1664 → 565",
            "exits to QEMU (testbed amd)",
            "288 → 11 exits to QEMU (testbed intel)",
            "Its checks: 1 passed",
            "Details",
        )
    ]
    assert places == sorted(places)
    assert "pmu-passthrough" not in words  # nothing of it was measured


def test_all_else_is_folded(html: str) -> None:
    assert "<details open" not in html
    unfolded = " ".join(Page(html).unfolded.split())
    assert "1664 → 565" in unfolded
    assert "the guest died" in unfolded
    for text in ("lspci.userspace_exits", "lspci.good", "host.log", "ab" * 32, "They never prove"):
        assert text not in unfolded


def test_a_plot_has_a_bar_a_variant_with_its_value_in_the_pages_colours() -> None:
    (card,) = cards(REPORT)
    svg = draw(card.figures[0])
    assert svg.startswith("<svg")
    for text in (">vanilla<", ">off<", ">on<", ">1664<", ">565<", 'role="img"', "currentColor"):
        assert text in svg
    assert svg.count("<rect") == 3
    assert "vanilla 1664, off 1664, on 565" in svg  # for those who do not see it


def headline(**sides: dict[str, str | None]) -> Headline:
    return Headline("lspci.userspace_exits", "exits to QEMU", **sides)


def with_headline(one: Headline, *rows: Measurement) -> Report:
    feature = Feature("pci-config-cache", "Serves reads.", (one,))
    return Report(RUN, (), rows, (), (feature,))


def exits(value: float, variant: Variant = "vanilla", **more: Any) -> Measurement:
    series = "pci-config-cache" if variant == "on" else None
    return made.row(value, name="lspci.userspace_exits", variant=variant, series=series, **more)


def test_a_figure_needs_rows_before_and_after_and_prefers_the_plain_setup() -> None:
    def found(one: Headline, *rows: Measurement) -> list[tuple[float | None, float]]:
        (card,) = cards(with_headline(one, *rows))
        return [
            (None if each.before is None else each.before.median, each.after.median)
            for each in card.figures
        ]

    on = exits(2, "on")
    assert found(headline(), exits(9), on) == [(9, 2)]
    assert found(headline(), exits(9), exits(8, "off"), on) == [(9, 2)]
    assert found(headline(), exits(8, "off"), on) == [(8, 2)]
    assert found(headline(), on) == []
    assert found(headline(), exits(math.nan), on) == []
    assert found(headline(), exits(9), exits(7, setup="mediated"), on) == [(9, 2)]
    assert found(headline(before={"setup": "mediated"}), exits(9), on) == []
    assert found(headline(before={"setup": "mediated"}), exits(7, setup="mediated"), on) == [(7, 2)]
    # two rows that nothing tells apart are no figure
    assert found(headline(), exits(9, path="cf8"), exits(5, path="ecam"), on) == []
    assert found(headline(rows={"path": "cf8"}), exits(9, path="cf8"), on) == []
    after = headline(before={"path": "cf8"}, after={"path": None})
    assert found(after, exits(9, path="cf8"), exits(5, path="ecam"), on) == [(9, 2)]


def test_what_no_guest_had_before_is_a_figure_without_a_before() -> None:
    """imc.read_exits is measured in the variant ``on`` alone; a metric of all needs two rows."""
    row = made.row(1, name="imc.read_exits", variant="on", series="pci-config-cache")
    report = with_headline(Headline("imc.read_exits", "exits for a read"), row)
    (card,) = cards(report)
    (figure,) = card.figures
    assert (figure.before, figure.after.median) == (None, 1)
    assert "This run lacks its figure" not in Page(render_html(report)).words
    assert "| - | **1** |" in render_headlines(report)


def test_a_series_that_could_not_be_measured_has_a_card_that_says_so() -> None:
    lost = CheckResult("measured:lspci:on-direct-pci-config-cache", "error", "", "x", "it died")
    report = dataclasses.replace(with_headline(headline(), exits(9)), checks=(lost,))
    (card,) = cards(report)
    assert card.verdict == ("error", "1 could not be judged")
    assert "This run lacks its figure" in Page(render_html(report)).words
    assert cards(with_headline(headline(), exits(9))) == []


def test_checks_of_both_hosts_are_in_the_card() -> None:
    (card,) = cards(REPORT)
    names = [check.name for check in card.checks]
    assert names == ["lspci.good"]
    both = (*REPORT.checks, CheckResult("lspci.good (intel)", "fail", "", "1", "no"))
    (card,) = cards(with_checks(*both))
    assert card.verdict == ("fail", "1 passed, 1 failed")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1664, "exits", "1664"),
        (16777216, "bytes", "16 MiB"),
        (1572864, "bytes", "1.5 MiB"),
        (4096, "bytes", "4096"),
        (16777216, "exits", "16,777,216"),
        (1.068, "loads/sample", "1.07"),
        (0.04196, "loads/sample", "0.04"),
        (0.000999, "loads/sample", "0.001"),
        (0, "exits", "0"),
    ],
)
def test_large_figures_are_short(value: float, unit: str, text: str) -> None:
    assert short(value, unit) == text


def test_a_report_without_series_is_still_a_report(tmp_path: Path) -> None:
    old = dataclasses.replace(REPORT, series=())
    write(old, tmp_path)
    assert "series" not in json.loads((tmp_path / "report.json").read_text())
    assert read(tmp_path) == old
    assert "No series was switched on" in Page((tmp_path / "report.html").read_text()).words


def test_backquoted_words_are_code_and_nothing_escapes() -> None:
    failed = CheckResult("own", "fail", "", "1", "`a < 1` is false. <b> & `open")
    page = render_html(with_checks(failed))
    assert "`a &lt; 1` is false. &lt;b&gt; &amp; `open" in page
    page = render_html(with_checks(dataclasses.replace(failed, reason="`a < 1` is false. <b>")))
    assert "<code>a &lt; 1</code> is false. &lt;b&gt;" in page


def test_links_are_to_all_files_but_the_reports_own(tmp_path: Path) -> None:
    (tmp_path / "consoles").mkdir()
    for name in ("b.log", "consoles/a.log", "report.json", "report.html", ".hidden"):
        (tmp_path / name).write_text("")
    assert find_logs(tmp_path) == [Path("b.log"), Path("consoles/a.log")]
    write(REPORT, tmp_path, logs=[tmp_path / "b.log"])
    references = Page((tmp_path / "report.html").read_text()).references
    assert "b.log" in references
    assert "consoles/a.log" not in references


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (768.0, "768"),
        (1020312.4, "1020312"),
        (0, "0"),
        (0.123456, "0.1235"),
        (41.2, "41.2"),
        (9.99996, "10"),
        (-2.5, "-2.5"),
        (1.5e-12, "1.500e-12"),
        (None, "-"),
        (math.nan, "nan"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        ("pass skip", "pass"),
        ("pass error", "error"),
        ("pass error fail", "fail"),
        ("skip", "skip"),
        ("", "skip"),
    ],
)
def test_the_verdict_is_the_worst(statuses: str, worst: str) -> None:
    checks = [CheckResult("c", each, "", "", "") for each in statuses.split()]  # type: ignore[arg-type]
    assert verdict(checks)[0] == worst


def test_the_terminal_shows_failures_with_their_reasons_and_no_escapes() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_terminal(REPORT))
    text = console.export_text()
    for words in ("768", "pci-config-cache", "`y` is false.", "maximum y = 5", "the guest died"):
        assert words in text
    assert "fail: 1 passed, 1 failed, 2 could not be judged, 1 skipped" in text
    assert "Kernel panic" not in text
    assert "because" not in text


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else_changes() -> None:
    readme = "# A\n<!-- results:begin -->\nold\n<!-- results:end -->\ntail\n"
    new = update_readme(readme, REPORT)
    assert new.startswith("# A\n<!-- results:begin -->\n| measurement")
    assert new.endswith("\n<!-- results:end -->\ntail\n")
    assert "old" not in new
    assert update_readme(new, REPORT) == new
    table = render_readme_table(REPORT)
    assert "| `p2p.read_mib_s` |" in table
    assert "| 41.25 | MiB/s |" in table
    assert "**emulated**" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_marker_chooses_rows() -> None:
    marker = "<!-- results:begin p2p.read_mib_s; lspci.exits path=none -->"
    new = update_readme(f"{marker}\nold\n<!-- results:end -->\n", REPORT)
    rows = [line for line in new.splitlines() if line.startswith("| `")]
    assert rows
    assert all(line.startswith("| `p2p.read_mib_s`") for line in rows)
    with pytest.raises(UsageError, match="raed_mib_s"):
        update_readme("<!-- results:begin p2p.raed_mib_s -->\n<!-- results:end -->\n", REPORT)


@pytest.mark.parametrize(
    "readme",
    [
        "no markers",
        "<!-- results:begin -->",
        "<!-- results:end -->\n<!-- results:begin -->",
        "<!-- results:begin -->\n<!-- results:begin -->\n<!-- results:end -->",
    ],
)
def test_a_readme_without_a_place_for_the_table_is_refused(readme: str) -> None:
    with pytest.raises(UsageError, match="no markers"):
        update_readme(readme, REPORT)


def test_names_stay_readable_on_a_narrow_terminal() -> None:
    wide = dataclasses.replace(
        REPORT.measurements[0],
        name="vmexit.agent.pmu_switches_per_sample",
        context={"path": "a" * 300},
        unit="instructions/exit",
        values=(123456789.5, 987654321.5),
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_terminal(dataclasses.replace(REPORT, measurements=(wide,))))
    assert wide.name[:24] in console.export_text()


def test_a_readme_may_ask_for_the_headlines(tmp_path: Path) -> None:
    headline = Headline("lspci.userspace_exits", "exits of one pass", rows={"path": "cf8"})
    feature = Feature("pci-config-cache", "Serves them.", (headline,))
    rows = (
        made.row(1664, name="lspci.userspace_exits", testbed="amd", path="cf8"),
        made.row(
            565, name="lspci.userspace_exits", variant="on", series="pci-config-cache",
            testbed="amd", path="cf8",
        ),
    )  # fmt: skip
    report = dataclasses.replace(REPORT, measurements=rows, series=(feature,))
    text = update_readme("<!-- results:begin headlines -->\n<!-- results:end -->\n", report)
    assert "| `pci-config-cache` | exits of one pass (amd) | 1664 | **565** | exits |" in text
