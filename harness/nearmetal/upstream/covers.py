# SPDX-License-Identifier: GPL-2.0-or-later
"""What a cover letter must say, and where it says it (docs/patches.md has the rule)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..patches.series import Enable, Series, TreeName
from .trees import COVER_MARKER


@dataclass(frozen=True)
class Part:
    """Something that a cover letter must say: under which titles, and in words for an error."""

    name: str
    titles: tuple[str, ...]
    says: str
    testbed: bool = True
    """Whether a series for an emulator of the testbed must say it, too."""


PARTS = (
    Part("base", ("Base", "Base and newer trees"), "what it is based on"),
    Part(
        "newer trees",
        ("Newer trees", "Base and newer trees"),
        "which newer trees it was tried on, or that it was not",
        testbed=False,
    ),
    Part("try it", ("Try it",), "how to switch it on and see it work", testbed=False),
    Part("tests", ("Tests", "Testing", "Tested"), "how it was tested"),
    Part("not run", ("Not run", "Not tested", "Not tried"), "what was not run"),
    Part(
        "related work",
        ("Related work",),
        "who else works on the same ground, or that nobody was found",
        testbed=False,
    ),
)

_TITLES: Mapping[str, tuple[str, ...]] = {
    title.lower(): tuple(part.name for part in PARTS if title in part.titles)
    for title in dict.fromkeys(title for part in PARTS for title in part.titles)
}
_OPENING = re.compile(rf"^({'|'.join(map(re.escape, _TITLES))}):(?:\s|$)", re.IGNORECASE)
_UNDERLINE = re.compile(r"^(?:-{3,}|={3,})\s*$")

_PROJECTS: Mapping[TreeName, str] = {
    "linux": "Linux",
    "qemu": "QEMU",
    "testbed-qemu": "QEMU",
    "testbed-bochs": "Bochs",
}
_SEEN_BY = ("statistic", "tracepoint", "trace event", "counter", "sysfs", "debugfs", "log")


def parts(cover: str) -> Mapping[str, str]:
    """The text under each title that counts, by the part's name; a part may be empty.

    A title is a line underlined with dashes, whose section ends at the next one, or the first
    words of a paragraph before a colon, which ends at a blank line.
    """
    lines = cover.partition(COVER_MARKER)[0].splitlines()
    found: dict[str, list[str]] = {}
    for names, line in (*_sections(lines), *_paragraphs(lines)):
        for name in names:
            found.setdefault(name, []).append(line)
    return {name: "\n".join(said).strip("\n") for name, said in found.items()}


def _sections(lines: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    names: tuple[str, ...] = ()
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line.strip() and _UNDERLINE.match(following):
            names = _TITLES.get(line.strip().lower(), ())
            yield names, ""
        elif not _UNDERLINE.match(line):
            yield names, line


def _paragraphs(lines: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    names: tuple[str, ...] = ()
    for line in lines:
        if match := _OPENING.match(line):
            names = _TITLES[match[1].lower()]
            line = line[match.end() :]
        elif not line.strip():
            names = ()
        yield names, line


def missing(series: Series, cover: str) -> tuple[str, ...]:
    """What a cover letter does not say and must: one sentence for each part."""
    said = parts(cover)
    found = []
    for part in PARTS:
        if series.is_testbed and not part.testbed:
            continue
        if not said.get(part.name, "").strip():
            titles = " or ".join(f"'{title}'" for title in part.titles)
            found.append(f"does not say {part.says}: add a section {titles}")
        elif part.name == "base":
            found += _base(series, said["base"])
        elif part.name == "try it":
            found += _try_it(series.enable, said["try it"])
    return tuple(found)


def _base(series: Series, text: str) -> list[str]:
    project = _PROJECTS[series.tree]
    versions = re.findall(rf"\b{project} (\d+\.\d+(?:\.\d+)*)", " ".join(text.split()))
    if not versions:
        return [f"the base has no version: write '{project} {series.base}.N'"]
    if not any(one == series.base or one.startswith(f"{series.base}.") for one in versions):
        return [f"the base is {project} {versions[0]}, and series.yaml says {series.base}"]
    return []


def _try_it(enable: Enable, text: str) -> list[str]:
    found = []
    if not re.search(r"(?m)^[ \t]+\S", text):
        found.append("'Try it' has no command or setting in a line of its own, indented")
    if not re.search(rf"\b(?:{'|'.join(_SEEN_BY)})s?\b", text, re.IGNORECASE):
        found.append(f"'Try it' does not say what shows it ({', '.join(_SEEN_BY)})")
    found += [
        f"'Try it' does not name the switch {one}"
        for one in switches(enable)
        if not re.search(rf"(?<![\w-]){re.escape(one)}(?![\w-])", text)
    ]
    return found


def switches(enable: Enable) -> tuple[str, ...]:
    """The names of the parameters and properties that switch a series on."""
    names = [name for values in enable.modules.values() for name in values]
    names += [name for values in enable.accel.values() for name in values]
    names += [name.partition(".")[2] for name in enable.qemu_properties]
    return tuple(dict.fromkeys(names))
