# SPDX-License-Identifier: GPL-2.0-or-later
"""What patches/series.yaml says: the series, their order, and how each is switched on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import jsonschema
import yaml

from ..core.errors import UsageError
from ..core.model import Feature, Headline
from ..core.schema import StrictLoader
from ..core.text import nearest
from . import requires as needs

TreeName = Literal["linux", "qemu", "testbed-qemu", "testbed-bochs"]
GuestKernel = Literal["vanilla", "patched"]

TREES: tuple[TreeName, ...] = get_args(TreeName)

_FOLDERS: Mapping[TreeName, str] = MappingProxyType(
    {"linux": "linux", "qemu": "qemu", "testbed-qemu": "testbed", "testbed-bochs": "testbed"}
)

_NAME = {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"}
_SCALAR = {"type": ["string", "number", "boolean"]}
_SETTINGS = {"type": "object", "additionalProperties": _SCALAR}

_ENABLE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "modules": {"type": "object", "additionalProperties": _SETTINGS},
        "qemu": {
            "oneOf": [
                {
                    **_SETTINGS,
                    "propertyNames": {"pattern": r"^[^.=,\s]+\.[^.=,\s]+$"},
                },
                {"type": "array", "items": {"type": "string"}},
            ]
        },
        "accel": {
            "type": "object",
            "additionalProperties": _SETTINGS,
            "propertyNames": {"enum": ["kvm_amd", "kvm_intel"]},
        },
        "guest_kernel": {"enum": list(get_args(GuestKernel))},
        "functions": {
            "type": "object",
            "additionalProperties": {"type": "string", "minLength": 1},
            "propertyNames": _NAME,
        },
        "setups": {
            "type": "array",
            "items": _NAME,
            "minItems": 1,
            "uniqueItems": True,
        },
    },
}
_SELECTORS = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
_HEADLINE = {
    "type": "object",
    "required": ["metric", "label"],
    "additionalProperties": False,
    "properties": {
        "metric": {"type": "string", "minLength": 1},
        "label": {"type": "string", "minLength": 1},
        "rows": _SELECTORS,
        "before": _SELECTORS,
        "after": _SELECTORS,
    },
}
_PART = {
    "order": {"type": "integer", "minimum": 1},
    "base": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+$"},
    "purpose": {"type": "string", "minLength": 1},
    "requires": {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"oneOf": [{"type": "integer", "minimum": 1}, {"const": "all"}]},
    },
}
"""What is said of a series, that is, of the part of a feature for one tree."""
_FEATURE = {
    "name": _NAME,
    "about": {"type": "string", "minLength": 1},
    "headlines": {"type": "array", "items": _HEADLINE, "maxItems": 3},
    "checks": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "tests": {"type": "array", "items": _NAME, "uniqueItems": True},
    "draft": {"type": "boolean"},
    "enable": _ENABLE,
    "together": {
        "type": "object",
        "propertyNames": _NAME,
        "additionalProperties": {"type": "array", "items": _NAME, "minItems": 1},
    },
}
_NEEDED = ["order", "base", "purpose"]
_OF_PARTS = {
    "required": ["name", "parts"],
    "additionalProperties": False,
    "properties": {
        **_FEATURE,
        "parts": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": {
                tree: {
                    "type": "object",
                    "required": _NEEDED,
                    "additionalProperties": False,
                    "properties": _PART,
                }
                for tree in TREES
            },
        },
    },
}
_OF_ONE = {
    "required": ["name", "tree", *_NEEDED],
    "additionalProperties": False,
    "properties": {**_FEATURE, **_PART, "tree": {"enum": list(TREES)}},
}
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["series"],
    "additionalProperties": False,
    "properties": {
        "series": {
            "type": "array",
            "items": {
                "type": "object",
                "if": {"required": ["parts"]},
                "then": _OF_PARTS,
                "else": _OF_ONE,
            },
        }
    },
}
"""The JSON schema of series.yaml."""

_NO_MODULES: Mapping[str, Mapping[str, str]] = MappingProxyType({})
_NO_PROPERTIES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Enable:
    """What the ``on`` variant sets for one series.

    ``modules`` are parameters by module of the host kernel; ``qemu_properties`` are
    ``device.property`` settings and ``qemu_args`` further words of the QEMU inside the
    host (one of both is empty). ``accel`` are properties of QEMU's accelerator by KVM's module,
    for what only the CPUs of one maker can do. ``functions`` are drivers by functions of the host
    that the guest gets. With ``setups`` its tests measure the variant in these.
    """

    modules: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: _NO_MODULES)
    qemu_properties: Mapping[str, str] = field(default_factory=lambda: _NO_PROPERTIES)
    qemu_args: tuple[str, ...] = ()
    accel: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: _NO_MODULES)
    guest_kernel: GuestKernel = "vanilla"
    functions: Mapping[str, str] = field(default_factory=lambda: _NO_PROPERTIES)
    setups: tuple[str, ...] = ()

    def qemu_arguments(self) -> tuple[str, ...]:
        """The words to add to QEMU's command line (properties become ``-global``)."""
        words = list(self.qemu_args)
        for name, value in self.qemu_properties.items():
            words += ["-global", f"{name}={value}"]
        return tuple(words)


@dataclass(frozen=True)
class Series:
    """An ordered set of patches with a cover letter, sent to one upstream.

    ``base`` is the version range it is made for ("7.3" means 7.3.y); ``checks`` are the
    names of the checks that prove it; ``folder`` holds cover.txt and the patches.
    """

    name: str
    tree: TreeName
    order: int
    base: str
    purpose: str
    checks: tuple[str, ...]
    enable: Enable
    folder: Path
    tests: tuple[str, ...] = ()
    """The tests that its variant ``on`` runs; none means all."""
    draft: bool = False
    """Kept as commits and validated, but not yet built into anything that is run."""
    about: str = ""
    """What a user has of the feature; empty: its purpose says it."""
    headlines: tuple[Headline, ...] = ()
    """The figures that a report shows first of the feature."""
    requires: Mapping[str, needs.Wanted] = field(default_factory=lambda: MappingProxyType({}))
    """The series of its tree whose first patches it needs below it, and how many of them."""

    together: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """The series that it is also measured together with, and by which tests."""

    @property
    def label(self) -> str:
        """Its name and its upstream's: the parts of one feature share a name."""
        return f"{_FOLDERS[self.tree]}/{self.name}"

    @property
    def is_product(self) -> bool:
        """Whether users get it; the others only teach an emulator to behave like hardware."""
        return not self.is_testbed

    @property
    def is_testbed(self) -> bool:
        """Whether it is for an emulator of the testbed and for nothing else."""
        return self.tree.startswith("testbed-")

    def patches(self) -> tuple[Path, ...]:
        """Its patch files in the order in which they apply."""
        return patch_files(self.folder)

    @property
    def cover(self) -> Path:
        """The file of its cover letter."""
        return self.folder / "cover.txt"


def patch_files(folder: Path) -> tuple[Path, ...]:
    """The patches of a folder in order; a cover letter made for sending is none of them."""
    found = sorted(folder.glob("*.patch"))
    return tuple(path for path in found if not path.name.startswith("0000-"))


SERIES_OPTIONS = "kernel.config"
"""Options of a kernel with the series, in the folder of its patches; a kernel without has none."""


def series_options(patches: Sequence[Path]) -> tuple[Path, ...]:
    """The fragments of the kernel's configuration that lie beside patches (``SERIES_OPTIONS``)."""
    folders = dict.fromkeys(path.parent for path in patches)
    return tuple(one for folder in folders if (one := folder / SERIES_OPTIONS).is_file())


def series_folder(patches: Path, tree: TreeName, name: str) -> Path:
    """Where the patches of a series lie below patches/."""
    return patches / _FOLDERS[tree] / name


@dataclass(frozen=True)
class Known:
    """The names that series.yaml may use of tests, of their set-ups and of functions of hosts."""

    tests: tuple[str, ...]
    functions: tuple[str, ...]
    setups: Callable[[tuple[str, ...]], tuple[str, ...]]
    """The set-ups that a series with these tests may name."""
    checks: tuple[str, ...] | None = None
    """None: not looked at."""
    rows: Callable[[str, str, Mapping[str, str | None]], None] | None = None
    """Refuses a place's metric and selectors that no row can have; None: not looked at."""


def load_series(patches: Path, *, known: Known | None = None) -> tuple[Series, ...]:
    """All series of ``patches``/series.yaml, by tree and then in the order of application.

    With ``known``, names of tests, set-ups, functions and checks must be among them. Raises
    UsageError, one line with the place in the file, for anything that the file gets wrong.
    """
    path = patches / "series.yaml"
    document = _read(path)
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(document))
    # A key written wrong is both unknown and missing: say which one was written.
    unknown = [error for error in errors if error.validator == "additionalProperties"]
    error = unknown[0] if unknown else jsonschema.exceptions.best_match(errors)
    if error is not None:
        raise _schema_error(path, document, error)
    found = [_series(part, patches) for one in document["series"] for part in _parts(one)]
    _check_places(path, found)
    if known is not None:
        check_names(path, found, known)
    needs.check(path, found)
    return tuple(sorted(found, key=lambda one: (TREES.index(one.tree), one.order)))


def _check_places(path: Path, found: Sequence[Series]) -> None:
    """Refuse two series of one tree with one name or one place."""
    names: set[tuple[TreeName, str]] = set()
    places: dict[tuple[TreeName, int], str] = {}
    for series in found:
        if (series.tree, series.name) in names:
            raise UsageError(
                f"{path}: two series of the tree {series.tree} are named '{series.name}'",
                hint="give one another name",
            )
        names.add((series.tree, series.name))
        other = places.setdefault((series.tree, series.order), series.name)
        if other != series.name:
            raise UsageError(
                f"{path}: {other} and {series.name} have the same order {series.order}"
                f" in the tree {series.tree}",
                hint="give each series of a tree its own place",
            )


def check_names(path: Path, found: Sequence[Series], known: Known) -> None:
    """Refuse names of tests, set-ups, functions and checks that there are not.

    A set-up must be one of a test that its feature's parts name together.
    """
    tests = {
        one.name: tuple(test for part in found if part.name == one.name for test in part.tests)
        for one in found
    }
    for series in found:
        for what, names, there in (
            ("test", series.tests, known.tests),
            ("function of a host", tuple(series.enable.functions), known.functions),
            ("check", series.checks, known.checks),
        ):
            for name in names:
                if there is not None and name not in there:
                    raise UsageError(
                        f"{path}: {series.name}: there is no {what} '{name}'",
                        hint=nearest(name, there),
                    )
        for other, names in series.together.items():
            if other not in tests:
                raise UsageError(
                    f"{path}: {series.name}: together: there is no series '{other}'",
                    hint=nearest(other, tests),
                )
            for name in names:
                if name not in known.tests:
                    raise UsageError(
                        f"{path}: {series.name}: together: there is no test '{name}'",
                        hint=nearest(name, known.tests),
                    )
        for headline in series.headlines:
            for side in (headline.before, headline.after):
                if known.rows is not None:
                    place = f"{path}: {series.name}: headline {headline.metric}"
                    known.rows(place, headline.metric, {**headline.rows, **side})
        setups = known.setups(tests[series.name])
        for name in series.enable.setups:
            if name not in setups:
                raise UsageError(
                    f"{path}: {series.name}: none of its tests has a set-up '{name}'",
                    hint=nearest(name, setups)
                    if setups
                    else "name the test in tests: whose set-up it is",
                )


def of_tree(series: Sequence[Series], tree: TreeName) -> tuple[Series, ...]:
    """The series of one tree in order."""
    return tuple(sorted((one for one in series if one.tree == tree), key=lambda one: one.order))


def find_series(series: Sequence[Series], name: str) -> Series:
    """The series of that name; raises UsageError with the nearest name."""
    for one in series:
        if one.name == name:
            return one
    hint = nearest(name, [one.name for one in series]) if series else "series.yaml lists none yet"
    raise UsageError(f"there is no series '{name}'", hint=hint)


def features(series: Sequence[Series]) -> tuple[Feature, ...]:
    """What a report says of each feature that users get and that can be switched on."""
    found: dict[str, Feature] = {}
    for one in series:
        if one.is_product and not one.draft and one.name not in found:
            found[one.name] = Feature(one.name, one.about or one.purpose, one.headlines, one.checks)
    return tuple(found.values())


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist", hint="name the folder that holds series.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise UsageError(
            f"{path}:{line}: {error.problem}", hint="the file's head explains each key"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from None


def _schema_error(path: Path, document: Any, error: jsonschema.ValidationError) -> UsageError:
    where = _place(document, list(error.absolute_path))
    instance: Any = error.instance
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    if error.validator == "additionalProperties":
        known = sorted(schema.get("properties", {}))
        unknown = next((str(key) for key in instance if key not in known), "")
        return UsageError(f"{path}: {where}unknown key '{unknown}'", hint=nearest(unknown, known))
    if error.validator == "required":
        missing = next(key for key in schema.get("required", ()) if key not in instance)
        return UsageError(f"{path}: {where}the key '{missing}' is missing", hint="add it")
    if error.validator == "enum":
        known = [str(value) for value in schema.get("enum", ())]
        return UsageError(
            f"{path}: {where}'{instance}' is not known", hint=nearest(str(instance), known)
        )
    if list(error.absolute_path)[-1:] == ["base"]:
        return UsageError(
            f"{path}: {where}'{instance}' is not a base version",
            hint='write major.minor in quotes, such as base: "7.3"',
        )
    if "requires" in list(error.absolute_path)[-2:]:
        return UsageError(
            f"{path}: {where}{instance!r} is not a number of patches",
            hint="write requires: {series: N}, its first N patches, or {series: all}",
        )
    if list(error.absolute_path)[-1:] == ["qemu"]:
        return UsageError(
            f"{path}: {where}neither device.property settings nor a list of arguments",
            hint="write {device.property: value} or [-option, value]",
        )
    return UsageError(
        f"{path}: {where}{error.message.splitlines()[0]}", hint="the file's head explains each key"
    )


def _place(document: Any, path: list[str | int]) -> str:
    """The path of an error in words, the entry by its name where it has one."""
    words: list[str] = []
    if len(path) >= 2 and path[0] == "series":
        entry = document["series"][path[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        words.append(str(name) if name else f"entry {int(path[1]) + 1}")
        path = path[2:]
    words += [str(part) for part in path]
    return "".join(f"{word}: " for word in words)


def _parts(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """An entry for each part of a feature; what it switches on stands in the first alone."""
    if "parts" not in entry:
        return [entry]
    whole = {key: value for key, value in entry.items() if key != "parts"}
    found = [{**whole, **part, "tree": tree} for tree, part in entry["parts"].items()]
    for part in found[1:]:
        part.pop("enable", None)
        part.pop("together", None)
    return found


def _series(entry: Mapping[str, Any], patches: Path) -> Series:
    enable = entry.get("enable", {})
    qemu = enable.get("qemu", {})
    return Series(
        name=entry["name"],
        tree=entry["tree"],
        order=entry["order"],
        base=entry["base"],
        purpose=" ".join(entry["purpose"].split()),
        checks=tuple(entry.get("checks", ())),
        enable=Enable(
            modules=_by_module(enable.get("modules", {}), "Y", "N"),
            accel=_by_module(enable.get("accel", {}), "on", "off"),
            qemu_properties=MappingProxyType(
                {key: _word(value, "on", "off") for key, value in qemu.items()}
                if isinstance(qemu, dict)
                else {}
            ),
            qemu_args=tuple(qemu) if isinstance(qemu, list) else (),
            guest_kernel=enable.get("guest_kernel", "vanilla"),
            functions=MappingProxyType(dict(enable.get("functions", {}))),
            setups=tuple(enable.get("setups", ())),
        ),
        folder=series_folder(patches, entry["tree"], entry["name"]),
        tests=tuple(entry.get("tests", ())),
        draft=entry.get("draft", False),
        about=" ".join(entry.get("about", "").split()),
        headlines=tuple(
            Headline(
                metric=one["metric"],
                label=" ".join(one["label"].split()),
                rows=MappingProxyType(dict(one.get("rows", {}))),
                before=MappingProxyType(dict(one.get("before", {}))),
                after=MappingProxyType(dict(one.get("after", {}))),
            )
            for one in entry.get("headlines", ())
        ),
        requires=MappingProxyType(dict(entry.get("requires", {}))),
        together=MappingProxyType(
            {name: tuple(tests) for name, tests in entry.get("together", {}).items()}
        ),
    )


def _by_module(
    settings: Mapping[str, Mapping[str, Any]], yes: str, no: str
) -> Mapping[str, Mapping[str, str]]:
    return MappingProxyType(
        {
            module: MappingProxyType({key: _word(value, yes, no) for key, value in values.items()})
            for module, values in settings.items()
        }
    )


def _word(value: str | int | float | bool, yes: str, no: str) -> str:
    """A YAML scalar as a command line wants it (YAML reads ``on`` as true)."""
    if isinstance(value, bool):
        return yes if value else no
    return str(value)
