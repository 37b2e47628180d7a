# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks are data: expressions in YAML over the measurements of one run.

``load_checks`` refuses every file that could not be judged: a typing error costs a second and not
a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import UsageError
from ..core.model import VARIANTS
from ..core.schema import StrictLoader, Violation, load_schema, violation
from ..core.text import nearest
from ..machines.emulators import EMULATORS
from ..measure import registry
from .expression import Reader, Selection


def default_checks() -> tuple[Path, ...]:
    """The files of checks that every run is held to unless the user replaces them."""
    return tuple(test.checks for test in registry.tests().values() if test.checks is not None)


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


def load_checks(
    paths: Path | Iterable[Path] | None = None, *, series: Collection[str] | None = None
) -> tuple[Check, ...]:
    """The checks of one file, or of several; those that come with the tests for None.

    A check of a later file replaces the one of the same name in an earlier file, so a user's
    file adds to the default's and overrides it. Raises UsageError with the file and the
    check for a file that cannot be read, YAML or a schema that does not hold, a name twice
    in one file, and an expression that could not be judged (syntax, unknown function,
    measurement, selector or value; the hint has the nearest known name). ``series`` are those that
    there are; None: any.
    """
    checks: dict[str, Check] = {}
    files = default_checks() if paths is None else paths
    for path in (files,) if isinstance(files, Path) else files:
        checks.update({check.name: check for check in _load_file(path, series)})
    return tuple(checks.values())


def _load_file(path: Path, series: Collection[str] | None) -> list[Check]:
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
            hint=found.hint or "harness/nearmetal/measure/lspci/checks.yaml shows the format",
        )
    checks = [_parse_check(path, entry, series) for entry in document["checks"]]
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


def _parse_check(path: Path, entry: Mapping[str, Any], series: Collection[str] | None) -> Check:
    place = f"{path}: check '{entry['name']}'"
    condition = {key: tuple(names) for key, names in entry.get("applies_to", {}).items()}
    for key, known in (
        ("variants", VARIANTS),
        ("tests", tuple(registry.tests())),
        ("testbeds", tuple(EMULATORS)),
        ("series", series),
    ):
        for name in condition.get(key, ()):
            if known is not None and name not in known:
                raise UsageError(
                    f"{place}: unknown {key if key == 'series' else key[:-1]} '{name}'",
                    hint=nearest(name, known),
                )
    return Check(
        name=entry["name"],
        expression=" ".join(entry["expression"].split()),
        expected=" ".join(entry["expected"].split()),
        why=" ".join(entry["why"].split()),
        selections=Reader(place, series).read(entry["expression"]),
        applies_to=AppliesTo(**condition),
    )
