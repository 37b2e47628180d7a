# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds of Linux as Kbuild does them: by folder, so that an option decides what is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...core.cache import key_of
from ...core.kconfig import lost_options
from ..validate import (
    Candidate,
    Diagnostic,
    LinuxBuild,
    Touched,
    built_with,
    forget_objects,
    linux_source,
    linux_targets,
    parse_build,
    sections,
    version_of,
)

_MODULE = re.compile(r"(?m)^(CONFIG_\w+)=m$")


@dataclass(frozen=True)
class FolderBuild(LinuxBuild):
    """Touched objects, by way of their folders: what the configuration leaves out is not built.

    ``over`` are lines laid over the configuration, ``builtin`` makes every module a part of the
    kernel, ``words`` are for make (``C=1``), ``arch`` is the folder in arch/.
    """

    arch: str = "x86"
    over: str = ""
    builtin: bool = False
    words: tuple[str, ...] = ("W=1",)
    tools: tuple[str, ...] = ("gcc",)
    """Programs whose versions change what is said."""

    def wanted(self) -> str:
        """The fragments, ``over`` last; with ``builtin`` nothing is a module."""
        text = super().wanted() + self.over
        return _MODULE.sub(r"\1=y", text) if self.builtin else text

    def key(self) -> str:
        """What the configuration and the commands are made from."""
        parts = {"configuration": self.wanted(), "make": self.make_arguments, "words": self.words}
        return key_of({**parts, "tools": [version_of(one) for one in self.tools]})

    def lost_options(self, build: Path) -> tuple[str, ...]:
        """The lines of ``over`` that Kconfig dropped."""
        return tuple(lost_options(self.over, (build / ".config").read_text()))

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The targets of linux_targets, for this architecture."""
        return targets_of(linux_targets(touched), touched, self.arch)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Build the targets anew, and give what is said about them and about headers."""
        wanted = dict.fromkeys(built_with(source, target) for target in targets)
        present = [target for target in wanted if linux_source(source, target)]
        folders = folders_of(present)
        if not folders:
            return ()
        self._populate(source, build, folders)
        for target in present:
            forget_objects(build, target)
        done = self._make(source, build, [*self.words, "--keep-going", *folders], check=False)
        said = parse_build(done.stdout, source, build)
        return tuple(one for one in said if is_about(one, source, (*targets, *present)))

    def _populate(self, source: Path, build: Path, folders: Sequence[str]) -> None:
        """Build everything else of folders that were never built: its complaints are old."""
        fresh = [folder for folder in folders if not any((build / folder).glob("*.a"))]
        if fresh:
            self._make(source, build, ["W=1", "--keep-going", *fresh], check=False)


def targets_of(targets: Sequence[str], touched: Sequence[Touched], arch: str) -> tuple[str, ...]:
    """The targets of an x86 build for another architecture: its own KVM, no folder of x86."""
    if arch == "x86":
        return tuple(targets)
    found: dict[str, None] = {}
    for target in targets:
        if target == "arch/x86/kvm/":
            if any(not file.path.startswith("arch/") for file in touched):
                found[f"arch/{arch}/kvm/"] = None
        elif not target.startswith("arch/x86/"):
            found[target] = None
    return tuple(found)


def folders_of(targets: Iterable[str]) -> tuple[str, ...]:
    """The folders to build for some targets, without those that are below another."""
    every = {one if one.endswith("/") else f"{PurePosixPath(one).parent}/" for one in targets}
    return tuple(
        sorted(one for one in every if not any(one != up and one.startswith(up) for up in every))
    )


def is_about(one: Diagnostic, source: Path, targets: Sequence[str]) -> bool:
    """Whether a complaint is about a target, a header or a tool.

    Others are of files that make builds on the way, and would be told of one side only.
    """
    if not one.file.endswith((".c", ".S")):
        return True
    stems = {str(PurePosixPath(target).with_suffix("")) for target in targets}
    folders = tuple(target for target in targets if target.endswith("/"))
    kvm = ("virt/kvm/",) if any(folder.endswith("/kvm/") for folder in folders) else ()
    here = str(PurePosixPath(one.file).with_suffix(""))
    return here in stems or one.file.startswith((*folders, *kvm))


@dataclass(frozen=True)
class Symbol:
    """An option that a series adds to Kconfig; ``kind`` is bool or tristate."""

    name: str
    kind: str


_CONFIG = re.compile(r"^\s*(?:menu)?config (\w+)")
_KIND = re.compile(r"^\s*(?:def_)?(bool|tristate)\b")


def own_symbols(candidate: Candidate) -> tuple[Symbol, ...]:
    """The options that the patches of a series add to Kconfig."""
    found: dict[str, Symbol] = {}
    for patch in candidate.series.patches():
        for section in sections(patch.read_text(encoding="utf-8", errors="replace")):
            if PurePosixPath(section.touched.path).name.startswith("Kconfig"):
                found.update({one.name: one for one in _symbols(section.added)})
    return tuple(found.values())


def _symbols(added: Sequence[str]) -> Iterable[Symbol]:
    name = ""
    for line in added:
        if match := _CONFIG.match(line):
            name = match[1]
        elif name and (match := _KIND.match(line)):
            yield Symbol(name, match[1])
            name = ""


def lines_on(symbols: Sequence[Symbol], *, modules: bool) -> str:
    """Lines that switch options on; tests of KUnit bring that along."""
    lines = [
        f"CONFIG_{one.name}={'m' if modules and one.kind == 'tristate' else 'y'}\n"
        for one in symbols
    ]
    if any("KUNIT" in one.name for one in symbols):
        lines.insert(0, "CONFIG_KUNIT=y\n")
    return "".join(lines)


def lines_off(symbols: Sequence[Symbol]) -> str:
    """Lines that switch options off."""
    return "".join(f"CONFIG_{one.name}=n\n" for one in symbols)
