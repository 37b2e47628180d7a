# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks: what a file may say, and that only what was measured and holds passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from lib import results as made
from lib.results import changed

from nearmetal.core.errors import Exit, UsageError
from nearmetal.core.model import CheckResult, Measurement, Missing, Skipped, Subject
from nearmetal.judging.judge import Plan, exit_status, judge, together
from nearmetal.judging.load import Check, load_checks
from nearmetal.measure.lspci.instructions import compared
from nearmetal.patches.series import load_series
from nearmetal.patches.variants import Config, names_of
from nearmetal.runs import plan as plans

NAME = "lspci.userspace_exits"
TESTS = ("lspci", "vmexit", "p2p")
PLAN = made.plan(TESTS, ["vanilla"], testbed="amd")
VANILLA_SUBJECT = Subject("vanilla")


def row(*values: float, name: str = NAME, **keys: Any) -> Measurement:
    return made.row(*values, name=name, **keys)


def write_checks(folder: Path, *expressions: str, more: str = "", name: str = "own.yaml") -> Path:
    """A file with the checks c0, c1, …; ``more`` is added to each."""
    text = "schema: 1\nchecks:\n"
    for index, expression in enumerate(expressions):
        text += f"  - name: c{index}\n    expression: >-\n{indent(expression, ' ' * 6)}\n"
        text += "    expected: what is expected\n    why: this is why\n" + indent(more, " " * 4)
    path = folder / name
    path.write_text(text)
    return path


def verdict(
    folder: Path,
    expression: str,
    rows: Sequence[Measurement],
    *,
    missing: Sequence[Missing] = (),
    skipped: Sequence[Skipped] = (),
    more: str = "",
) -> CheckResult:
    checks = load_checks(write_checks(folder, expression, more=more))
    return judge(checks, rows, missing, skipped, PLAN)[0]


def refusal(path: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_checks(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


# --- loading ---------------------------------------------------------------------------------


def test_the_default_checks_load_and_each_says_why() -> None:
    checks = load_checks()
    assert {"lspci", "vmexit", "p2p"} <= {check.name.split(".")[0] for check in checks}
    assert all(check.why and check.expected and check.needs for check in checks)


def test_the_default_checks_are_about_series_that_there_are() -> None:
    patches = Path(__file__).parents[2] / "patches"
    load_checks(series=names_of(load_series(patches, known=plans.known())))


def test_needs_are_derived_from_the_expression(tmp_path: Path) -> None:
    path = write_checks(tmp_path, 'median("lspci.exits") - median("lspci.pass_us") > 0')
    (check,) = load_checks(path)
    assert check.needs == {"lspci.exits", "lspci.pass_us"}


def test_a_users_file_replaces_checks_of_the_same_name_and_adds_others(tmp_path: Path) -> None:
    first = write_checks(tmp_path, 'count("lspci.exits") > 1', 'count("lspci.exits") > 2')
    own = write_checks(tmp_path, 'count("lspci.exits") > 9', name="second.yaml")
    found = {check.name: check.expression for check in load_checks([first, own])}
    assert found == {"c0": 'count("lspci.exits") > 9', "c1": 'count("lspci.exits") > 2'}


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ('median("lspci.userspace_exit") > 0', "lspci.userspace_exit'", "lspci.userspace_exits"),
        ('medien("lspci.exits") > 0', "unknown function 'medien'", "median"),
        ('median("lspci.exits", variant="vanila") > 0', "unknown variant", "vanilla"),
        ('median("lspci.exits") >', "does not parse", "example"),
        ('median("lspci.exits", pass="second") > 0', "does not parse", "pass_"),
        ("median(name) > 0", "one measurement's name", "lspci.exits"),
        ('median("lspci.exits", path=cf8) > 0', "a text in quotes", 'path="cf8"'),
        ('median("lspci.exits", path="cf8", path="ecam") > 0', "twice", "leave"),
        ('median("lspci.exits", variant=None) > 0', "variant", "vanilla"),
        ("lspci > 0", "unknown name 'lspci'", "median"),
        ("1 + 1 == 2", "uses no measurement", "median"),
        ('median("lspci.exits") > 1e999', "not a finite number", "only in calls"),
        ('median("lspci.exits") == "768"', "not a finite number", "only in calls"),
        ('median("lspci.exits").real > 0', "Attribute", "comparisons"),
        ('[v for v in values("lspci.exits")] == 1', "ListComp", "comparisons"),
        ('median("lspci.exits") ** 9 ** 9 ** 9 > 0', "Pow", "comparisons"),
        ('__import__("os") == 0', "unknown function '__import__'", ""),
        ('abs("lspci.exits") > 0', "not a finite number", ""),
    ],
)
def test_an_expression_that_cannot_be_judged_is_refused_with_the_mend(
    tmp_path: Path, expression: str, message: str, hint: str
) -> None:
    error = refusal(write_checks(tmp_path, expression))
    assert "check 'c0'" in error.message
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.status == Exit.USAGE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: 1\nchecks: []\n", "checks"),
        ("schema: 2\nchecks: [{}]\n", "schema"),
        ("schema: 1\nchecks:\n  - {name: a, expression: b}\n", "check 'a'"),
        ("schema: 1\nchecks:\n  - {expression: b}\n", "check number 1"),
        ("- a\n- b\n", "the document"),
        ("", "the document"),
        ("schema: [\n", "not YAML: line 2"),
        ("schema: 1\nschema: 1\n", "comes twice"),
        ("? [schema]\n: 1\n", "found unhashable key"),
        ("schema: 1\nchecks:\n  - {name: a, expresion: b, expected: c, why: d}\n", "expres"),
    ],
)
def test_a_file_that_is_no_checks_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert message in refusal(path).message


def test_an_unknown_key_gets_the_nearest_known_one(tmp_path: Path) -> None:
    path = write_checks(tmp_path, 'count("lspci.exits") > 0', more="applys_to: {}\n")
    error = refusal(path)
    assert "applys_to" in error.message
    assert "applies_to" in (error.hint or "")


def test_a_name_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    path = write_checks(tmp_path, 'count("lspci.exits") > 0', 'count("lspci.exits") > 1')
    path.write_text(path.read_text().replace("name: c1", "name: c0"))
    assert "two checks are named 'c0'" in refusal(path).message


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    refusal(binary)


def test_a_condition_on_an_unknown_test_or_variant_is_refused(tmp_path: Path) -> None:
    for more, hint in (("tests: [lspi]", "lspci"), ("variants: [onn]", "on")):
        path = write_checks(tmp_path, 'count("lspci.exits") > 0', more=f"applies_to: {{{more}}}\n")
        assert f"'{hint}'" in (refusal(path).hint or "")


# --- judging: pass and fail -------------------------------------------------------------------


def test_pass_and_fail_show_the_numbers_they_rest_on(tmp_path: Path) -> None:
    rows = [row(768, 768, 770, path="cf8"), row(1920, path="ecam")]
    call = f'median("{NAME}", variant="vanilla", path="cf8")'
    good, bad = (verdict(tmp_path, f"{call} == {value}", rows) for value in (768, 769))
    assert (good.status, bad.status) == ("pass", "fail")
    assert good.observed == bad.observed == f"median {NAME}[vanilla, cf8] = 768 exits"
    assert "this is why" in bad.reason
    assert "== 769" in bad.reason
    assert bad.expected == "what is expected"


@pytest.mark.parametrize(
    "expression",
    [
        f'spread("{NAME}", path="cf8") == 4',
        f'maximum("{NAME}") == 100',
        f'minimum("{NAME}") == 10',
        f'count("{NAME}") == 4 and count("{NAME}", path="ecam") == 1',
        f'values("{NAME}", path="cf8") == values("{NAME}", path="cf8")',
        f'values("{NAME}", path="cf8") != values("{NAME}", path="ecam")',
        f'abs(10 - median("{NAME}", path="ecam")) == 90',
        f'not (median("{NAME}", path="ecam") < 1 or median("{NAME}", path="cf8") % 2 == 1)',
    ],
)
def test_the_functions_compute_what_they_say(tmp_path: Path, expression: str) -> None:
    rows = [row(10, 12, 14, path="cf8"), row(100, path="ecam")]
    assert verdict(tmp_path, expression, rows).status == "pass"
    assert verdict(tmp_path, f"not ({expression})", rows).status == "fail"


def test_selectors_match_series_context_and_absence(tmp_path: Path) -> None:
    rows = [
        row(1, pass_="first"),
        row(2, pass_="second"),
        row(3, series="s"),
        row(4, path="ecam"),
    ]
    for selector, value in (
        ('pass_="second"', 2),
        ('series="s"', 3),
        ('path="ecam"', 4),
        ("pass_=None, series=None, path=None", None),
    ):
        result = verdict(tmp_path, f'median("{NAME}", {selector}) == {value or 0}', rows)
        assert result.status == ("pass" if value else "error"), result


# --- judging: error ---------------------------------------------------------------------------


def test_several_rows_are_an_error_that_names_what_tells_them_apart(tmp_path: Path) -> None:
    rows = [row(1, path="cf8", pass_="first"), row(1, path="ecam", pass_="first"), row(1)]
    result = verdict(tmp_path, f'median("{NAME}", variant="vanilla") == 1', rows)
    assert result.status == "error"
    assert "path (cf8, ecam, None)" in result.reason
    assert "variant" not in result.reason.split("apart")[1]


def test_two_rows_that_nothing_tells_apart_are_an_error(tmp_path: Path) -> None:
    result = verdict(tmp_path, f'median("{NAME}") == 1', [row(1), row(1)])
    assert (result.status, "nothing tells them apart" in result.reason) == ("error", True)


def test_what_is_missing_is_an_error_with_its_reason(tmp_path: Path) -> None:
    lost = Missing("lspci", VANILLA_SUBJECT, "the trace lost 12 events", (NAME,))
    result = verdict(tmp_path, f'median("{NAME}", variant="vanilla") == 0', [], missing=[lost])
    assert result.status == "error"
    assert "the trace lost 12 events" in result.reason


def test_a_planned_measurement_without_row_or_reason_is_an_error(tmp_path: Path) -> None:
    result = verdict(tmp_path, f'count("{NAME}", variant="vanilla") == 0', [])
    assert result.status == "error"


def test_a_row_of_another_context_does_not_stand_in_for_the_one_asked_for(tmp_path: Path) -> None:
    result = verdict(tmp_path, f'median("{NAME}", path="ecam") == 1', [row(1, path="cf8")])
    assert result.status == "error"
    assert "path=cf8" in result.reason


@pytest.mark.parametrize("function", ["maximum", "minimum", "count"])
def test_functions_over_all_rows_refuse_an_incomplete_measurement(
    tmp_path: Path, function: str
) -> None:
    lost = Missing("lspci", VANILLA_SUBJECT, "timeout in pass 2", (NAME,))
    expression = f'{function}("{NAME}") == 1'
    assert verdict(tmp_path, expression, [row(1)]).status == "pass"
    assert verdict(tmp_path, expression, [row(1)], missing=[lost]).status == "error"


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        (f'1 / median("{NAME}") > 0', [row(0)]),
        (f'median("{NAME}") % median("{NAME}") == 0', [row(0)]),
        (f'median("{NAME}") > 0', [row(math.inf)]),
        (f'not (median("{NAME}") > 0)', [row(math.nan)]),
        (f'median("{NAME}") * 10 > 0', [row(1e308)]),
        (f'maximum("{NAME}") > 0', [row(1), row(1, math.nan)]),
        (f'median("{NAME}")', [row(1)]),
        (f'median("{NAME}") > 0 and 5', [row(1)]),
        (f'values("{NAME}") > 0', [row(1)]),
        (f'median("{NAME}") > 0', [row()]),
        (f'spread("{NAME}") == 0', [row(1)]),
    ],
)
def test_what_cannot_be_evaluated_never_passes(
    tmp_path: Path, expression: str, rows: list[Measurement]
) -> None:
    result = verdict(tmp_path, expression, rows)
    assert result.status == "error"
    assert result.reason
    assert "\n" not in result.reason


def test_an_unmeasured_operand_counts_even_where_evaluation_would_not_reach_it(
    tmp_path: Path,
) -> None:
    expression = f'median("{NAME}") == 1 or median("lspci.exits") == 1'
    assert verdict(tmp_path, expression, [row(1)]).status == "error"


# --- judging: skip ----------------------------------------------------------------------------


def test_what_is_declared_not_to_apply_is_skipped_with_its_reason(tmp_path: Path) -> None:
    name = "vmexit.agent.pmu_exits_per_sample"
    declared = Skipped("vmexit", VANILLA_SUBJECT, "the guest has no PMU", (name,))
    result = verdict(tmp_path, f'median("{name}", variant="vanilla") > 0', [], skipped=[declared])
    assert (result.status, result.reason) == ("skip", "the guest has no PMU")


@pytest.mark.parametrize("names", [(NAME, NAME), (NAME, "lspci.exits"), ("lspci.exits", NAME)])
def test_missing_outweighs_skipped(tmp_path: Path, names: tuple[str, str]) -> None:
    lost = Missing("lspci", VANILLA_SUBJECT, "panic", (names[0],))
    declared = Skipped("lspci", VANILLA_SUBJECT, "no ECAM", (names[1],))
    expression = f'median("{NAME}") + median("lspci.exits") > 0'
    result = verdict(tmp_path, expression, [], missing=[lost], skipped=[declared])
    assert result.status == "error"
    assert "panic" in result.reason


@pytest.mark.parametrize(
    ("selectors", "reason"),
    [
        ('variant="on"', "variant 'on'"),
        ('series="pci-config-cache"', "series 'pci-config-cache'"),
        ('testbed="intel"', "testbed 'intel'"),
    ],
)
def test_what_this_run_does_not_have_is_skipped(
    tmp_path: Path, selectors: str, reason: str
) -> None:
    both = f'median("{NAME}", {selectors}) < median("{NAME}", variant="vanilla")'
    result = verdict(tmp_path, both, [row(1)])
    assert result.status == "skip"
    assert reason in result.reason


def test_a_test_that_was_not_selected_is_skipped_and_its_absence_is_no_error() -> None:
    plan = made.plan(("p2p",), ["vanilla"])
    results = judge(load_checks(), (), (), (), plan)
    lspci = [result for result in results if result.name.startswith("lspci.")]
    assert {result.status for result in lspci} == {"skip"}
    assert all("p2p" in result.reason for result in lspci)
    assert [r.name for r in results if r.name.startswith("measured:")] == [
        "measured:p2p:vanilla-iommu"
    ]


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("hosts: [testbed]", "pass"),
        ("hosts: [gpu-7]", "skip"),
        ("testbeds: [intel]", "skip"),
        ("tests: [lspci]", "pass"),
        ("variants: ['on']", "skip"),
        ("series: [direct-p2p]", "skip"),
    ],
)
def test_a_check_is_judged_only_where_it_applies(
    tmp_path: Path, condition: str, status: str
) -> None:
    more = f"applies_to: {{{condition}}}\n"
    result = verdict(tmp_path, f'median("{NAME}") == 1', [row(1)], more=more)
    assert result.status == status
    assert bool(result.reason)


# --- what was not measured fails the run -------------------------------------------------------


def test_every_missing_fails_the_run_also_where_no_check_needs_it() -> None:
    plan = made.plan((), ["vanilla"])
    lost = [
        Missing(
            "lspci", VANILLA_SUBJECT, "panic in the guest", (NAME,), "Kernel panic\nCall Trace:"
        ),
        Missing("lspci", VANILLA_SUBJECT, "timeout", ("lspci.exits",)),
    ]
    (result,) = judge((), (), lost, (), plan)
    assert (result.name, result.status) == ("measured:lspci:vanilla", "error")
    assert result.reason == "panic in the guest\nKernel panic\nCall Trace:\ntimeout"
    assert NAME in result.expected
    assert exit_status([result]) == Exit.FAILED


def test_a_planned_name_without_a_row_fails_the_run_unless_it_is_skipped() -> None:
    plan = made.plan(("lspci",), ["vanilla"])
    rows = [
        row(1, name=name) for name in sorted(plan.names[VANILLA_SUBJECT, "lspci"]) if name != NAME
    ]
    (result,) = judge((), rows, (), (), plan)
    assert (result.status, result.name) == ("error", "measured:lspci:vanilla")
    assert NAME in result.reason
    declared = Skipped("lspci", VANILLA_SUBJECT, "not here", (NAME,))
    assert judge((), rows, (), [declared], plan) == ()
    assert judge((), [*rows, row(1)], (), (), plan) == ()


TWO = [Config("on", "pci-config-cache"), Config("on", "pci-ecam")]


def test_a_series_that_measures_nothing_is_an_error_though_another_s_on_did() -> None:
    plan = made.plan(("lspci",), TWO, testbed="amd")
    rows = [
        row(1, name=name, variant="on", series="pci-config-cache")
        for name in plan.names[Subject("on", "pci-config-cache"), "lspci"]
    ]
    (result,) = judge((), rows, (), (), plan)
    assert (result.name, result.status) == ("measured:lspci:on-pci-ecam", "error")


def test_a_series_that_was_measured_is_judged_though_another_failed(tmp_path: Path) -> None:
    plan = made.plan(("lspci",), TWO, testbed="amd")
    lost = Missing("lspci", Subject("on", "pci-config-cache"), "QEMU did not start", (NAME,))
    for series, status in (("pci-ecam", "pass"), ("pci-config-cache", "error")):
        path = write_checks(tmp_path, f'maximum("{NAME}", series="{series}") == 1')
        rows = [row(1, variant="on", series="pci-ecam")]
        result = judge(load_checks(path), rows, [lost], (), plan)[0]
        assert result.status == status, result


@pytest.mark.parametrize(
    ("selectors", "says", "hint"),
    [
        ('pth="cf8"', "no context key 'pth'", "'path'"),
        ('path="cf9"', "unknown path 'cf9'", "'cf8'"),
        ('setup="mediated"', "unknown setup 'mediated'", "known: "),
        ('testbed="amdd"', "unknown testbed 'amdd'", "'amd'"),
        ('series="pci-ecm"', "unknown series 'pci-ecm'", "'pci-ecam'"),
        ('counter="x"', "no context key 'counter'", "known: "),
    ],
)
def test_selectors_that_no_row_can_have_are_refused(
    tmp_path: Path, selectors: str, says: str, hint: str
) -> None:
    path = write_checks(tmp_path, f'median("{NAME}", {selectors}) == 1')
    with pytest.raises(UsageError) as caught:
        load_checks(path, series=["pci-config-cache", "pci-ecam"])
    assert says in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (("pass", "skip"), Exit.OK),
        (("pass", "fail"), Exit.FAILED),
        (("pass", "error"), Exit.FAILED),
        ((), Exit.OK),
    ],
)
def test_the_exit_status_follows_the_verdicts(statuses: tuple[str, ...], status: Exit) -> None:
    results = [CheckResult("c", verdict, "", "", "") for verdict in statuses]  # type: ignore[arg-type]
    assert exit_status(results) == status


def test_the_verdicts_of_two_testbeds_stand_in_one_list() -> None:
    def part(**verdicts: str) -> list[CheckResult]:
        return [CheckResult(name, one, "", "", "") for name, one in verdicts.items()]  # type: ignore[arg-type]

    found = together(
        {
            "amd": part(first="pass", second="skip", third="fail", fourth="skip"),
            "intel": part(first="error", second="pass", third="skip", fourth="skip"),
        }
    )
    assert [(one.name, one.status) for one in found] == [
        ("first", "pass"),
        ("third", "fail"),
        ("fourth", "skip"),
        ("first (intel)", "error"),
        ("second (intel)", "pass"),
    ]
    assert exit_status(found) == Exit.FAILED


# --- the default checks ------------------------------------------------------------------------


Agents = dict[str, tuple[float, float, float]]
"""By agent that uses counters: PMU exits, exits for overflows, switches of the PMU, a sample."""

VANILLA: Agents = {
    "multiplex": (417.1, 0, 0),
    "profile": (11, 1, 0),
    "plain": (0, 0, 0),
    "rdpmc": (1.02, 0, 0),
    "selectors": (1, 0, 0),
    "tasks": (29.6, 0, 0),
}
MEDIATED: Agents = {
    "multiplex": (22.5, 0, 33.4),
    "profile": (0.6, 1, 47.6),
    "plain": (0, 0, 436.3),
    "rdpmc": (0, 0, 0.001),
    "selectors": (1, 0, 1.095),
    "tasks": (6.28, 0, 16.99),
}
"""Measured once, on an emulated host."""


def counters(
    context: dict[str, str],
    agents: Agents,
    write: float = 2412,
    pair: float = 2736,
    causes: dict[str, float] | None = None,
) -> list[Measurement]:
    """The rows of measure/vmexit/counters.py; ``causes``: loads that the guest causes, by agent.

    Without them the PMU is not mediated.
    """
    names = ("pmu_exits", "pmi_exits", "pmu_switches")
    rows = [
        row(value, name=f"vmexit.agent.{name}_per_sample", agent=agent, **context)
        for agent, values in agents.items()
        for name, value in zip(names, values, strict=True)
    ]
    for host in ("idle", "busy"):
        for event in ("instructions", "branches"):
            words = {"event": event, "host": host, **context}
            rows.append(row(0.0003, 0.0003, name="pmu.count_error_pct", **words))
    rows.append(row(0, 0, 0, name="pmu.leaked_host_instructions", **context))
    rows.append(row(write, name="pmu.selector_write_instructions", **context))
    rows.append(row(pair, pair, pair, name="pmu.kernel_pair_instructions", port="0x4d0", **context))
    for agent, guest in (causes or {}).items():
        loads = {"guest": guest, "userspace": 0.0, "interrupt": agents[agent][2] - guest}
        for cause, value in loads.items():
            words = {"agent": agent, "cause": cause, **context}
            rows.append(row(value, name="vmexit.agent.pmu_switches_by_cause", **words))
    return rows


MEDIATED_CAUSES = {"multiplex": 6.53, "profile": 4.25, "plain": 0.0}
"""Measured once, on an emulated host."""


def mediated(context: dict[str, str]) -> list[Measurement]:
    """What vanilla's mediated PMU costs."""
    return counters(context, MEDIATED, pair=4254, causes=MEDIATED_CAUSES)


def healthy() -> list[Measurement]:
    """Rows as an unpatched testbed gives them."""
    rows = []
    for path, exits in (("cf8", 768), ("ecam", 1920)):
        for number in ("first", "second"):
            rows += [
                row(exits, exits, exits, name="lspci.exits", path=path, pass_=number),
                row(exits, exits, exits, path=path, pass_=number),
                row(4e5, 4.1e5, name="lspci.pass_us", path=path, pass_=number),
            ]
        rows.append(row(1e6, 1.1e6, name="lspci.dword_ns", path=path))
    for number in ("first", "second"):
        name = "lspci.userspace_exits_cacheable"
        rows.append(row(500, 500, name=name, path="cf8", pass_=number))
        name = "lspci.userspace_exits_link_status"
        rows.append(row(4, 4, name=name, path="cf8", pass_=number))
    for name, value in (
        ("lspci.uncacheable_dwords", 134),
        ("lspci.byte_mismatches", 0),
        ("lspci.bytes_compared", 1536),
    ):
        rows.append(row(value, value, name=name, path="cf8"))
    for path, function, register, count in (
        ("cf8", "emulated", "id", 9618),
        ("cf8", "emulated", "status", 9618),
        ("cf8", "assigned", "id", 10830),
        ("cf8", "assigned", "status", 11088),
        ("ecam", "emulated", "extended", 7491),
        ("ecam", "assigned", "extended", 8690),
    ):
        words = {"path": path, "function": function, "register": register}
        rows.append(row(count, count, name="lspci.dword_instructions", **words))
    rows.append(row(2710, 2710, name="exit.kernel_pair_instructions", port="0x4d0"))
    for kind, functions, exits in (
        ("emulated", 9, 1920),
        ("above", 2, 1920),
        ("assigned", 2, 1920),
    ):
        rows.append(row(exits, exits, name="ecam.read_exits", path="ecam", function=kind))
        rows.append(row(functions, name="ecam.functions", function=kind))
    rows.append(row(0, name="ecam.mapped_functions"))
    agent = {
        "vmexit.agent.exits_per_sample": 812.5,
        "vmexit.agent.userspace_exits_per_sample": 768,
        "vmexit.agent.pmu_exits_per_sample": 0,
        "vmexit.agent.samples_per_s": 1.9,
    }
    peers = {
        "p2p.read_mib_s": 40,
        "p2p.write_mib_s": 38,
        "p2p.host_ram_mib_s": 120,
        "p2p.corrupt_bytes": 0,
        "p2p.iommu_faults": 0,
        "p2p.errors_reported": 0,
        "p2p.ram_corrupt_bytes": 0,
        "p2p.ram_bytes": 1 << 20,
    }
    rows += [row(value, name=name) for name, value in agent.items()]
    rows += [row(value, name=name, setup="mediated") for name, value in list(agent.items())[:3]]
    rows += counters({}, VANILLA) + mediated({"setup": "mediated"})
    ways = {"bare": "direct", "iommu": "redirected", "ats": "translated"}
    for setup, taken in ways.items():
        rows += [row(value, name=name, setup=setup) for name, value in peers.items()]
        for way in ways.values():
            moved = 16 << 20 if way == taken else 0
            rows.append(row(moved, moved, name=f"p2p.bytes_{way}", setup=setup))
    return rows


ID = {"path": "cf8", "function": "emulated", "register": "id"}


def spoil(rows: list[Measurement], name: str, *values: float, **context: str) -> list[Measurement]:
    keys = {key.removesuffix("_"): value for key, value in context.items()}

    def hit(each: Measurement) -> bool:
        return each.name == name and keys.items() <= each.where.items()

    assert any(map(hit, rows))
    return [changed(each, values=values) if hit(each) else each for each in rows]


@pytest.fixture(scope="module")
def defaults() -> tuple[Check, ...]:
    return load_checks()


ON_OR_OFF = (
    *("off.", "pci-config-cache.", "pci-ecam.", "pci-config-live."),
    *("direct-p2p.", "pmu-fastpath."),
    *("pmu-passthrough.", "uncore-pmu."),
)


def test_a_healthy_run_passes_all_default_checks(defaults: tuple[Check, ...]) -> None:
    results = judge(defaults, healthy(), (), (), PLAN)
    bad = [result for result in results if result.status not in ("pass", "skip")]
    assert not bad, bad
    # only what is about a variant that this run does not have is left out
    skipped = {result.name for result in results if result.status == "skip"}
    assert skipped == {check.name for check in defaults if check.name.startswith(ON_OR_OFF)}


def on_a_server() -> tuple[list[Measurement], list[Skipped], Plan]:
    """What a run on a server has of that: no set-up but iommu, and nothing of the testbed's own."""
    work = made.work(TESTS, ["vanilla"])
    skipped = plans.expected(work, made.equipment(None)).skipped
    own = {name for entry in skipped for name in entry.names}
    rows = [
        one
        for one in healthy()
        if one.name not in own and one.where.get("setup", "iommu") == "iommu"
    ]
    return rows, list(skipped), made.plan(TESTS, ["vanilla"], host="gpu1")


def test_a_healthy_server_passes_all_that_is_for_it(defaults: tuple[Check, ...]) -> None:
    rows, skipped, plan = on_a_server()
    results = judge(defaults, rows, (), skipped, plan)
    assert not [one for one in results if one.status not in ("pass", "skip")]
    passed = {one.name for one in results if one.status == "pass"}
    assert passed >= {"p2p.data-intact", "p2p.no-iommu-faults"}


def plain(one: Measurement) -> bool:
    """Whether a row is of a variant as it is, and not of vanilla with a mediated PMU."""
    return one.where.get("setup") != "mediated"


def patched() -> tuple[list[Measurement], Plan]:
    """A healthy run with the variant off, which equals vanilla."""
    off = [changed(one, variant="off") for one in healthy() if plain(one)]
    tests = ("lspci", "vmexit", "p2p")
    rows = [*healthy(), *off]
    return [*rows, *compared(rows)], made.plan(tests, ["vanilla", "off"], testbed="amd")


def test_off_that_equals_vanilla_passes(defaults: tuple[Check, ...]) -> None:
    rows, plan = patched()
    results = judge(defaults, rows, (), (), plan)
    bad = [result for result in results if result.status not in ("pass", "skip")]
    assert not bad, bad
    assert not [one for one in results if one.status == "skip" and one.name.startswith("off.")]


def switched_on(
    series: str, others: dict[tuple[str, str | None], float], key: str
) -> tuple[list[Measurement], Plan]:
    """A healthy run with a series on; ``others`` are values by name and the context's ``key``."""
    rows = healthy()
    on = []
    for one in filter(plain, rows):
        value = others.get((one.name, one.context.get(key)))
        values = one.values if value is None else tuple(float(value) for _ in one.values)
        on.append(changed(one, variant="on", series=series, values=values))
    plan = made.plan(TESTS, ["vanilla", Config("on", series)], testbed="amd")
    return [*rows, *on], plan


def cached() -> tuple[list[Measurement], Plan]:
    """A healthy run with pci-config-cache on: what may be kept is, and nothing else."""
    changed: dict[tuple[str, str | None], float] = {
        ("lspci.userspace_exits", "cf8"): 134,
        ("lspci.userspace_exits_cacheable", "cf8"): 0,
        ("vmexit.agent.userspace_exits_per_sample", None): 19,
    }
    rows, plan = switched_on("pci-config-cache", changed, "path")
    kept = [
        dataclasses.replace(one, values=(2632.0, 2632.0))
        if one.name == "lspci.dword_instructions"
        and one.variant == "on"
        and one.context["register"] == "id"
        else one
        for one in rows
    ]
    return [*kept, *compared(kept)], plan


def passed_through(**spoilt: float) -> tuple[list[Measurement], Plan]:
    """A healthy run with pmu-passthrough on; ``spoilt``: other values by name."""
    agents = dict(MEDIATED)
    agents["selectors"] = (1, 0, spoilt.get("switches", 0.028))
    agents["multiplex"] = (22.5, 0, spoilt.get("multiplex", 19.0))
    agents["rdpmc"] = (spoilt.get("rdpmc", 0), 0, 0)
    agents["profile"] = (0.6, spoilt.get("profile", 1), 47.6)
    on = []
    for one in counters({}, agents, spoilt.get("write", 1200), causes={"plain": 0.0}):
        values = one.values
        if one.name == "pmu.leaked_host_instructions" and "leak" in spoilt:
            values = (spoilt["leak"],) * 3
        if one.context.get("host") == "busy" and "error" in spoilt:
            values = (0.0, spoilt["error"])
        on.append(changed(one, variant="on", series="pmu-passthrough", values=values))
    on_config = Config("on", "pmu-passthrough", tests=("vmexit",))
    plan = made.plan(TESTS, ["vanilla", on_config], testbed="amd")
    return [*healthy(), *on], plan


def test_counters_that_are_passed_through_pass(defaults: tuple[Check, ...]) -> None:
    rows, plan = passed_through()
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    mine = {name: status for name, status in results.items() if "pmu-passthrough." in name}
    assert mine.pop("pmu-passthrough.counters-take-no-exit") == "skip"
    assert len(mine) == 7
    assert set(mine.values()) == {"pass"}, mine


@pytest.mark.parametrize(
    ("exits", "counters_on", "status"),
    [(0.001, "4", "pass"), (0.02, "4", "fail"), (0, "3", "error")],
)
def test_on_intel_no_agent_exits_for_counters(
    defaults: tuple[Check, ...], exits: float, counters_on: str, status: str
) -> None:
    rows, plan = passed_through()
    name = "vmexit.agent.pmu_exits_per_sample"
    mine = [
        dataclasses.replace(one, values=(0.0,)) if one.name == name and one.variant == "on" else one
        for one in rows
    ]
    context = {"agent": "fixed", "setup": "mediated", "fixed_counters": "3"}
    mine.append(row(12, name=name, **context))
    fixed = row(exits, name=name, agent="fixed", fixed_counters=counters_on)
    mine.append(changed(fixed, variant="on", series="pmu-passthrough"))
    plan = dataclasses.replace(plan, testbed="intel")
    results = {result.name: result.status for result in judge(defaults, mine, (), (), plan)}
    assert results["pmu-passthrough.counters-take-no-exit"] == status


@pytest.mark.parametrize(
    ("check", "spoilt"),
    [
        ("reads-take-no-exit", {"rdpmc": 1}),
        ("selector-writes-do-not-switch", {"switches": 1.03}),
        ("selector-write-costs-less", {"write": 2412}),
        ("multiplexing-switches-less", {"multiplex": 32}),
        ("counts-are-right", {"error": 0.2}),
        ("host-code-is-not-counted", {"leak": 250}),
        ("overflows-exit-once", {"profile": 0}),
    ],
)
def test_counters_that_are_wrong_fail(
    defaults: tuple[Check, ...], check: str, spoilt: dict[str, float]
) -> None:
    rows, plan = passed_through(**spoilt)
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    assert results[f"pmu-passthrough.{check}"] == "fail"


def fast(**spoilt: float) -> tuple[list[Measurement], Plan]:
    """A healthy run with pmu-fastpath on; ``spoilt``: other values by name."""
    agents: Agents = {
        "multiplex": (2.88, 0, spoilt.get("multiplex", 1.19)),
        "profile": (0.1, 1, 6.4),
        "plain": (0, 0, spoilt.get("plain", 0)),
        "rdpmc": (0, 0, 0.001),
        "selectors": (1, 0, spoilt.get("selectors", 0)),
        "tasks": (6.3, 0, 0.72),
    }
    causes = {
        "multiplex": spoilt.get("by_guest", 0.05),
        "profile": spoilt.get("by_profile", 1.15),
        "plain": 0.0,
    }
    on = []
    for one in counters({}, agents, 1766, spoilt.get("pair", 2776), causes):
        values = one.values
        if one.name == "pmu.leaked_host_instructions" and "leak" in spoilt:
            values = (spoilt["leak"],) * 3
        if one.context.get("host") == "busy" and "error" in spoilt:
            values = (0.0, spoilt["error"])
        on.append(changed(one, variant="on", series="pmu-fastpath", values=values))
    plan = made.plan(
        TESTS, ["vanilla", Config("on", "pmu-fastpath", tests=("vmexit",))], testbed="amd"
    )
    return [*healthy(), *on], plan


def test_a_pmu_that_is_left_alone_passes(defaults: tuple[Check, ...]) -> None:
    rows, plan = fast()
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    mine = {name: status for name, status in results.items() if name.startswith("pmu-fastpath.")}
    assert len(mine) == 7
    assert set(mine.values()) == {"pass"}, mine


@pytest.mark.parametrize(
    ("check", "spoilt"),
    [
        ("selector-writes-do-not-switch", {"selectors": 1.04}),
        ("multiplexing-switches-less", {"multiplex": 7.5}),
        ("unused-pmu-is-left-alone", {"plain": 0.005}),
        ("guest-causes-few-switches", {"by_guest": 1.1}),
        ("guest-causes-few-switches", {"by_profile": 2}),
        ("idle-pmu-costs-little", {"pair": 2816}),
        ("counts-are-right", {"error": 0.2}),
        ("host-code-is-not-counted", {"leak": 250}),
    ],
)
def test_a_pmu_that_is_switched_fails(
    defaults: tuple[Check, ...], check: str, spoilt: dict[str, float]
) -> None:
    rows, plan = fast(**spoilt)
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    assert results[f"pmu-fastpath.{check}"] == "fail"


def mapped() -> tuple[list[Measurement], Plan]:
    """A healthy run with pci-ecam on: what QEMU emulates takes no exit, all else one a dword."""
    rows, plan = switched_on(
        "pci-ecam",
        {
            ("ecam.read_exits", "emulated"): 0,
            ("ecam.read_exits", "above"): 2048,
            ("ecam.read_exits", "assigned"): 2048,
            ("ecam.mapped_functions", None): 9,
        },
        "function",
    )
    ports = "lspci.exits"
    rows += compared(rows)
    return [
        dataclasses.replace(one, values=(256.0,))
        if one.name == ports and one.variant == "on" and one.context["path"] == "cf8"
        else one
        for one in rows
    ], plan


def live(**spoilt: float) -> tuple[list[Measurement], Plan]:
    """A healthy run with pci-config-live on; ``spoilt``: other values, by a metric's last word."""
    changed: dict[tuple[str, str | None], float] = {
        ("lspci.userspace_exits", "cf8"): spoilt.get("ports", 2),
        ("lspci.userspace_exits", "ecam"): spoilt.get("ecam", 0),
        ("lspci.userspace_exits_link_status", "cf8"): spoilt.get("link", 2),
        ("lspci.byte_mismatches", "cf8"): spoilt.get("bytes", 0),
        ("vmexit.agent.userspace_exits_per_sample", None): spoilt.get("agent", 0),
    }
    rows, plan = switched_on("pci-config-live", changed, "path")
    return [*rows, *compared(rows)], plan


@pytest.mark.parametrize(
    ("spoilt", "check"),
    [
        ({}, None),
        ({"ports": 3}, "ports-take-no-exit-to-qemu"),
        ({"link": 1}, "ports-take-no-exit-to-qemu"),
        ({"ecam": 1}, "ecam-takes-no-exit-to-qemu"),
        ({"bytes": 1}, "bytes-equal-qemu"),
        ({"agent": 1}, "agent-takes-no-exit-to-qemu"),
    ],
)
def test_reads_that_leave_the_kernel_fail(
    defaults: tuple[Check, ...], spoilt: dict[str, float], check: str | None
) -> None:
    rows, plan = live(**spoilt)
    results = {one.name: one.status for one in judge(defaults, rows, (), (), plan)}
    mine = {name: status for name, status in results.items() if name.startswith("pci-config-live.")}
    assert len(mine) == 4
    failed = {name for name, status in mine.items() if status != "pass"}
    assert failed == ({f"pci-config-live.{check}"} if check else set()), mine


def test_pages_that_are_mapped_pass(defaults: tuple[Check, ...]) -> None:
    rows, plan = mapped()
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    mine = {name: status for name, status in results.items() if name.startswith("pci-ecam.")}
    assert mine.pop("pci-ecam.takes-fewer-exits-with-the-cache") == "skip"
    assert len(mine) == 4
    assert set(mine.values()) == {"pass"}, mine


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("lspci.userspace_exits", 60, "pass"),
        ("lspci.userspace_exits", 67, "fail"),
        ("ecam.read_exits", 1, "fail"),
        ("lspci.byte_mismatches", 1, "fail"),
    ],
)
def test_both_ways_together(
    defaults: tuple[Check, ...], name: str, value: float, status: str
) -> None:
    rows, _ = cached()
    pair = "pci-config-cache+pci-ecam"
    usual = {"lspci.userspace_exits": 60.0, "ecam.read_exits": 0.0, "lspci.byte_mismatches": 0.0}
    usual[name] = float(value)
    both = [
        changed(one, series=pair, values=[usual.get(one.name, one.median)] * 2)
        for one in rows
        if one.variant == "on"
    ]
    on = [Config("on", "pci-config-cache"), Config("on", pair, tests=("lspci",))]
    plan = made.plan(TESTS, ["vanilla", *on], testbed="amd")
    results = {one.name: one.status for one in judge(defaults, [*rows, *both], (), (), plan)}
    assert results["pci-ecam.takes-fewer-exits-with-the-cache"] == status


@pytest.mark.parametrize(
    ("check", "name", "function", "value"),
    [
        ("mapped-reads-take-no-exit", "ecam.read_exits", "emulated", 1),
        ("unmapped-reads-take-one-exit", "ecam.read_exits", "assigned", 1),
        ("unmapped-reads-take-one-exit", "ecam.read_exits", "above", 1920),
        ("guest-leaves-the-ports", "lspci.exits", None, 512),
        ("guest-leaves-the-ports", "lspci.exits", None, 0),
        ("emulated-functions-are-mapped", "ecam.mapped_functions", None, 8),
    ],
)
def test_pages_that_are_not_as_they_should_be_fail(
    defaults: tuple[Check, ...], check: str, name: str, function: str | None, value: float
) -> None:
    rows, plan = mapped()
    spoilt = [
        dataclasses.replace(one, values=(value,))
        if (one.name, one.variant, one.context.get("function")) == (name, "on", function)
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoilt, (), (), plan)}
    assert results[f"pci-ecam.{check}"] == "fail"


def test_a_cache_that_keeps_what_it_may_passes(defaults: tuple[Check, ...]) -> None:
    rows, plan = cached()
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    assert set(results.values()) == {"pass", "skip"}, results
    mine = {name: status for name, status in results.items() if "config-cache" in name}
    assert len(mine) == 7
    assert set(mine.values()) == {"pass"}


@pytest.mark.parametrize(
    ("check", "name", "value"),
    [
        ("cacheable-reads-stay-in-kernel", "lspci.userspace_exits_cacheable", 1),
        ("other-reads-miss-exactly", "lspci.userspace_exits", 133),
        ("other-reads-miss-exactly", "lspci.userspace_exits", 135),
        ("bytes-equal-uncached", "lspci.byte_mismatches", 1),
        ("bytes-equal-uncached", "lspci.bytes_compared", 0),
        (
            "agent-saves-userspace-exits",
            "vmexit.agent.userspace_exits_per_sample",
            768,
        ),
        ("dword-costs-a-third", "lspci.dword_instructions_ratio", 2.99),
        ("dword-near-the-floor", "lspci.dword_instructions", 3117),
        ("dword-near-the-floor", "lspci.dword_instructions", 2303),
    ],
)
def test_a_cache_that_is_wrong_by_one_fails(
    defaults: tuple[Check, ...], check: str, name: str, value: float
) -> None:
    rows, plan = cached()
    spoiled = [
        dataclasses.replace(one, values=tuple(float(value) for _ in one.values))
        if one.variant == "on" and one.name == name and one.context.get("path") != "ecam"
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoiled, (), (), plan)}
    assert results[f"pci-config-cache.{check}"] == "fail"


@pytest.mark.parametrize(
    ("check", "name", "context"),
    [
        ("off.cf8-exits-equal-vanilla", "lspci.exits", {"path": "cf8"}),
        ("off.cf8-exits-equal-vanilla", "lspci.userspace_exits", {"path": "cf8"}),
        ("off.ecam-exits-equal-vanilla", "lspci.exits", {"path": "ecam"}),
        ("off.agent-userspace-exits-equal-vanilla", "vmexit.agent.userspace_exits_per_sample", {}),
        ("off.no-more-instructions", "exit.kernel_pair_instructions", {}),
        ("off.pmu-equals-vanilla", "vmexit.agent.pmu_exits_per_sample", {"agent": "selectors"}),
        ("off.pmu-equals-vanilla", "vmexit.agent.pmu_exits_per_sample", {"agent": "rdpmc"}),
        ("off.pmu-equals-vanilla", "vmexit.agent.pmu_switches_per_sample", {"agent": "tasks"}),
        ("off.pmu-equals-vanilla", "pmu.count_error_pct", {"host": "busy"}),
        ("off.host-code-is-not-counted", "pmu.leaked_host_instructions", {}),
        ("off.p2p-data-intact", "p2p.corrupt_bytes", {}),
        ("off.p2p-data-intact", "p2p.iommu_faults", {}),
        ("off.p2p-routes-equal-vanilla", "p2p.bytes_direct", {"setup": "iommu"}),
        ("off.p2p-routes-equal-vanilla", "p2p.bytes_redirected", {"setup": "iommu"}),
    ],
)
def test_one_exit_more_in_off_fails(
    defaults: tuple[Check, ...], check: str, name: str, context: dict[str, str]
) -> None:
    rows, plan = patched()
    spoiled = [
        dataclasses.replace(one, values=tuple(value + 1 for value in one.values))
        if one.variant == "off" and one.name == name and context.items() <= one.where.items()
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoiled, (), (), plan)}
    assert results[check] == "fail"


@pytest.mark.parametrize(("count", "status"), [(7495, "pass"), (7499, "fail"), (7410, "fail")])
def test_off_costs_a_read_by_ecam_next_to_nothing(
    defaults: tuple[Check, ...], count: float, status: str
) -> None:
    rows, plan = patched()
    name = "lspci.dword_instructions"
    spoiled = [
        dataclasses.replace(one, values=(count,))
        if one.variant == "off" and one.name == name and one.context["path"] == "ecam"
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoiled, (), (), plan)}
    assert results["off.ecam-instructions-near-vanilla"] == status


@pytest.mark.parametrize(("count", "status"), [(9647, "pass"), (9667, "fail")])
def test_off_may_ask_whether_there_is_a_cache(
    defaults: tuple[Check, ...], count: float, status: str
) -> None:
    rows, plan = patched()
    name = "lspci.dword_instructions"
    spoiled = [
        dataclasses.replace(one, values=(count,))
        if one.variant == "off" and one.name == name and one.context["path"] == "cf8"
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoiled, (), (), plan)}
    assert results["off.config-port-instructions-near-vanilla"] == status


@pytest.mark.parametrize(
    ("check", "name", "values", "context"),
    [
        ("lspci.cf8-exits-reach-qemu", NAME, (640, 640), {"path": "cf8"}),
        ("lspci.ecam-exits-reach-qemu", NAME, (960, 960), {"path": "ecam"}),
        ("lspci.cf8-counts-whole-functions", NAME, (767, 767), {"path": "cf8"}),
        ("lspci.cf8-counts-whole-functions", NAME, (0, 0), {"path": "cf8"}),
        ("lspci.ecam-counts-whole-functions", NAME, (1921, 1921), {"path": "ecam"}),
        ("lspci.cf8-counts-repeat", NAME, (768, 769), {"path": "cf8"}),
        ("lspci.ecam-counts-repeat", NAME, (1920, 1921), {"path": "ecam"}),
        ("lspci.vanilla-does-not-cache", NAME, (128, 128), {"path": "cf8", "pass_": "second"}),
        ("lspci.time-measured", "lspci.dword_ns", (0,), {"path": "cf8"}),
        ("vmexit.agent-samples", "vmexit.agent.samples_per_s", (0,), {}),
        ("vmexit.agent-keeps-its-period", "vmexit.agent.samples_per_s", (2000,), {}),
        (
            "vmexit.config-reads-reach-qemu",
            "vmexit.agent.userspace_exits_per_sample",
            (1,),
            {},
        ),
        ("lspci.dword-instructions-repeat", "lspci.dword_instructions", (9600, 9700), ID),
        ("lspci.dword-costs-more-than-its-exits", "lspci.dword_instructions", (2710,), ID),
        ("vmexit.userspace-exits-are-exits", "vmexit.agent.exits_per_sample", (700,), {}),
        ("vmexit.pmu-exits-are-exits", "vmexit.agent.pmu_exits_per_sample", (900,), {}),
        ("pmu.counts-are-right", "pmu.count_error_pct", (0, 0.2), {"host": "busy"}),
        ("pmu.host-code-is-not-counted", "pmu.leaked_host_instructions", (250,), {}),
        (
            "pmu.vanilla-pays-for-rdpmc",
            "vmexit.agent.pmu_exits_per_sample",
            (0,),
            {"agent": "rdpmc"},
        ),
        (
            "pmu.mediated-writes-switch",
            "vmexit.agent.pmu_switches_per_sample",
            (0.03,),
            {"agent": "selectors", "setup": "mediated"},
        ),
        (
            "pmu.mediated-writes-switch",
            "vmexit.agent.pmu_switches_per_sample",
            (1,),
            {"agent": "tasks"},
        ),
        (
            "pmu.overflows-are-seen",
            "vmexit.agent.pmi_exits_per_sample",
            (0,),
            {"agent": "profile", "setup": "mediated"},
        ),
        ("p2p.data-intact", "p2p.corrupt_bytes", (0, 1), {"setup": "iommu"}),
        ("p2p.no-iommu-faults", "p2p.iommu_faults", (1,), {"setup": "iommu"}),
        ("p2p.reads", "p2p.read_mib_s", (0,), {"setup": "iommu"}),
        ("p2p.writes", "p2p.write_mib_s", (0,), {"setup": "iommu"}),
        ("p2p.bare-is-direct", "p2p.bytes_direct", (0,), {"setup": "bare"}),
        ("p2p.bare-is-direct", "p2p.bytes_redirected", (1,), {"setup": "bare"}),
        ("p2p.bare-is-direct", "p2p.corrupt_bytes", (1,), {"setup": "bare"}),
        ("p2p.iommu-redirects", "p2p.bytes_direct", (1,), {"setup": "iommu"}),
        ("p2p.iommu-redirects", "p2p.bytes_redirected", (0,), {"setup": "iommu"}),
        ("p2p.ats-is-translated", "p2p.bytes_redirected", (1,), {"setup": "ats"}),
        ("p2p.ats-is-translated", "p2p.bytes_translated", (0,), {"setup": "ats"}),
        ("p2p.ats-is-translated", "p2p.iommu_faults", (1,), {"setup": "ats"}),
        ("p2p.baseline-measured", "p2p.host_ram_mib_s", (0,), {}),
        ("p2p.ram-intact-beside", "p2p.ram_corrupt_bytes", (8,), {"setup": "ats"}),
        ("p2p.ram-intact-beside", "p2p.ram_bytes", (0,), {"setup": "bare"}),
    ],
)
def test_each_default_check_can_fail(
    defaults: tuple[Check, ...],
    check: str,
    name: str,
    values: tuple[float, ...],
    context: dict[str, str],
) -> None:
    rows = spoil(healthy(), name, *values, **context)
    results = {result.name: result.status for result in judge(defaults, rows, (), (), PLAN)}
    assert results[check] == "fail"


def direct() -> tuple[list[Measurement], Plan]:
    """A healthy run with the variant on of direct-p2p: two set-ups, and nothing but p2p."""
    rows = []
    for (setup, taken), topology in product(
        (("iommufd", "redirected"), ("direct", "direct")), ("flat", "cascade")
    ):
        here = {"setup": setup, "topology": topology}
        values: dict[str, float] = {
            "p2p.corrupt_bytes": 0,
            "p2p.iommu_faults": 0,
            "p2p.errors_reported": 0,
            **{f"p2p.bytes_{way}": 0 for way in ("direct", "redirected", "translated")},
            f"p2p.bytes_{taken}": 16 << 20,
        }
        places = ("below-window", "behind-window") if setup == "direct" else ("anywhere",)
        found = [(name, value, here) for name, value in values.items()]
        for place in places:
            where = {**here, "ram": place}
            found += [("p2p.ram_bytes", 1 << 20, where), ("p2p.ram_corrupt_bytes", 0, where)]
        rows += [
            row(value, value, name=name, variant="on", series="direct-p2p", **context)
            for name, value, context in found
        ]
    on = Config("on", "direct-p2p", tests=("p2p",), setups=("iommufd", "direct"))
    plan = made.plan(("p2p",), ["vanilla", on], testbed="amd")
    # what these checks do not look at
    names = {
        key: names & {one.name for one in rows} if key[0].variant == "on" else names
        for key, names in plan.names.items()
    }
    return [*healthy(), *rows], dataclasses.replace(plan, names=names)


def test_peers_that_reach_each_other_directly_pass(defaults: tuple[Check, ...]) -> None:
    rows, plan = direct()
    results = {result.name: result.status for result in judge(defaults, rows, (), (), plan)}
    assert set(results.values()) == {"pass", "skip"}, results
    mine = {name: status for name, status in results.items() if name.startswith("direct-p2p.")}
    assert len(mine) == 6
    assert set(mine.values()) == {"pass"}


@pytest.mark.parametrize(
    ("check", "name", "setup", "value"),
    [
        ("all-bytes-direct", "p2p.bytes_direct", "direct", (16 << 20) - 1),
        ("all-bytes-direct", "p2p.bytes_redirected", "direct", 1),
        ("all-bytes-direct", "p2p.bytes_translated", "direct", 1),
        ("data-intact", "p2p.corrupt_bytes", "direct", 1),
        ("data-intact", "p2p.iommu_faults", "direct", 1),
        ("cascade-all-bytes-direct", "p2p.bytes_direct", "direct", (16 << 20) - 1),
        ("no-errors-reported", "p2p.errors_reported", "direct", 1),
        ("no-errors-reported", "p2p.errors_reported", "iommufd", 1),
        ("ram-intact-around-the-window", "p2p.ram_corrupt_bytes", "direct", 8),
        ("ram-intact-around-the-window", "p2p.ram_bytes", "direct", 0),
        ("without-it-all-bytes-are-redirected", "p2p.bytes_redirected", "iommufd", 1),
        ("without-it-all-bytes-are-redirected", "p2p.bytes_direct", "iommufd", 1),
        ("without-it-all-bytes-are-redirected", "p2p.corrupt_bytes", "iommufd", 1),
        ("without-it-all-bytes-are-redirected", "p2p.iommu_faults", "iommufd", 1),
    ],
)
def test_peers_that_do_not_fail(
    defaults: tuple[Check, ...], check: str, name: str, setup: str, value: float
) -> None:
    rows, plan = direct()
    spoilt = [
        dataclasses.replace(one, values=(float(value), *one.values[1:]))
        if (one.name, one.variant, one.where.get("setup")) == (name, "on", setup)
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoilt, (), (), plan)}
    assert results[f"direct-p2p.{check}"] == "fail"


@pytest.mark.parametrize("topology", ["flat", "cascade"])
def test_one_topology_that_is_not_direct_is_enough_to_fail(
    defaults: tuple[Check, ...], topology: str
) -> None:
    rows, plan = direct()
    spoilt = [
        dataclasses.replace(one, values=(0.0, *one.values[1:]))
        if one.name == "p2p.bytes_direct"
        and {"topology": topology, "setup": "direct"}.items() <= one.where.items()
        else one
        for one in rows
    ]
    results = {result.name: result.status for result in judge(defaults, spoilt, (), (), plan)}
    assert results["direct-p2p.all-bytes-direct"] == "fail"
    cascade = results["direct-p2p.cascade-all-bytes-direct"]
    assert cascade == ("fail" if topology == "cascade" else "pass")


def test_a_cascade_that_was_not_measured_is_an_error(defaults: tuple[Check, ...]) -> None:
    rows, plan = direct()
    left = [one for one in rows if one.where.get("topology") != "cascade"]
    results = {result.name: result.status for result in judge(defaults, left, (), (), plan)}
    assert results["direct-p2p.cascade-all-bytes-direct"] == "error"


def test_a_direct_set_up_that_broke_is_an_error(defaults: tuple[Check, ...]) -> None:
    rows, plan = direct()
    left = [one for one in rows if one.where.get("setup") != "direct"]
    subject = Subject("on", "direct-p2p", "direct")
    missing = [Missing("p2p", subject, "QEMU did not start", ("p2p.bytes_direct",))]
    results = {result.name: result.status for result in judge(defaults, left, missing, (), plan)}
    assert results["direct-p2p.all-bytes-direct"] == "error"


# --- the memory controllers' PMU


COUNTERS = ("free-running", "programmed")


def imc_rows(**spoilt: float) -> list[Measurement]:
    """What a guest that has the counters gives; ``spoilt``: another value by ``setup_name``."""
    rows = []
    for setup in ("trap", "map"):
        for name, usual in (
            ("read_exits", float(setup == "trap")),
            ("read_userspace_exits", 0.0),
            ("cas_read_error_pct", 0.2),
            ("cas_write_error_pct", 0.1),
            ("ras_registers_read", 14.0 * (setup == "map")),
            ("ras_registers_changed", 0.0),
            ("overflows_enabled", 0.0),
            ("second_users", 0.0),
        ):
            for counter in COUNTERS if name.startswith(("read_", "cas_")) else (None,):
                known = {} if counter is None else {"counter": counter}
                value = usual
                if counter in ("programmed", None):
                    value = spoilt.get(f"{setup}_{name}", usual)
                one = row(value, name=f"imc.{name}", variant="on", setup=setup, **known)
                rows.append(changed(one, series="uncore-pmu"))
    return rows


def imc_results(defaults: tuple[Check, ...], rows: list[Measurement]) -> dict[str, str]:
    plan = made.plan(
        ("imc",),
        [Config("on", "uncore-pmu", tests=("imc",), setups=("trap", "map"))],
        testbed="amd",
    )
    found = judge(defaults, rows, (), (), plan)
    return {
        one.name.removeprefix("uncore-pmu."): one.status
        for one in found
        if one.name.startswith("uncore-pmu.")
    }


def test_a_guest_with_the_memory_controllers_counters_passes(defaults: tuple[Check, ...]) -> None:
    assert set(imc_results(defaults, imc_rows()).values()) == {"pass"}


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("map_read_exits", 0.001, "mapped-reads-take-no-exit"),
        ("trap_read_exits", 1.001, "trapped-reads-stay-in-kernel"),
        ("trap_read_userspace_exits", 0.001, "trapped-reads-stay-in-kernel"),
        ("trap_cas_read_error_pct", 1.5, "counts-are-right"),
        ("map_cas_write_error_pct", 100.0, "counts-are-right"),
        ("trap_ras_registers_read", 1.0, "memory-errors-stay-with-the-host"),
        ("map_ras_registers_read", 0.0, "memory-errors-stay-with-the-host"),
        ("map_ras_registers_changed", 1.0, "memory-errors-stay-with-the-host"),
        ("trap_overflows_enabled", 1.0, "memory-errors-stay-with-the-host"),
        ("map_second_users", 1.0, "one-user"),
    ],
)
def test_wrong_counts_and_exits_fail(
    defaults: tuple[Check, ...], name: str, value: float, check: str
) -> None:
    found = imc_results(defaults, imc_rows(**{name: value}))
    assert [one for one, status in found.items() if status == "fail"] == [check]


@pytest.mark.parametrize("lost", ["trap", "map"])
def test_counters_that_were_not_measured_do_not_pass(
    defaults: tuple[Check, ...], lost: str
) -> None:
    rows = [one for one in imc_rows() if one.subject.setup != lost]
    assert "error" in set(imc_results(defaults, rows).values())
    rows = [one for one in imc_rows() if one.context.get("counter") == "free-running"]
    assert set(imc_results(defaults, rows).values()) == {"error"}
