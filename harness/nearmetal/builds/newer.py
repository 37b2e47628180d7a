# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of a newer Debian than the machine's, for checkers that ask for a newer one."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core import proc
from ..core.cache import Cache
from ..core.settings import Settings
from ..sources import debian

_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


def programs(settings: Settings, cache: Cache, package: str, names: Sequence[str]) -> Path:
    """A folder with the programs ``names`` of a package of the Debian of the image.

    The package and what it depends on are unpacked, not installed, and each program is run by
    the loader and with the libraries that came with it. Raises EnvironmentBroken where they can't
    be had, and on a machine that is not x86-64.
    """
    suite = yaml.safe_load((settings.repo / "guest-images" / "debian.yaml").read_text())["suite"]

    def build(work: Path) -> dict[str, Any]:
        archive = debian.open_archive(cache)
        log = cache.root / "tmp" / f"{work.name}.log"
        root = work / "root"
        words = ("--variant=extract", "--format=directory")
        archive.root(root, suite, [package], words=words, log=log, deadline_s=900)
        for name in ("dev", "proc", "sys", "var", "usr/share"):
            shutil.rmtree(root / name, ignore_errors=True)
        log.unlink()
        return {"package": package}

    ingredients = {"suite": suite, "package": package, "recipe": 1}
    what = f"unpacking {package} of Debian's {suite}"
    root = cache.make("programs", ingredients, build, what=what).path / "root"
    return wrappers(root, names)


def wrappers(root: Path, names: Sequence[str]) -> Path:
    """Scripts in ``root``/run-here that run the programs of an unpacked root where they lie."""
    folder = root / "run-here"
    folder.mkdir(exist_ok=True)
    for name in names:
        words = [root / _LOADER, "--library-path", root / _LIBRARIES, root / "usr" / "bin" / name]
        line = " ".join(shlex.quote(str(word)) for word in words)
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        path.chmod(0o755)
    return folder


def version(program: str | Path) -> tuple[int, ...]:
    """The first dotted number that a program says to --version; () where it can't be run."""
    if shutil.which(program) is None:
        return ()
    said = proc.run([program, "--version"], deadline_s=60, check=False).stdout
    match = re.search(r"\d+(?:\.\d+)+", said)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
