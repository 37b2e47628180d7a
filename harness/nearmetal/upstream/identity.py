# SPDX-License-Identifier: GPL-2.0-or-later
"""What a folder of sources is, by its own files: whose tree, and which version."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UsageError
from ..patches.series import TreeName


@dataclass(frozen=True)
class _Marks:
    """A project's name, files that only its trees have, and where the version is."""

    project: str
    files: tuple[str, ...]
    version: Callable[[Path], str | None]


def _linux_version(folder: Path) -> str | None:
    """VERSION, PATCHLEVEL, SUBLEVEL and EXTRAVERSION of the Makefile."""
    head = (folder / "Makefile").read_text(encoding="utf-8", errors="replace")[:2000]
    found = dict(re.findall(r"(?m)^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) = *(\S*)$", head))
    if not found.get("VERSION") or not found.get("PATCHLEVEL"):
        return None
    last = f".{found['SUBLEVEL']}" if found.get("SUBLEVEL") else ""
    return f"{found['VERSION']}.{found['PATCHLEVEL']}{last}{found.get('EXTRAVERSION', '')}"


def _qemu_version(folder: Path) -> str | None:
    """The file VERSION."""
    text = (folder / "VERSION").read_text(encoding="utf-8", errors="replace").strip()
    return text if re.fullmatch(r"\d+\.\d+\.\d+", text) else None


def _bochs_version(folder: Path) -> str | None:
    """AC_INIT of configure.ac, or the version in configure."""
    for name in ("configure.ac", "configure"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            match = re.search(r"(?m)^(?:VERSION=\"|AC_INIT\(.*?\[?)(\d+\.\d+[\w.]*)", text)
            if match:
                return match[1]
    return None


_QEMU = _Marks("QEMU", ("VERSION", "qemu-options.hx", "qapi/qapi-schema.json"), _qemu_version)
_MARKS: Mapping[TreeName, _Marks] = {
    "linux": _Marks("Linux", ("Kbuild", "init/main.c", "Makefile"), _linux_version),
    "qemu": _QEMU,
    "testbed-qemu": _QEMU,
    "testbed-bochs": _Marks("Bochs", ("bochs.h", "cpu/cpu.h"), _bochs_version),
}


def version_in(tree: TreeName, folder: Path) -> str:
    """The version that a tree says of itself, such as ``7.3.4``.

    Raises UsageError for a folder that is not a tree of that project, or whose version is none.
    """
    marks = _MARKS[tree]
    for name in marks.files:
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a tree of {marks.project}: it has no {name}",
                hint=f"name a folder with the sources of {marks.project}",
            )
    version = marks.version(folder)
    if version is None:
        raise UsageError(
            f"{folder} does not say which version of {marks.project} it is",
            hint="name a tree as its project released it",
        )
    return version


def missing_in(tree: TreeName, has: Callable[[str], bool]) -> str | None:
    """A file that a tree of that project has and this one has not, by ``has``; None: it is one."""
    return next((name for name in _MARKS[tree].files if not has(name)), None)


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in the range ``wanted``: "7.3" means 7.3, 7.3-rc1 and 7.3.y."""
    return re.match(rf"{re.escape(wanted)}(?!\d)", version) is not None
