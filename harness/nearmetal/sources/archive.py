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

from ..core import proc, ui
from ..core.cache import Cache, Stored, key_of, sha256_file, sha256_tree
from ..core.errors import EnvironmentBroken, UsageError
from ..core.settings import Settings
from . import debian
from .debian import Pinned


@dataclass(frozen=True)
class Base:
    """A base as the project names it: a range of versions, and one that is known to work.

    ``package`` is Debian's, ``wanted`` a regular expression on its version, ``in_user_dir``
    one on the names of archives that a user may put into his --source-dir. ``pinned`` is
    what is taken where the archive has none of the range (its index moves on, or names
    files that are gone).
    """

    name: str
    package: str
    wanted: str
    is_source: bool
    in_user_dir: str
    pinned: Pinned | None = None


BASES: Mapping[str, Base] = {
    "linux": Base(
        "linux",
        "linux-source-7.3",
        r"7\.3\.\d",
        False,
        r"linux-source-7\.3_7\.3\.[^/]*\.deb|linux-7\.3(\.\d+)?\.tar\.\w+",
        Pinned(
            "pool/main/l/linux/linux-source-7.3_7.3.4-1~bpo13+1_all.deb",
            "7.3.4-1~bpo13+1",
            "703e369ddd4cce971452f5a593ee55df3a5c10c83caf0fa0df039633ed181ee3",
        ),
    ),
    "qemu": Base(
        "qemu",
        "qemu",
        r"11\.1\.\d",
        True,
        r"qemu[_-]11\.1\.\d+[^/]*\.tar\.\w+",
        # as qemu_11.1.1+ds-1.dsc says, signed by Debian's maintainer
        Pinned(
            "pool/main/q/qemu/qemu_11.1.1+ds.orig.tar.xz",
            "1:11.1.1+ds-1",
            "0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e",
        ),
    ),
    "bochs": Base(
        "bochs",
        "bochs",
        r"3\.0",
        True,
        r"bochs[_-]3\.0[^/]*\.tar\.\w+",
        Pinned(
            "pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz",
            "3.0+dfsg-1",
            "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b",
        ),
    ),
}

RELEASES: Mapping[tuple[str, str], Base] = {
    ("qemu", "10.0"): Base(
        "qemu",
        "qemu",
        r"10\.0\.\d",
        True,
        r"qemu[_-]10\.0\.\d+[^/]*\.tar\.\w+",
        Pinned(
            "pool/main/q/qemu/qemu_10.0.13+ds.orig.tar.xz",
            "1:10.0.13+ds-0+deb13u1",
            "6a0888e806c2ffc0c5f0733e974f9aea55491950d3c47c98669c8b236dde59ae",
        ),
    ),
    ("qemu", "10.2"): Base(
        "qemu",
        "qemu",
        r"10\.2\.\d",
        True,
        r"qemu[_-]10\.2\.\d+[^/]*\.tar\.\w+",
        Pinned(
            "pool/main/q/qemu/qemu_10.2.2+ds.orig.tar.xz",
            "1:10.2.2+ds-1",
            "be05230fe47a6937cd29f28f562932c8125f9c93c2a82c625198f7a4aa601dfb",
        ),
    ),
    ("linux", "6.12"): Base(
        "linux",
        "linux-source-6.12",
        r"6\.12\.\d",
        False,
        r"linux-source-6\.12_6\.12\.[^/]*\.deb|linux-6\.12(\.\d+)?\.tar\.\w+",
    ),
    ("linux", "7.2"): Base(
        "linux",
        "linux-source-7.2",
        r"7\.2\.\d",
        False,
        r"linux-source-7\.2_7\.2\.[^/]*\.deb|linux-7\.2(\.\d+)?\.tar\.\w+",
    ),
}
"""Releases that users run and that series may be tried on, by tree and version."""


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
    return _obtain(settings, cache, BASES[name])


def known_releases() -> Mapping[tuple[str, str], Base]:
    """The releases that can be had, by name and version, oldest first: the bases are among them."""
    every = {**RELEASES, **{(base.name, _range(base)): base for base in BASES.values()}}
    order = sorted(every, key=lambda one: (one[0], debian.version_key(one[1])))
    return {one: every[one] for one in order}


def obtain_release(settings: Settings, cache: Cache, name: str, version: str) -> Source:
    """The source of a release: of ``name`` (``linux``, ``qemu``), ``version`` like ``10.2``.

    Raises UsageError for a version that is not known.
    """
    known = known_releases()
    base = known.get((name, version))
    if base is None:
        versions = [one for tree, one in known if tree == name]
        raise UsageError(
            f"no {name} {version} is known",
            hint=f"known: {', '.join(versions)}; or name a tree, a folder or a tarball",
        )
    return _obtain(settings, cache, base)


def _range(base: Base) -> str:
    """``11.1``, as series.yaml names a base whose versions match ``11\\.1\\.\\d``."""
    return ".".join(re.findall(r"\d+", base.wanted))


def _obtain(settings: Settings, cache: Cache, base: Base) -> Source:
    path, version, digest, origin = _in_source_dir(settings, base) or _fetched(cache, base)
    return Source(base.name, version, digest, origin, _unpacked(cache, base.name, path, digest))


def _in_source_dir(settings: Settings, base: Base) -> tuple[Path, str, str, str] | None:
    folder = settings.source_dir
    if folder is None:
        return None
    if not folder.is_dir():
        raise UsageError(f"--source-dir {folder} is not a folder")
    fitting = sorted(
        (path for path in folder.iterdir() if re.fullmatch(base.in_user_dir, path.name)),
        key=lambda path: debian.version_key(path.name),
    )
    if not fitting:
        ui.say(f"    {folder} holds no archive of {base.name}; trying Debian's archive")
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
    """The newest of the range that the archive really has, else the pinned one.

    An index that names files which are gone gives one warning; without a network what the
    cache has is taken.
    """
    stored = _stored(cache, base)
    try:
        archive = debian.open_archive(cache)
    except EnvironmentBroken as error:
        if not stored:
            raise
        ui.warn(f"{error.message}; {base.name} is taken from the cache")
        return _from_cache(base, stored[-1])
    ask = archive.tarballs if base.is_source else archive.binaries
    gone: list[str] = []
    failure: EnvironmentBroken | None = None
    known: set[str] = set()
    for file in ask(base.package, base.wanted):
        if file.sha256 in known or archive.is_gone(file):
            continue
        known.add(file.sha256)
        try:
            return _stored_file(cache, base, archive, file)
        except debian.Gone:
            gone.append(file.version)
        except EnvironmentBroken as error:
            failure = failure or error
    if gone and base.pinned:
        ui.warn(
            f"Debian's index names {base.package} {', '.join(gone)}, whose files are gone;"
            f" {base.pinned.version} is taken"
        )
    if base.pinned:
        if failure is not None:
            ui.warn(f"{failure.message}; {base.name} {base.pinned.version} is tried")
        try:
            return _stored_file(cache, base, archive, base.pinned)
        except EnvironmentBroken as error:
            failure = failure or error
    if stored:
        if failure:
            ui.warn(f"{failure.message}; {base.name} is taken from the cache")
        return _from_cache(base, stored[-1])
    raise failure or EnvironmentBroken(
        f"Debian's archive has no {base.package} whose version matches {base.wanted}",
        hint=f"put an archive of {base.name} into a folder and name it with --source-dir",
    )


def _stored(cache: Cache, base: Base) -> list[Stored]:
    """The archives of this base that the cache has, oldest version first."""

    def version(entry: Stored) -> str:
        return str(entry.meta["ingredients"].get("version", ""))

    return sorted(
        (
            entry
            for entry in cache.entries()
            if entry.kind == "source"
            and entry.meta["ingredients"].get("name") == base.name
            and re.match(base.wanted, version(entry).split(":", 1)[-1])
        ),
        key=lambda entry: debian.version_key(version(entry)),
    )


def _from_cache(base: Base, entry: Stored) -> tuple[Path, str, str, str]:
    made = entry.meta["ingredients"]
    origin = f"Debian {base.package} {made['version']}"
    return _archive_in(entry.path), made["version"], made["sha256"], origin


def _stored_file(
    cache: Cache, base: Base, archive: debian.Archive, file: debian.File | Pinned
) -> tuple[Path, str, str, str]:
    def fetch(folder: Path) -> None:
        if isinstance(file, Pinned):
            archive.fetch_pinned(file, folder)
        else:
            archive.fetch(file, folder)

    ingredients = {"name": base.name, "version": file.version, "sha256": file.sha256}
    what = f"fetching {file.name}"
    entry = cache.make("source", ingredients, fetch, what=what, resume=True)
    return _from_cache(base, entry)


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
    ingredients = {"name": name, "sha256": digest, "recipe": 2 if name == "qemu" else 1}
    return cache.make("tree", ingredients, unpack, what=what).path / "tree"


def _untar(archive: Path, target: Path) -> None:
    target.mkdir()
    proc.run(
        ["tar", "-xf", archive, "-C", target, "--strip-components=1", "--no-same-owner"],
        deadline_s=1800,
        hint="the archive is broken: remove it ('nearmetal cache --prune') and run again",
    )


def _qemu_placeholders(tree: Path) -> None:
    """Empty files for the firmware that QEMU's build lists but Debian's tarball lacks.

    pc-bios/meson.build unpacks the edk2 images, and pc-bios/dtb/meson.build names the
    device trees where there is no dtc; neither asks whether the files are there. They are
    not installed.
    """
    text = (tree / "pc-bios" / "meson.build").read_text()
    for name in sorted(set(re.findall(r"'(edk2-[a-z0-9_-]+\.fd)'", text))):
        path = tree / "pc-bios" / f"{name}.bz2"
        if not path.exists():
            # bzip2's file with nothing in it: magic, block size 9, end-of-stream, CRC 0
            path.write_bytes(b"BZh9\x17\x72\x45\x38\x50\x90\x00\x00\x00\x00")
    for source in (tree / "pc-bios" / "dtb").glob("*.dts"):
        source.with_suffix(".dtb").touch()


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
