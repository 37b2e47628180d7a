# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks are data: expressions in YAML over the measurements of one run.

Two steps, both pure: ``load_checks`` refuses every file that could not be judged (a typing
error costs a second and not a run), ``judge`` gives each check its verdict:

- ``pass``, ``fail``: everything was measured; the expression is true, or false;
- ``error``: something should have been measured and was not, or cannot be judged;
- ``skip``: declared not to apply to this run, with the reason.

Functions of an expression; all take a measurement's name and selectors, which are ``variant``,
``series`` and every key of a row's context (``pass_`` for the key ``pass``, a Python keyword;
``None`` selects the rows that lack the key)::

    median  values  spread      of the one row that matches; spread is largest - smallest
    maximum  minimum  count     of all values of the rows that match (one row or more)
    abs                         of a number
"""

from __future__ import annotations

import ast
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import simpleeval
import yaml

from ..core.errors import Exit, UsageError
from ..core.model import VARIANTS, CheckResult, Measurement, Missing, Skipped, Status, Variant
from ..core.schema import StrictLoader, Violation, load_schema, violation
from ..measure.catalogue import CATALOGUE, TESTS, nearest, planned
from ..report.tables import first_line, number

DEFAULT_CHECKS = Path(str(files("nearmetal") / "data" / "checks.yaml"))
"""The checks that every run is held to unless the user replaces them."""

_ONE_ROW = ("median", "values", "spread")
_ROWS = ("maximum", "minimum", "count")
_PURE: dict[str, Callable[..., Any]] = {"abs": abs}
FUNCTIONS: tuple[str, ...] = (*_ONE_ROW, *_ROWS, *_PURE)


@dataclass(frozen=True)
class AppliesTo:
    """The runs that a check is meant for; an empty field asks for nothing.

    ``hosts`` and ``testbeds``: the run's is one of them. ``tests``, ``variants`` and
    ``series``: the run has at least one of them.
    """

    hosts: tuple[str, ...] = ()
    testbeds: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    series: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """One call in an expression: a function over the rows of a name that the selectors match."""

    function: str
    name: str
    selectors: tuple[tuple[str, str | None], ...]

    def selector(self, key: str) -> str | None:
        """The value asked for, None where the key is free (or has to be absent)."""
        return dict(self.selectors).get(key)


@dataclass(frozen=True)
class Check:
    """One check, ready to be judged; ``selections`` are the calls in its expression."""

    name: str
    expression: str
    expected: str
    why: str
    selections: tuple[Selection, ...]
    applies_to: AppliesTo = AppliesTo()

    @property
    def needs(self) -> frozenset[str]:
        """The names of the measurements that the expression uses."""
        return frozenset(selection.name for selection in self.selections)


@dataclass(frozen=True)
class Plan:
    """What a run set out to measure, so that what is not there can be told from what failed.

    ``tests`` and ``variants`` are those selected; ``names`` are the measurements to be made
    for each variant; ``testbed`` is None on a server.
    """

    tests: tuple[str, ...]
    variants: tuple[Variant, ...]
    names: Mapping[Variant, frozenset[str]]
    host: str = "testbed"
    testbed: str | None = None
    series: tuple[str, ...] = ()


def plan_all(
    tests: Sequence[str],
    variants: Sequence[Variant],
    *,
    host: str = "testbed",
    testbed: str | None = None,
    series: Sequence[str] = (),
) -> Plan:
    """The plan to measure, for every variant, all that the catalogue has for these tests.

    But for what is measured only where an inventory asks for it.
    """
    names = frozenset(
        entry.name for entry in CATALOGUE.values() if entry.test in tests and not entry.asked
    )
    return Plan(
        tests=tuple(tests),
        variants=tuple(variants),
        names=planned(names, variants),
        host=host,
        testbed=testbed,
        series=tuple(series),
    )


# --- loading ---------------------------------------------------------------------------------


def load_checks(paths: Path | Iterable[Path] = DEFAULT_CHECKS) -> tuple[Check, ...]:
    """The checks of one file, or of several.

    A check of a later file replaces the one of the same name in an earlier file, so a user's
    file adds to the default's and overrides it. Raises UsageError with the file and the
    check for a file that cannot be read, YAML or a schema that does not hold, a name twice
    in one file, and an expression that could not be judged (syntax, unknown function,
    measurement or variant; the hint has the nearest known name).
    """
    checks: dict[str, Check] = {}
    for path in (paths,) if isinstance(paths, Path) else paths:
        checks.update({check.name: check for check in _load_file(path)})
    return tuple(checks.values())


def _load_file(path: Path) -> list[Check]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"the checks file {path} cannot be read: {reason}", hint="give a file to --checks"
        ) from None
    try:
        document = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{path}: not YAML: {_yaml_problem(error)}",
            hint="quote values that hold ': ' or '#', or use a block ('>-')",
        ) from None
    if found := violation(document, load_schema("checks.schema.json")):
        raise UsageError(
            f"{path}: {_place(document, found)}: {found.message}",
            hint=found.hint or "harness/nearmetal/data/checks.yaml shows the format",
        )
    checks = [_parse_check(path, entry) for entry in document["checks"]]
    seen: set[str] = set()
    for check in checks:
        if check.name in seen:
            raise UsageError(
                f"{path}: two checks are named '{check.name}'", hint="give one of them another name"
            )
        seen.add(check.name)
    return checks


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _place(document: object, found: Violation) -> str:
    """Where a schema is broken, by the check's name where it has one."""
    match found.path:
        case ("checks", int(index), *rest) if isinstance(document, dict):
            entry = document["checks"][index]
            name = entry.get("name") if isinstance(entry, dict) else None
            place = f"check '{name}'" if isinstance(name, str) else f"check number {index + 1}"
            return f"{place}, {'.'.join(map(str, rest))}" if rest else place
    return found.where


def _parse_check(path: Path, entry: Mapping[str, Any]) -> Check:
    place = f"{path}: check '{entry['name']}'"
    condition = {key: tuple(names) for key, names in entry.get("applies_to", {}).items()}
    for key, known in (("variants", VARIANTS), ("tests", TESTS)):
        for name in condition.get(key, ()):
            if name not in known:
                raise UsageError(f"{place}: unknown {key[:-1]} '{name}'", hint=nearest(name, known))
    return Check(
        name=entry["name"],
        expression=" ".join(entry["expression"].split()),
        expected=" ".join(entry["expected"].split()),
        why=" ".join(entry["why"].split()),
        selections=_Reader(place).read(entry["expression"]),
        applies_to=AppliesTo(**condition),
    )


_ALLOWED: tuple[type[ast.AST], ...] = (
    ast.Expression,
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.IfExp, ast.Constant, ast.Load),
)
"""What an expression may be made of, besides calls of FUNCTIONS."""


@dataclass(frozen=True)
class _Reader:
    """Reads an expression without evaluating it; every refusal is a UsageError."""

    place: str

    def read(self, expression: str) -> tuple[Selection, ...]:
        """The selections in an expression, in their order."""
        try:
            tree = ast.parse(" ".join(expression.split()), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = error.msg if isinstance(error, SyntaxError) else str(error)
            keyword = "pass=" in expression.replace(" ", "")
            raise UsageError(
                f"{self.place}: the expression does not parse: {problem}",
                hint="write pass_=\"second\" for the context key 'pass'"
                if keyword
                else 'an example: median("lspci.exits", variant="vanilla") > 0',
            ) from None
        found: list[Selection] = []
        self._walk(tree, found)
        if not found:
            raise UsageError(
                f"{self.place}: the expression uses no measurement, so its verdict is fixed",
                hint=f"use one of {', '.join((*_ONE_ROW, *_ROWS))} on a measurement's name",
            )
        return tuple(dict.fromkeys(found))

    def _walk(self, node: ast.AST, found: list[Selection]) -> None:
        if isinstance(node, ast.Call):
            self._call(node, found)
            return
        if isinstance(node, ast.Name):
            raise UsageError(
                f"{self.place}: '{node.id}' stands for nothing in an expression",
                hint='write a measurement as in median("lspci.exits", variant="vanilla")',
            )
        if not isinstance(node, _ALLOWED):
            raise UsageError(
                f"{self.place}: an expression may not hold a Python {type(node).__name__}",
                hint="use comparisons, and, or, not, arithmetic, and the functions "
                + ", ".join(FUNCTIONS),
            )
        if isinstance(node, ast.Constant) and not _is_number(node.value):
            raise UsageError(
                f"{self.place}: {node.value!r} is not a finite number",
                hint="texts stand only in calls: a measurement's name, and selectors",
            )
        for child in ast.iter_child_nodes(node):
            self._walk(child, found)

    def _call(self, node: ast.Call, found: list[Selection]) -> None:
        function = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if function not in FUNCTIONS:
            raise UsageError(
                f"{self.place}: unknown function '{function}'", hint=nearest(function, FUNCTIONS)
            )
        if function in _PURE:
            if len(node.args) != 1 or node.keywords:
                raise UsageError(f"{self.place}: {function} takes one number", hint="abs(a - b)")
            self._walk(node.args[0], found)
            return
        match node.args:
            case [ast.Constant(value=str(name))]:
                pass
            case _:
                raise UsageError(
                    f"{self.place}: {function} takes one measurement's name, in quotes",
                    hint=f'as in {function}("lspci.exits", variant="vanilla")',
                )
        if name not in CATALOGUE:
            raise UsageError(
                f"{self.place}: unknown measurement '{name}'", hint=nearest(name, list(CATALOGUE))
            )
        selectors = [self._selector(function, keyword) for keyword in node.keywords]
        keys = [key for key, _ in selectors]
        if len(set(keys)) < len(keys):
            raise UsageError(
                f"{self.place}: {function} has a selector twice", hint="leave one of them out"
            )
        found.append(Selection(function, name, tuple(sorted(selectors))))

    def _selector(self, function: str, keyword: ast.keyword) -> tuple[str, str | None]:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            raise UsageError(
                f"{self.place}: a selector of {function} is not a text in quotes",
                hint='as in path="cf8", or setup=None for the rows without one',
            )
        key, value = _context_key(keyword.arg), keyword.value.value
        if value is None and key != "variant":
            return key, None
        if not isinstance(value, str):
            raise UsageError(
                f"{self.place}: the selector {key}={value!r} is not a text in quotes",
                hint='as in variant="vanilla"',
            )
        if key == "variant" and value not in VARIANTS:
            raise UsageError(
                f"{self.place}: unknown variant '{value}'", hint=nearest(value, VARIANTS)
            )
        return key, value


def _context_key(keyword: str) -> str:
    """The context key that a keyword stands for: ``pass_`` for ``pass``."""
    return keyword.removesuffix("_")


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value)


# --- judging ---------------------------------------------------------------------------------


class _Unjudged(Exception):
    """A check that gets no pass or fail: ``status`` and ``reason`` instead."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class _Run:
    """All that the run gave, and the look-ups in it."""

    plan: Plan
    measurements: Sequence[Measurement]
    missing: Sequence[Missing]
    skipped: Sequence[Skipped]

    def unselected(self, selection: Selection) -> str | None:
        """Why the run was not to measure this at all, or None."""
        plan = self.plan
        variant, series = selection.selector("variant"), selection.selector("series")
        testbed = selection.selector("testbed")
        test = CATALOGUE[selection.name].test
        if self.rows(selection):
            return None
        if test not in plan.tests:
            return f"the test '{test}' is not part of this run (it has: {_list(plan.tests)})"
        if variant is not None and variant not in plan.variants:
            return (
                f"the variant '{variant}' is not part of this run (it has: {_list(plan.variants)})"
            )
        if series is not None and series not in plan.series:
            return f"the series '{series}' is not part of this run (it has: {_list(plan.series)})"
        if testbed is not None and testbed != plan.testbed:
            return f"this run's host is {plan.testbed or 'no testbed'}, not the testbed '{testbed}'"
        return None

    def rows(self, selection: Selection) -> list[Measurement]:
        """The rows that the selectors match."""
        return [
            row
            for row in self.measurements
            if row.name == selection.name
            and all(_key(row, key) == value for key, value in selection.selectors)
        ]

    def missing_reason(self, selection: Selection) -> str | None:
        """Why the run failed to measure something of this selection, or None."""
        for entry in self.missing:
            if _concerns(entry, selection):
                return f"{selection.name} was not measured: {first_line(entry.reason)}"
        return None

    def absent(self, selection: Selection) -> _Unjudged:
        """What to say of a selection that no row matches although the run has its test."""
        if reason := self.missing_reason(selection):
            return _Unjudged("error", reason)
        for entry in self.skipped:
            if _concerns(entry, selection):
                return _Unjudged("skip", first_line(entry.reason))
        name = selection.name
        others = [row for row in self.measurements if row.name == name]
        if others:
            have = "; ".join(sorted({_label(row) for row in others}))
            return _Unjudged("error", f"no row of {_asked(selection)}; there are: {have}")
        variant = selection.selector("variant")
        planned = self.plan.names.items()
        if any(name in names for key, names in planned if variant in (None, key)):
            return _Unjudged("error", f"{name} was to be measured, and the run has no row of it")
        return _Unjudged("skip", f"{name} is not among what this run was to measure")

    def value(self, selection: Selection) -> float | int | tuple[float, ...]:
        """What a call in an expression gives; raises _Unjudged where it can give nothing."""
        rows = self.rows(selection)
        if not rows:
            raise self.absent(selection)
        if selection.function in _ONE_ROW and len(rows) > 1:
            raise _Unjudged("error", _ambiguous(selection, rows))
        if selection.function in _ROWS and (reason := self.missing_reason(selection)):
            raise _Unjudged("error", reason)
        values = tuple(value for row in rows for value in row.values)
        if not values:
            raise _Unjudged("error", f"{_asked(selection)} has no values")
        if not all(math.isfinite(value) for value in values):
            raise _Unjudged("error", f"{_asked(selection)} has a value that is no finite number")
        match selection.function:
            case "median":
                return statistics.median(values)
            case "values":
                return values
            case "spread":
                if len(values) < 2:
                    raise _Unjudged(
                        "error", f"{_asked(selection)} has one value, and a spread needs two"
                    )
                return max(values) - min(values)
            case "maximum":
                return max(values)
            case "minimum":
                return min(values)
            case _:
                return len(values)


def _concerns(entry: Missing | Skipped, selection: Selection) -> bool:
    """Whether something not measured is (part of) what a selection asks for."""
    names = entry.names or tuple(n for n, e in CATALOGUE.items() if e.test == entry.test)
    return selection.name in names and selection.selector("variant") in (None, entry.variant)


def _key(row: Measurement, key: str) -> str | None:
    """A row's value of a selector's key."""
    if key == "variant":
        return row.variant
    if key == "series":
        return row.series
    return row.context.get(key)


def _label(row: Measurement) -> str:
    words = (row.variant, *((row.series,) if row.series else ()))
    return ", ".join((*words, *(f"{key}={value}" for key, value in row.context.items())))


def _asked(selection: Selection) -> str:
    """A selection in short: ``lspci.exits[vanilla, cf8]``."""
    order = sorted(selection.selectors, key=lambda item: _rank(item[0]))
    words = [value if value is not None else f"no {key}" for key, value in order]
    return f"{selection.name}[{', '.join(words)}]" if words else selection.name


def _rank(key: str) -> int:
    """The place of a selector in a label: the widest first."""
    keys = ("variant", "series", "testbed", "setup", "path", "pass")
    return keys.index(key) if key in keys else len(keys)


def _ambiguous(selection: Selection, rows: Sequence[Measurement]) -> str:
    keys = ("variant", "series", *dict.fromkeys(key for row in rows for key in row.context))
    apart = []
    for key in keys:
        values = list(dict.fromkeys(_key(row, key) for row in rows))
        if len(values) > 1:
            apart.append(f"{key} ({', '.join('None' if v is None else v for v in values)})")
    tell = f"tell them apart by {', '.join(apart)}" if apart else "nothing tells them apart"
    return f"{len(rows)} rows are {_asked(selection)}: {tell}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _finite(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose result has to be finite (inf > 0 would pass)."""

    def checked(*operands: Any) -> Any:
        result = operation(*operands)
        if isinstance(result, float) and not math.isfinite(result):
            raise OverflowError("a result is not a finite number")
        return result

    return checked


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: _finite(operator.add),
    ast.Sub: _finite(operator.sub),
    ast.Mult: _finite(operator.mul),
    ast.Div: _finite(operator.truediv),
    ast.FloorDiv: _finite(operator.floordiv),
    ast.Mod: _finite(operator.mod),
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def judge(
    checks: Iterable[Check],
    measurements: Sequence[Measurement],
    missing: Sequence[Missing],
    skipped: Sequence[Skipped],
    plan: Plan,
) -> tuple[CheckResult, ...]:
    """A verdict for each check, in order, then an error for all that was not measured.

    What should have been measured and was not fails the run by a result of its own, named
    ``measured:<test>:<variant>``, whether or not a check needs it. Never raises.
    """
    run = _Run(plan, measurements, missing, skipped)
    return (*(_judge_one(check, run) for check in checks), *_unmeasured(run))


def _judge_one(check: Check, run: _Run) -> CheckResult:
    def result(status: Status, observed: str, reason: str) -> CheckResult:
        return CheckResult(check.name, status, observed, check.expected, reason)

    if reason := _not_applicable(check.applies_to, run.plan):
        return result("skip", "", reason)
    for selection in check.selections:
        if reason := run.unselected(selection):
            return result("skip", "", reason)
    observed: list[str] = []
    refusals: list[_Unjudged] = []
    values: dict[Selection, Any] = {}
    for selection in check.selections:
        try:
            values[selection] = run.value(selection)
        except _Unjudged as refusal:
            refusals.append(refusal)
        else:
            observed.append(_observed(selection, values[selection]))
    if refusals:
        worst = next((r for r in refusals if r.status == "error"), refusals[0])
        return result(worst.status, "; ".join(observed), worst.reason)
    try:
        holds = _evaluate(check.expression, values)
    except (simpleeval.InvalidExpression, ArithmeticError, TypeError, ValueError) as error:
        reason = f"`{check.expression}` cannot be evaluated: {first_line(str(error))}"
        return result("error", "; ".join(observed), reason)
    if not isinstance(holds, bool):
        reason = f"`{check.expression}` is {holds!r}, and not true or false"
        return result("error", "; ".join(observed), reason)
    if holds:
        return result("pass", "; ".join(observed), check.why)
    return result("fail", "; ".join(observed), f"`{check.expression}` is false. {check.why}")


def _not_applicable(condition: AppliesTo, plan: Plan) -> str | None:
    """Why a check is not for this run, or None."""
    testbed = (plan.testbed,) if plan.testbed else ()
    for what, wanted, have in (
        ("host", condition.hosts, (plan.host,)),
        ("testbed", condition.testbeds, testbed),
        ("test", condition.tests, plan.tests),
        ("variant", condition.variants, plan.variants),
        ("series", condition.series, plan.series),
    ):
        if wanted and not set(wanted).intersection(have):
            return f"the check is for the {what} {_list(wanted)}; this run has {_list(have)}"
    return None


def _observed(selection: Selection, value: float | int | tuple[float, ...]) -> str:
    unit = "" if selection.function == "count" else f" {CATALOGUE[selection.name].unit}"
    text = ", ".join(map(number, value)) if isinstance(value, tuple) else number(value)
    return f"{selection.function} {_asked(selection)} = {text}{unit}"


def _evaluate(expression: str, values: Mapping[Selection, Any]) -> Any:
    def bind(function: str) -> Callable[..., Any]:
        def call(name: str, /, **selectors: str | None) -> Any:
            chosen = sorted((_context_key(key), value) for key, value in selectors.items())
            return values[Selection(function, name, tuple(chosen))]

        return call

    functions = {name: bind(name) for name in (*_ONE_ROW, *_ROWS)}
    evaluator = simpleeval.SimpleEval(
        operators=_OPERATORS, functions={**functions, **_PURE}, names={}
    )
    return evaluator.eval(expression)


def _unmeasured(run: _Run) -> list[CheckResult]:
    """An error for each test and variant of which something was not measured."""
    reasons: dict[tuple[str, str], list[str]] = {}
    wanted: dict[tuple[str, str], list[str]] = {}
    for entry in run.missing:
        key = (entry.test, entry.variant)
        reasons.setdefault(key, []).append(f"{entry.reason}\n{entry.detail}".strip())
        wanted.setdefault(key, []).extend(entry.names)
    for variant, names in run.plan.names.items():
        for name in sorted(names):
            selection = Selection("count", name, (("variant", variant),))
            declared = any(_concerns(entry, selection) for entry in run.missing) or any(
                _concerns(entry, selection) for entry in run.skipped
            )
            if not declared and not run.rows(selection):
                key = (CATALOGUE[name].test, variant)
                reasons.setdefault(key, []).append(f"{name} has no row, and nothing says why")
                wanted.setdefault(key, []).append(name)
    return [
        CheckResult(
            name=f"measured:{test}:{variant}",
            status="error",
            observed="",
            expected=f"measured: {_list(dict.fromkeys(wanted[test, variant]))}",
            reason="\n".join(dict.fromkeys(reasons[test, variant])),
        )
        for test, variant in reasons
    ]


def together(parts: Mapping[str, Sequence[CheckResult]]) -> tuple[CheckResult, ...]:
    """The verdicts of several parts of one run in one list, by the names of the parts.

    A verdict of the second part and those behind it has the part's name beside the check's,
    and a part that skips a check is not heard where another has judged it.
    """
    judged = {one.name for part in parts.values() for one in part if one.status != "skip"}
    found: dict[str, CheckResult] = {}
    for number_, (name, part) in enumerate(parts.items()):
        for one in part:
            if one.status != "skip":
                label = f"{one.name} ({name})" if number_ else one.name
                found[label] = replace(one, name=label)
            elif one.name not in judged:
                found.setdefault(one.name, one)
    return tuple(found.values())


def exit_status(results: Iterable[CheckResult]) -> Exit:
    """FAILED if a check failed or something could not be judged, else OK."""
    bad = any(result.status in ("fail", "error") for result in results)
    return Exit.FAILED if bad else Exit.OK
