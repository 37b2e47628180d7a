# SPDX-License-Identifier: GPL-2.0-or-later
"""What all builds from a tree have in common: a copy with patches, a log, an end in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core import proc
from ..core.cache import Cache, sha256_file
from ..core.errors import EnvironmentBroken
from ..sources.archive import Source

BUILD_DEADLINE_S = 2 * 3600.0


class BuildFailed(EnvironmentBroken):
    """A tree does not build; the detail is the compiler's own error."""


_ERROR = re.compile(
    r"error:|ERROR|undefined reference"
    # what a shell, make or an interpreter says of a program that is not installed
    r"|: not found$|command not found|Command not found|No such file or directory"
)
_TOOL_FAILED = re.compile(r"\*\*\* |FAILED:|Error \d")


def first_errors(log: str, most: int = 12) -> str:
    """The lines of a build's log that say what is wrong: errors first, else the end.

    make and ninja only say that something failed; where nothing else in the log is known
    to be an error, the lines before them are shown, where the tool said why.
    """
    lines = log.splitlines()
    failed = [index for index, line in enumerate(lines) if _TOOL_FAILED.search(line)]
    causes = [index for index, line in enumerate(lines) if _ERROR.search(line)]
    if not failed and not causes:
        return proc.tail(log, most)
    if not causes:
        causes = list(range(max(0, failed[0] - 3), failed[0]))
    shown = sorted({*causes[: most - 1], *failed[:1]}) if failed else causes[:most]
    return "\n".join(lines[index] for index in shown)


def ccache(cache: Cache, work: Path) -> dict[str, str]:
    """ccache for a build below ``work``: paths relative to it, so that variants share hits."""
    return {
        "CCACHE_DIR": str(cache.root / "ccache"),
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_DEPEND": "1",
        "CCACHE_COMPILERCHECK": "content",
        "CCACHE_MAXSIZE": "5G",
    }


def compiler() -> str:
    """The C compiler's version, an ingredient of all that it builds."""
    return proc.run(["gcc", "-dumpfullversion"], deadline_s=30).stdout.strip()


def digests(patches: Sequence[Path]) -> list[str]:
    """The patches as ingredients."""
    return [sha256_file(path) for path in patches]


def label(what: str, patches: Sequence[Path]) -> str:
    """What is built, in words, such as ``building Linux 7.3.4 with 12 patches``."""
    return f"building {what}" + (f" with {len(patches)} patches" if patches else "")


@dataclass(frozen=True)
class Workshop:
    """A patched copy of a source in ``src``, an empty folder ``out``, and how to run in them."""

    src: Path
    out: Path
    env: Mapping[str, str]
    log: Path

    def run(
        self,
        words: Sequence[str | Path],
        *,
        deadline_s: float,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a program of the build; what it prints goes to the log."""
        proc.run(
            words,
            deadline_s=deadline_s,
            cwd=cwd,
            env={**self.env, **(env or {})},
            log=self.log,
            tree=True,
        )


@contextmanager
def telling(what: str, log: Path) -> Iterator[None]:
    """Turn the failure of a program of a build into BuildFailed, with the compiler's error."""
    try:
        yield
    except proc.CommandFailed as error:
        raise BuildFailed(
            f"{what} does not build: {error.message}",
            detail=first_errors(error.output),
            hint=f"the whole log is {log}",
        ) from None


@contextmanager
def workshop(
    cache: Cache, work: Path, source: Source, patches: Sequence[Path], *, what: str
) -> Iterator[Workshop]:
    """A workshop below ``work``, for as long as the context lasts.

    A program that fails in it ends it with BuildFailed, which shows the compiler's own error; the
    log stays then. Raises CommandFailed for a patch that does not apply.
    """
    src, out = work / "src", work / "out"
    log = cache.root / "tmp" / f"{work.name}.log"
    proc.run(["cp", "-al", source.folder, src], deadline_s=1200)
    for patch in patches:
        proc.run(
            ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "-d", src, "-i", patch],
            deadline_s=120,
            hint=f"{patch.name} does not apply; see 'nearmetal validate'",
        )
    out.mkdir()
    with telling(what, log):
        yield Workshop(src, out, ccache(cache, work), log)
    shutil.rmtree(src)
    shutil.rmtree(out)
    log.unlink(missing_ok=True)


def compile_file(program: Path, target: Path, *words: str) -> None:
    """One C file of ours to a program or a library; BuildFailed with the first errors."""
    line: list[str | Path] = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, program]
    try:
        proc.run([*line, *words], deadline_s=120)
    except proc.CommandFailed as error:
        raise BuildFailed(
            f"{program.name} does not build", detail=first_errors(error.output)
        ) from None
