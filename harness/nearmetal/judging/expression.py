# SPDX-License-Identifier: GPL-2.0-or-later
"""Expressions of checks: what they may be made of, and what they select and give.

They are Python's syntax of comparisons and arithmetic, walked here and never given to Python.

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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import UsageError
from ..core.model import SUBJECT_KEYS, VARIANTS
from ..core.text import nearest
from ..machines.emulators import EMULATORS
from ..measure import registry

ONE_ROW = ("median", "values", "spread")
ROWS = ("maximum", "minimum", "count")
_PURE: dict[str, Callable[..., Any]] = {"abs": abs}
FUNCTIONS: tuple[str, ...] = (*ONE_ROW, *ROWS, *_PURE)


@dataclass(frozen=True)
class Selection:
    """One call in an expression: a function over the rows of a name that the selectors match."""

    function: str
    name: str
    selectors: tuple[tuple[str, str | None], ...]

    def selector(self, key: str) -> str | None:
        """The value asked for, None where the key is free (or has to be absent)."""
        return dict(self.selectors).get(key)


_ALLOWED: tuple[type[ast.AST], ...] = (
    ast.Expression,
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.IfExp, ast.Constant, ast.Load),
)
"""What an expression may be made of, besides calls of FUNCTIONS."""


@dataclass(frozen=True)
class Reader:
    """Reads an expression without evaluating it; every refusal is a UsageError."""

    place: str
    series: Collection[str] | None = None
    """The series that there are; None: any."""

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
                f"{self.place}: the expression uses no measurement, so its result never changes",
                hint=f"use one of {', '.join((*ONE_ROW, *ROWS))} on a measurement's name",
            )
        return tuple(dict.fromkeys(found))

    def rows(self, name: str, selectors: Mapping[str, str | None]) -> None:
        """Refuse a metric that nothing measures, and selectors that none of its rows can have."""
        if name not in registry.metrics():
            raise UsageError(
                f"{self.place}: unknown measurement '{name}'",
                hint=nearest(name, registry.metrics()),
            )
        for key, value in selectors.items():
            self._known_key(name, key)
            if value is not None:
                self._known_value(name, key, value)

    def _walk(self, node: ast.AST, found: list[Selection]) -> None:
        if isinstance(node, ast.Call):
            self._call(node, found)
            return
        if isinstance(node, ast.Name):
            raise UsageError(
                f"{self.place}: unknown name '{node.id}' in an expression",
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
                hint="text is allowed only in calls, as a measurement's name or a selector",
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
        if name not in registry.metrics():
            raise UsageError(
                f"{self.place}: unknown measurement '{name}'",
                hint=nearest(name, registry.metrics()),
            )
        selectors = [self._selector(function, name, keyword) for keyword in node.keywords]
        keys = [key for key, _ in selectors]
        if len(set(keys)) < len(keys):
            raise UsageError(
                f"{self.place}: {function} has a selector twice", hint="leave one of them out"
            )
        found.append(Selection(function, name, tuple(sorted(selectors))))

    def _selector(self, function: str, name: str, keyword: ast.keyword) -> tuple[str, str | None]:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            raise UsageError(
                f"{self.place}: a selector of {function} is not a text in quotes",
                hint='as in path="cf8", or setup=None for the rows without one',
            )
        key, value = _context_key(keyword.arg), keyword.value.value
        self._known_key(name, key)
        if value is None and key != "variant":
            return key, None
        if not isinstance(value, str):
            raise UsageError(
                f"{self.place}: the selector {key}={value!r} is not a text in quotes",
                hint='as in variant="vanilla"',
            )
        self._known_value(name, key, value)
        return key, value

    def _known_key(self, name: str, key: str) -> None:
        keys = registry.metrics()[name].keys
        if key not in SUBJECT_KEYS and key not in keys and "*" not in keys:
            raise UsageError(
                f"{self.place}: {name} has no context key '{key}'",
                hint=nearest(key, (*SUBJECT_KEYS, *keys)),
            )

    def _known_value(self, name: str, key: str, value: str) -> None:
        """Refuse a value that no row of this measurement can have."""
        known: Collection[str] | str | None
        if key == "variant":
            known = VARIANTS
        elif key == "series":
            known = self.series
        elif key == "testbed":
            known = tuple(EMULATORS)
        elif key == "setup":
            known = registry.setups_of(registry.test_of(name))
        else:
            metric = registry.metrics()[name]
            known = metric.keys.get(key)
            if metric.allows(key, value):
                return
        if known is None or (not isinstance(known, str) and value in known):
            return
        if isinstance(known, str):
            raise UsageError(
                f"{self.place}: {name} has no {key}='{value}'", hint=f"it must match {known}"
            )
        raise UsageError(f"{self.place}: unknown {key} '{value}'", hint=nearest(value, known))


def _context_key(keyword: str) -> str:
    """The context key that a keyword stands for: ``pass_`` for ``pass``."""
    return keyword.removesuffix("_")


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose result has to be finite (inf > 0 would pass)."""

    def checked(*operands: Any) -> Any:
        result = operation(*operands)
        if isinstance(result, float) and not math.isfinite(result):
            raise OverflowError("a result is not a finite number")
        return result

    return checked


_BINARY: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: _finite(operator.add),
    ast.Sub: _finite(operator.sub),
    ast.Mult: _finite(operator.mul),
    ast.Div: _finite(operator.truediv),
    ast.FloorDiv: _finite(operator.floordiv),
    ast.Mod: _finite(operator.mod),
}
_UNARY: dict[type[ast.AST], Callable[..., Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def evaluate(expression: str, values: Mapping[Selection, Any]) -> Any:
    """What an expression that ``Reader`` took gives, with a value for each of its selections.

    Raises ArithmeticError, TypeError or ValueError as Python's operators do.
    """
    return _evaluate(ast.parse(expression, mode="eval").body, values)


def _evaluate(node: ast.expr, values: Mapping[Selection, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_truth(_evaluate(part, values)) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_truth(_evaluate(part, values)) for part in parts)
        case ast.UnaryOp(op=sign, operand=operand):
            return _UNARY[type(sign)](_evaluate(operand, values))
        case ast.BinOp(left=left, op=sign, right=right):
            return _BINARY[type(sign)](_evaluate(left, values), _evaluate(right, values))
        case ast.IfExp(test=test, body=body, orelse=other):
            return _evaluate(body if _evaluate(test, values) else other, values)
        case ast.Compare(left=left, ops=signs, comparators=others):
            operands = [_evaluate(one, values) for one in (left, *others)]
            return all(
                _COMPARE[type(sign)](operands[index], operands[index + 1])
                for index, sign in enumerate(signs)
            )
        case ast.Call(func=ast.Name(id=function), args=[argument], keywords=words):
            if function in _PURE:
                return _PURE[function](_evaluate(argument, values))
            assert isinstance(argument, ast.Constant)
            chosen = sorted((_context_key(str(word.arg)), _text(word.value)) for word in words)
            return values[Selection(function, str(argument.value), tuple(chosen))]
    raise TypeError(f"{ast.unparse(node)} cannot be evaluated")


def _truth(value: Any) -> bool:
    """A part of and/or, which has to be true or false: a number there is a mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is an operand of and/or, and neither true nor false")
    return value


def _text(node: ast.expr) -> str | None:
    """The text or None that a selector asks for."""
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None
