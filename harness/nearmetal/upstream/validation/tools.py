# SPDX-License-Identifier: GPL-2.0-or-later
"""Tools that look at sources without building them: Coccinelle, kernel-doc, Sphinx."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from ...core import proc
from ...core.cache import key_of
from ..validate import BUILD_ENVIRONMENT, Diagnostic, Touched, parse_build, version_of

_SCRIPT_S = 900.0
_DOCUMENTS_S = 3600.0


@dataclass(frozen=True)
class _Plain:
    """What setups without a configuration have in common."""

    def with_options(self, fragments: Sequence[Path]) -> Self:
        """The same: there is no configuration."""
        return self

    def lost_options(self, build: Path) -> tuple[str, ...]:
        """None."""
        return ()

    def configure(self, source: Path, build: Path) -> None:
        """Make the folder."""
        build.mkdir(parents=True, exist_ok=True)


# -- Coccinelle

_REPORT = re.compile(r"^(?:\./)?(?P<file>[^\s:]+\.[ch]):(?P<line>\d+):[\d-]+: (?P<text>.+)$")
_OPTIONS = re.compile(r"(?m)^// *Options: *(?P<words>.*)$")
_INCLUDE = ("arch/x86/include", "include", "arch/x86/include/uapi", "include/uapi")


def parse_cocci(output: str) -> tuple[Diagnostic, ...]:
    """The reports of semantic patches (mode ``report``)."""
    found = []
    for line in output.splitlines():
        if match := _REPORT.match(line.strip()):
            text = " ".join(match["text"].split())
            found.append(Diagnostic(match["file"], int(match["line"]), "warning", text))
    return tuple(dict.fromkeys(found))


def _reports(script: Path) -> bool:
    """Whether a semantic patch has the mode ``report``; some only change code."""
    text = script.read_text(encoding="utf-8", errors="replace")
    return re.search(r"(?m)^virtual\b.*\breport\b", text) is not None


@dataclass(frozen=True)
class Coccinelle(_Plain):
    """The semantic patches of scripts/coccinelle, each over the touched sources."""

    jobs: int = 2

    def key(self) -> str:
        """The program's version; the semantic patches are in the tree."""
        return key_of({"spatch": version_of("spatch")})

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The sources."""
        return tuple(one.path for one in touched if not one.deleted)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Run every semantic patch; one that fails is an error, as nobody knows what it missed."""
        files = [one for one in targets if (source / one).is_file()]
        every = sorted((source / "scripts" / "coccinelle").rglob("*.cocci"))
        scripts = [one for one in every if _reports(one)]
        if not files:
            return ()
        if not scripts:
            return (Diagnostic("scripts/coccinelle", 0, "error", "holds no semantic patches"),)
        with ThreadPoolExecutor(self.jobs) as pool:
            found = list(pool.map(lambda one: self._try(source, one, files), scripts))
        return tuple(one for said in found for one in said)

    def _try(self, source: Path, script: Path, files: Sequence[str]) -> tuple[Diagnostic, ...]:
        try:
            return self._run(source, script, files)
        except proc.CommandFailed as error:
            return (Diagnostic(str(script.relative_to(source)), 0, "error", error.message),)

    def _run(self, source: Path, script: Path, files: Sequence[str]) -> tuple[Diagnostic, ...]:
        words = _OPTIONS.search(script.read_text(encoding="utf-8", errors="replace"))
        done = proc.run(
            [
                *("spatch", "--very-quiet", "-D", "report", "--cocci-file", script),
                *(words["words"].split() if words else ()),
                *(word for folder in _INCLUDE for word in ("-I", folder)),
                *files,
            ],
            deadline_s=_SCRIPT_S,
            cwd=source,
            env=BUILD_ENVIRONMENT,
            check=False,
        )
        name = str(script.relative_to(source))
        if done.status != 0:
            said = proc.tail(done.stderr, 1) or f"status {done.status}"
            return (Diagnostic(name, 0, "error", f"spatch failed: {said}"),)
        return parse_cocci(done.stdout)


# -- kernel-doc


@dataclass(frozen=True)
class KernelDoc(_Plain):
    """kernel-doc comments of headers, which no build looks at."""

    def key(self) -> str:
        """Nothing but the tree's own script, which is in the tree."""
        return "kernel-doc"

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The headers."""
        return tuple(one.path for one in touched if not one.deleted)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Read the comments and write nothing."""
        files = [one for one in targets if (source / one).is_file()]
        if not files:
            return ()
        done = proc.run(
            [source / "scripts" / "kernel-doc", "-none", *files],
            deadline_s=_SCRIPT_S,
            cwd=source,
            env=BUILD_ENVIRONMENT,
            check=False,
        )
        return parse_build(done.stdout + done.stderr, source, source)


# -- Sphinx

_SPHINX = re.compile(
    r"^(?P<file>[^\s:]+?)(?::docstring of [^:]+)?:(?:(?P<line>\d+):)? ?"
    r"(?P<level>WARNING|ERROR|CRITICAL|SEVERE): (?P<text>.*)$"
)
_SPHINX_FAILED = re.compile(r"^(?:Sphinx error|Extension error|Configuration error|Theme error)")


def parse_sphinx(output: str, source: Path) -> tuple[Diagnostic, ...]:
    """Warnings and errors of Sphinx and of kernel-doc in it; an error of its own is one, too."""
    found: dict[Diagnostic, None] = {}
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in output.splitlines()]
    for number, line in enumerate(lines):
        if match := _SPHINX.match(line):
            kind: Literal["warning", "error"] = (
                "warning" if match["level"] == "WARNING" else "error"
            )
            file = _inside(match["file"], source)
            found[Diagnostic(file, int(match["line"] or 0), kind, match["text"])] = None
        elif _SPHINX_FAILED.match(line):
            text = " ".join(lines[number : number + 2])
            found[Diagnostic("", 0, "error", text)] = None
    return (*found, *(one for one in parse_build(output, source, source) if one not in found))


def _inside(name: str, source: Path) -> str:
    path = Path(os.path.normpath(source / name))
    return str(path.relative_to(source)) if path.is_relative_to(source) else name


@dataclass(frozen=True)
class LinuxDocuments(_Plain):
    """``make htmldocs`` of the folders below Documentation/ that a patch touches."""

    jobs: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Sphinx' version."""
        return key_of({"sphinx": version_of("sphinx-build")})

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The folders."""
        return documents_folders([one.path for one in touched], source)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Read all pages of the folders anew."""
        said: list[Diagnostic] = []
        for target in targets:
            if not (source / "Documentation" / target / "index.rst").is_file():
                continue
            shutil.rmtree(build / "Documentation", ignore_errors=True)
            done = proc.run(
                [
                    *("make", "-C", source, f"O={build.resolve()}", f"-j{self.jobs}"),
                    *(f"SPHINXDIRS={target}", f"SPHINXOPTS=-j{self.jobs}", "htmldocs"),
                ],
                deadline_s=_DOCUMENTS_S,
                env={**BUILD_ENVIRONMENT, **self.environment},
                log=build / "validate.log",
                tree=True,
                check=False,
            )
            found = parse_sphinx(done.stdout, source)
            if done.status != 0 and not any(one.kind == "error" for one in found):
                said.append(Diagnostic(target, 0, "error", proc.tail(done.stdout, 1)))
            said += found
        return tuple(said)


def documents_folders(paths: Sequence[str], source: Path) -> tuple[str, ...]:
    """The folders below Documentation/ to build: those of the files that have an index."""
    found: dict[str, None] = {}
    for name in paths:
        folder = PurePosixPath(name).parent
        while str(folder) not in (".", "Documentation"):
            if (source / folder / "index.rst").is_file():
                found[str(folder.relative_to("Documentation"))] = None
                break
            folder = folder.parent
    every = tuple(found)
    return tuple(one for one in every if not any(one.startswith(f"{up}/") for up in every))


@dataclass(frozen=True)
class QemuDocuments(_Plain):
    """QEMU's manual, read by Sphinx and written nowhere."""

    version: str
    jobs: int = 2

    def key(self) -> str:
        """Sphinx' version."""
        return key_of({"sphinx": version_of("sphinx-build")})

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The pages, and the files that pages are made from."""
        return tuple(one.path for one in touched if not one.deleted)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Read these pages anew; the whole manual the first time, of which the rest is left out."""
        for name in targets:
            if (source / name).is_file():
                os.utime(source / name)
        done = proc.run(
            [
                *("sphinx-build", "-q", "-b", "dummy", f"-j{self.jobs}"),
                *("-D", f"version={self.version}", "-D", f"release={self.version}"),
                *("-c", source / "docs", source / "docs", build / "manual"),
            ],
            deadline_s=_DOCUMENTS_S,
            cwd=build,
            env=BUILD_ENVIRONMENT,
            log=build / "validate.log",
            check=False,
        )
        said = parse_sphinx(done.stdout, source)
        if done.status != 0 and not any(one.kind == "error" for one in said):
            return (*said, Diagnostic("docs", 0, "error", proc.tail(done.stdout, 1)))
        return tuple(one for one in said if one.file in targets or not one.file.endswith(".rst"))
