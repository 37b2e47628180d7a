# SPDX-License-Identifier: GPL-2.0-or-later
"""The store of everything fetched and built, keyed by the hash of all that went in.

Layout below the cache directory::

    store/<kind>/<key>/     one complete thing; meta.json says what it is
    own/<name>/             build folders of the user's trees, kept so that make is incremental
    tmp/                    work in progress; swept when nobody holds its lock
    locks/                  one file a lock
    sessions/               machines that are up
    ccache/  venv/          the compiler's cache, build tools from PyPI

A thing is made in tmp/ and renamed into store/ when it is whole, so a killed build
leaves nothing behind that looks finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ui
from .errors import EnvironmentBroken, UsageError

_LOCK_DEADLINE_S = 3 * 3600.0


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(folder: Path, *, exclude: frozenset[str] = frozenset()) -> str:
    """A SHA-256 over names, modes and bytes of a folder's files, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if exclude.intersection(relative.parts):
            continue
        if path.is_symlink():
            total.update(f"link {relative} {path.readlink()}\n".encode())
        elif path.is_file():
            executable = bool(path.stat().st_mode & 0o100)
            total.update(f"file {relative} {executable} {sha256_file(path)}\n".encode())
    return total.hexdigest()


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key of a thing made from ``ingredients`` (anything JSON can hold)."""
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Stored:
    """A complete thing in the store."""

    kind: str
    key: str
    path: Path
    meta: Mapping[str, Any]
    fresh: bool = False
    """Whether it was made just now rather than found."""


_HELD: set[Path] = set()
"""The locks that this process has."""


@dataclass(frozen=True)
class Cache:
    """The cache below one directory."""

    root: Path

    def open(self) -> Cache:
        """Make the folders; raises EnvironmentBroken where that is not possible."""
        try:
            for name in ("store", "tmp", "locks", "ccache"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentBroken(
                f"the cache directory {self.root} cannot be made: {error.strerror}",
                hint="choose another with --cache-dir",
            ) from None
        for name in ("store", "tmp", "locks"):
            if not os.access(self.root / name, os.W_OK):
                raise EnvironmentBroken(
                    f"the cache directory {self.root} cannot be written ({name})",
                    hint="choose another with --cache-dir, or mend its owner or its mount",
                )
        return self

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the named lock; tells when it has to wait and for whom.

        Without ``wait`` UsageError says who has it. Raises RuntimeError where this process has it
        already, and would wait for itself.
        """
        path = self.root / "locks" / name.replace("/", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as stream:
            deadline = time.monotonic() + _LOCK_DEADLINE_S
            told = False
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if path in _HELD:
                        raise RuntimeError(
                            f"this process already holds the lock '{name}'"
                        ) from None
                    stream.seek(0)
                    holder = stream.read().strip()
                    if not wait:
                        raise UsageError(
                            f"'{name}' is in use by {process(holder)}",
                            hint="wait for it or end it, then try again",
                        ) from None
                    if not told:
                        ui.say(f"    waiting for {process(holder)}, which has '{name}'")
                        told = True
                    if time.monotonic() > deadline:
                        raise EnvironmentBroken(
                            f"another nearmetal has held '{name}' for {_LOCK_DEADLINE_S:.0f} s",
                            hint="end it, then run again",
                        ) from None
                    time.sleep(0.5)
            stream.seek(0)
            stream.truncate()
            stream.write(str(os.getpid()))
            stream.flush()
            _HELD.add(path)
            try:
                yield
            finally:
                _HELD.discard(path)

    def find(self, kind: str, key: str) -> Stored | None:
        """The thing if it is in the store, whole: one without a sound meta.json is made again."""
        path = self.root / "store" / kind / key
        meta = _meta(path)
        if meta is None:
            return None
        os.utime(path)
        return Stored(kind, key, path, meta)

    def make(
        self,
        kind: str,
        ingredients: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        what: str,
        resume: bool = False,
    ) -> Stored:
        """The thing made from ``ingredients``, built by ``build(folder)`` if it is missing.

        ``build`` fills the folder it is given and may return more for meta.json. With
        ``resume`` the folder of a broken attempt is handed to the next one as it is (for
        builds that go on where they were stopped).
        """
        key = key_of(ingredients)
        if found := self.find(kind, key):
            return found
        with self.lock(f"{kind}-{key}"):
            if found := self.find(kind, key):
                return found
            final = self.root / "store" / kind / key
            if final.exists():
                ui.warn(f"{final} is broken: its meta.json cannot be read; it is made again")
            work = self.root / "tmp" / f"{kind}-{key}"
            if work.exists() and not resume:
                remove(work)
            work.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            try:
                with ui.step(what):
                    more = build(work)
                meta = {
                    "kind": kind,
                    "what": what,
                    "ingredients": ingredients,
                    "seconds": round(time.monotonic() - started, 1),
                    "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    **(more or {}),
                }
                (work / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.exists():
                    remove(final)
                work.rename(final)
            except OSError as error:
                raise EnvironmentBroken(
                    f"{what}: {error.strerror or error} ({error.filename or work})",
                    hint="free some disk ('nearmetal cache --prune'), or use --cache-dir"
                    if error.errno in (errno.ENOSPC, errno.EDQUOT)
                    else None,
                ) from None
            return Stored(kind, key, final, meta, fresh=True)

    def entries(self) -> list[Stored]:
        """Everything in the store, oldest use first."""
        found = [
            Stored(
                meta.parent.parent.name,
                meta.parent.name,
                meta.parent,
                _meta(meta.parent) or {"what": "broken: its meta.json cannot be read"},
            )
            for meta in (self.root / "store").glob("*/*/meta.json")
        ]
        return sorted(found, key=lambda entry: entry.path.stat().st_mtime)


def _meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json says of a thing; None where that is no JSON object (a machine lost power)."""
    try:
        found = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def process(pid: str) -> str:
    """A process in words, with the arguments of ``nearmetal`` if it is one: procfs' cmdline."""
    try:
        words = Path(f"/proc/{int(pid)}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except (OSError, ValueError):
        return f"process {pid}" if pid else "another process"
    for number, word in enumerate(words):
        if Path(word).name == "nearmetal":
            words = ["nearmetal", *words[number + 1 :]]
            break
    text = shlex.join(words)
    return f"process {pid} ({text if len(text) <= 80 else text[:77] + '...'})"


def remove(path: Path) -> None:
    """Remove a file or a folder, also one with read-only folders in it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o700)
    shutil.rmtree(path)
