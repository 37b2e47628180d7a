# SPDX-License-Identifier: GPL-2.0-or-later
"""The form of a series: interfaces come with their documentation and tests, covers are whole.

What is looked for are names in the lines that a series adds. Whether a text explains an
interface, and a test tests it, is for readers to judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import covers
from .validate import Candidate, Finding, Section, sections

UAPI = re.compile(r"^(?:arch/[^/]+/)?include/uapi/")
_LINUX_TEST = re.compile(r"^tools/testing/(?:selftests|kunit)/|kunit|_test\.c$|(?:^|/)tests?/")
_LINUX_DOCUMENTATION = re.compile(r"^Documentation/")
_QEMU_TEST = re.compile(r"^tests/")
_QEMU_DOCUMENTATION = re.compile(r"^(?:docs/|qapi/|qemu-options\.hx$)")
_NO_INTERFACE = re.compile(r"^(?:tools|samples|scripts|tests|docs|Documentation|linux-headers)/")


@dataclass(frozen=True)
class Interface:
    """Something that a series lets users set or call: ``what`` it is, its name, its patch.

    With ``tested_by_name`` a test must use the name; otherwise the series must have a test.
    """

    what: str
    name: str
    patch: str
    tested_by_name: bool = False


_NUMBERS = (
    ("ioctl", re.compile(r"(?m)^#\s*define\s+(\w+)\s+_IO(?:R|W|WR)?\(")),
    ("KVM capability", re.compile(r"(?m)^#\s*define\s+(KVM_CAP_\w+)\s+\d+")),
    ("exit reason", re.compile(r"(?m)^#\s*define\s+(KVM_EXIT_\w+)\s+\d+\s*(?:/\*|$)")),
    ("KVM device", re.compile(r"(?m)^\s*(KVM_DEV_TYPE_(?!MAX\b)\w+)\s*[,=]")),
    ("VFIO feature", re.compile(r"(?m)^#\s*define\s+(VFIO_DEVICE_FEATURE_\w+)\s+\d+\s*(?:/\*|$)")),
)
_PARAMETERS = (
    ("module parameter", re.compile(r"\bmodule_param(?:_\w+)?\s*\(\s*(\w+)")),
    ("kernel parameter", re.compile(r'\b(?:early_param|__setup)\s*\(\s*"([\w.-]+)')),
)
_WORD = r'("[\w-]+"|[A-Z][A-Z0-9_]+)\s*,'
_PROPERTIES = (
    re.compile(rf"\bDEFINE_PROP\w*\(\s*{_WORD}"),
    re.compile(rf'\bobject_(?:class_)?property_add\w*\(\s*[^,;"]+,\s*{_WORD}'),
)
_STRING = re.compile(r'(?m)^#\s*define\s+(\w+)\s+("[\w-]+")')


_Offers = Iterator[tuple[str, str, bool]]


def linux_interfaces(section: Section, strings: Mapping[str, str]) -> _Offers:
    """What a patch offers in one file of Linux: what it is, its name, if tests must use that."""
    path, old, new = section.touched.path, section.old(), section.new()
    if UAPI.match(path):
        for what, pattern in _NUMBERS:
            yield from ((what, name, True) for name in _added(pattern, old, new))
    elif not _NO_INTERFACE.match(path) and not _LINUX_TEST.search(path) and path.endswith(".c"):
        for what, pattern in _PARAMETERS:
            yield from ((what, name, False) for name in _added(pattern, old, new))


def qemu_interfaces(section: Section, strings: Mapping[str, str]) -> _Offers:
    """The same of QEMU: properties, but for those that a name with ``x-`` keeps from users.

    ``strings`` are the values of macros that may stand for a name.
    """
    if _NO_INTERFACE.match(section.touched.path):
        return
    for pattern in _PROPERTIES:
        for word in _added(pattern, section.old(), section.new()):
            name = (word if word.startswith('"') else strings.get(word, "")).strip('"')
            if name and not name.startswith("x-"):
                yield "property", name, False


def _added(pattern: re.Pattern[str], old: str, new: str) -> list[str]:
    """The names that are in the new text only: a line that moved offers nothing."""
    before = set(pattern.findall(old))
    return [name for name in dict.fromkeys(pattern.findall(new)) if name not in before]


@dataclass(frozen=True)
class _Rules:
    """Where a tree has what an interface must come with, in words, too."""

    interfaces: Callable[[Section, Mapping[str, str]], _Offers]
    documentation: re.Pattern[str]
    documented_in: str
    test: re.Pattern[str]
    tested_in: str


_RULES = {
    "linux": _Rules(
        linux_interfaces,
        _LINUX_DOCUMENTATION,
        "Documentation/",
        _LINUX_TEST,
        "tools/testing/selftests/ or a KUnit test",
    ),
    "qemu": _Rules(
        qemu_interfaces,
        _QEMU_DOCUMENTATION,
        "docs/, qapi/ or qemu-options.hx",
        _QEMU_TEST,
        "tests/",
    ),
}


def check_interfaces(candidate: Candidate) -> tuple[Finding, ...]:
    """An error for each interface of a product series without documentation or without a test."""
    rules = _RULES.get(candidate.series.tree)
    if rules is None:
        return ()
    parts = [(path.name, one) for path in candidate.series.patches() for one in _read(path)]
    documented = _lines(parts, rules.documentation)
    tested = _lines(parts, rules.test)
    strings = {name: text for _, one in parts for name, text in _STRING.findall(one.new())}
    offered = dict.fromkeys(
        Interface(what, name, patch, by_name)
        for patch, section in parts
        for what, name, by_name in rules.interfaces(section, strings)
    )
    found = []
    for one in offered:
        if not _named(one.name, documented):
            text = f"the {one.what} {one.name} is in no line that the series adds to "
            found.append(_finding(candidate, one, "documentation", text + rules.documented_in))
        if one.tested_by_name and not _named(one.name, tested):
            text = f"the {one.what} {one.name} is in no line that the series adds to "
            found.append(_finding(candidate, one, "test", text + rules.tested_in))
        elif not tested:
            text = f"the {one.what} {one.name} comes without a test in {rules.tested_in}"
            found.append(_finding(candidate, one, "test", text))
    return tuple(found)


def _read(patch: Path) -> list[Section]:
    return sections(patch.read_text(encoding="utf-8", errors="replace"))


def _lines(parts: Sequence[tuple[str, Section]], where: re.Pattern[str]) -> str:
    """What a series adds to the files of some places."""
    return "\n".join(
        line for _, section in parts if where.search(section.touched.path) for line in section.added
    )


def _named(name: str, text: str) -> bool:
    """Whether a text has a name; those that differ in a last number may be told as name-N."""
    stem = name.rstrip("0123456789")
    if stem != name and re.search(rf"(?<![\w-]){re.escape(stem)}[*`]*[Nn]\b", text):
        return True
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _finding(candidate: Candidate, one: Interface, rule: str, text: str) -> Finding:
    return Finding(candidate.series.label, one.patch, rule, "error", text)


def check_cover(candidate: Candidate) -> tuple[Finding, ...]:
    """An error for each part that a cover letter of ours lacks; an empty one is none of these."""
    cover = candidate.series.cover
    if not candidate.ours or not cover.is_file():
        return ()
    text = cover.read_text(encoding="utf-8", errors="replace")
    if "\n" not in text.strip():
        return ()
    return tuple(
        Finding(candidate.series.label, "", "cover", "error", f"cover.txt: {words}")
        for words in covers.missing(candidate.series, text)
    )


def check_form(candidates: Sequence[Candidate]) -> tuple[Finding, ...]:
    """What the series lack in form; nothing is applied or built."""
    return tuple(
        finding
        for candidate in candidates
        for finding in (*check_cover(candidate), *check_interfaces(candidate))
    )
