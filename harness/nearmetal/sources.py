# SPDX-License-Identifier: GPL-2.0-or-later
"""The sources that everything is built from: a base from Debian's archive, or the user's own.

A base is a version range; the newest that can be had is used and recorded exactly.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import debian, proc, ui
from .cache import Cache, key_of, sha256_file, sha256_tree
from .errors import EnvironmentBroken, UsageError
from .settings import Settings


@dataclass(frozen=True)
class Base:
    """A base as the project names it.

    ``package`` is Debian's, ``wanted`` a regular expression on its version, ``in_user_dir``
    one on the names of archives that a user may put into his --source-dir.
    """

    name: str
    package: str
    wanted: str
    is_source: bool
    in_user_dir: str


BASES: Mapping[str, Base] = {
    "linux": Base(
        "linux",
        "linux-source-7.3",
        r"7\.3\.\d",
        False,
        r"linux-source-7\.3_7\.3\.[^/]*\.deb|linux-7\.3(\.\d+)?\.tar\.\w+",
    ),
    "qemu": Base("qemu", "qemu", r"10\.0\.\d", True, r"qemu[_-]10\.0\.\d+[^/]*\.tar\.\w+"),
    "bochs": Base("bochs", "bochs", r"3\.0", True, r"bochs[_-]3\.0[^/]*\.tar\.\w+"),
}


@dataclass(frozen=True)
class Source:
    """What is built: where it came from, exactly, and the folder it lies in (never written to)."""

    name: str
    version: str
    sha256: str
    origin: str
    folder: Path

    def ingredients(self) -> dict[str, Any]:
        """What goes into the key of a thing built from it."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    def __str__(self) -> str:
        return self.origin


def obtain(settings: Settings, cache: Cache, name: str) -> Source:
    """The source of that name, fetched, verified and unpacked if it is not there yet."""
    own = {"linux": settings.linux_tree, "qemu": settings.qemu_tree}.get(name)
    if own is not None:
        return _users_tree(cache, name, own)
    base = BASES[name]
    archive = _in_source_dir(settings, base) or _fetched(cache, base)
    path, version, digest, origin = archive
    return Source(name, version, digest, origin, _unpacked(cache, name, path, digest))


def _in_source_dir(settings: Settings, base: Base) -> tuple[Path, str, str, str] | None:
    folder = settings.source_dir
    if folder is None:
        return None
    if not folder.is_dir():
        raise UsageError(f"--source-dir {folder} is not a folder")
    fitting = sorted(
        (path for path in folder.iterdir() if re.fullmatch(base.in_user_dir, path.name)),
        key=lambda path: debian._version_key(path.name),
    )
    if not fitting:
        ui.say(f"    {folder} holds no archive of {base.name}; asking Debian's archive")
        return None
    path = fitting[-1]
    version = re.search(r"[_-](\d[^_]*?)(?:\.orig)?(?:_all\.deb|\.tar\.\w+)$", path.name)
    return (
        path,
        version[1] if version else path.name,
        sha256_file(path),
        f"--source-dir {path.name}",
    )


def _fetched(cache: Cache, base: Base) -> tuple[Path, str, str, str]:
    stored = sorted(
        (
            entry
            for entry in cache.entries()
            if entry.kind == "source" and entry.meta["ingredients"].get("name") == base.name
        ),
        key=lambda entry: debian._version_key(entry.meta["ingredients"]["version"]),
    )
    try:
        archive = debian.open_archive(cache)
    except EnvironmentBroken as error:
        if not stored:
            raise
        ui.warn(f"{error.message}; {base.name} is taken from the cache")
        archive = None
    files: list[debian.File] = []
    if archive:
        ask = archive.tarballs if base.is_source else archive.binaries
        files = ask(base.package, base.wanted)
    if not files:
        if stored:
            entry = stored[-1]
            found = _archive_in(entry.path)
            made = entry.meta["ingredients"]
            return (
                found,
                made["version"],
                made["sha256"],
                f"Debian {base.package} {made['version']}",
            )
        raise EnvironmentBroken(
            f"Debian's archive has no {base.package} whose version matches {base.wanted}",
            hint=f"put an archive of {base.name} into a folder and name it with --source-dir",
        )
    failure: EnvironmentBroken | None = None
    for file in files:
        if failure:
            ui.warn(f"{failure.message}; trying {base.package} {file.version}")
        chosen = file

        def fetch(folder: Path, file: debian.File = chosen) -> None:
            assert archive is not None
            archive.fetch(file, folder)

        ingredients = {"name": base.name, "version": file.version, "sha256": file.sha256}
        try:
            entry = cache.make(
                "source", ingredients, fetch, what=f"fetching {file.name}", resume=True
            )
        except EnvironmentBroken as error:
            failure = error
            continue
        origin = f"Debian {base.package} {file.version}"
        return _archive_in(entry.path), file.version, file.sha256, origin
    assert failure is not None
    raise failure


def _archive_in(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name != "meta.json")


def _unpacked(cache: Cache, name: str, archive: Path, digest: str) -> Path:
    def unpack(work: Path) -> None:
        if archive.suffix == ".deb":
            box = work / "deb"
            proc.run(["dpkg-deb", "-x", archive, box], deadline_s=600)
            inner = next(iter(box.glob("usr/src/*.tar.*")), None)
            if inner is None:
                raise EnvironmentBroken(f"{archive.name} holds no source tarball")
            _untar(inner, work / "tree")
            shutil.rmtree(box)
        else:
            _untar(archive, work / "tree")
        if name == "qemu":
            _qemu_placeholders(work / "tree")

    what = f"unpacking {archive.name}"
    ingredients = {"name": name, "sha256": digest, "recipe": 1}
    return cache.make("tree", ingredients, unpack, what=what).path / "tree"


def _untar(archive: Path, target: Path) -> None:
    target.mkdir()
    proc.run(
        ["tar", "-xf", archive, "-C", target, "--strip-components=1", "--no-same-owner"],
        deadline_s=1800,
        hint="the archive is broken: remove it ('nearmetal cache --prune') and run again",
    )


def _qemu_placeholders(tree: Path) -> None:
    """Empty archives for the edk2 images that QEMU's build wants to unpack.

    Debian's tarball has no firmware; pc-bios/meson.build lists the files and does not
    ask whether they are there. They are not installed.
    """
    text = (tree / "pc-bios" / "meson.build").read_text()
    for name in sorted(set(re.findall(r"'(edk2-[a-z0-9_-]+\.fd)'", text))):
        path = tree / "pc-bios" / f"{name}.bz2"
        if not path.exists():
            # bzip2's file with nothing in it: magic, block size 9, end-of-stream, CRC 0
            path.write_bytes(b"BZh9\x17\x72\x45\x38\x50\x90\x00\x00\x00\x00")


def _users_tree(cache: Cache, name: str, own: Path) -> Source:
    """The user's tree as it stands: a git tree (with its changes), a folder or a tarball."""
    if own.is_file():
        digest = sha256_file(own)
        folder = _unpacked(cache, name, own.resolve(), digest)
        return Source(name, own.name, digest, f"tarball {own.name}", folder)
    marker = {"linux": "Kconfig", "qemu": "configure"}[name]
    if not (own / marker).is_file():
        raise UsageError(
            f"{own} is not a {name} tree: it has no {marker}",
            hint=f"give --{name}-tree a git tree, a folder of sources or a tarball",
        )
    own = own.resolve()
    if (own / ".git").exists():
        git = ["git", "-C", str(own)]
        head = proc.run([*git, "rev-parse", "HEAD"], deadline_s=60).stdout.strip()
        named = proc.run(
            [*git, "describe", "--always", "--tags", "--dirty"], deadline_s=300
        ).stdout.strip()
        changes = proc.run([*git, "diff", "HEAD", "--binary"], deadline_s=600).stdout
        extra = proc.run(
            [*git, "ls-files", "--others", "--exclude-standard", "-z"], deadline_s=300
        ).stdout
        more = {rel: sha256_file(own / rel) for rel in extra.split("\0") if (own / rel).is_file()}
        digest = hashlib.sha256((head + changes + key_of(more)).encode()).hexdigest()
        listing = proc.run(
            [*git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"], deadline_s=300
        ).stdout
        names = "\0".join(rel for rel in listing.split("\0") if rel and (own / rel).exists())
        version, origin = named, f"git {head[:12]}"
    else:
        digest = sha256_tree(own, exclude=frozenset({".git"}))
        names = ""
        version, origin = own.name, f"folder {own.name}"

    def copy(work: Path) -> None:
        if names:
            (work / "tree").mkdir()
            (work / "names").write_text(names)
            proc.run(
                [
                    "rsync",
                    "-a",
                    "--from0",
                    f"--files-from={work / 'names'}",
                    f"{own}/",
                    work / "tree",
                ],
                deadline_s=1800,
            )
        else:
            proc.run(["cp", "-a", "--reflink=auto", own, work / "tree"], deadline_s=1800)
        if name == "qemu":
            _qemu_placeholders(work / "tree")

    ingredients = {"name": name, "sha256": digest, "recipe": 1}
    entry = cache.make("tree", ingredients, copy, what=f"copying {own}")
    return Source(name, version, digest, origin, entry.path / "tree")
