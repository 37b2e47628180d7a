# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``validate --onto``: which tree is meant, and what of the series fits it."""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..core import ui
from ..core.cache import Cache, remove
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..patches.series import TreeName
from ..sources.archive import Source, known_releases, obtain, obtain_release
from . import bases, identity, onto, validate
from .onto import Commit, Tried
from .trees import Git

_NAMES: tuple[TreeName, ...] = ("linux", "qemu")

_VERSION = re.compile(r"^(?:(?P<name>linux|qemu)[-_ ]?)?v?(?P<version>\d+(?:\.\d+)+)$")


@dataclass(frozen=True)
class Target:
    """The tree that series are tried on: ``linux`` or ``qemu``, as a commit."""

    name: str
    commit: Commit


def target_of(settings: Settings, cache: Cache, where: str, tree: TreeName | None) -> Target:
    """The tree that ``where`` means: a git tree's HEAD, a folder, a tarball, or a release.

    Raises UsageError for what is neither, or neither Linux nor QEMU.
    """
    path = Path(where).expanduser()
    if path.exists():
        return _own(settings, cache, path)
    return _release(settings, cache, where, tree)


def _own(settings: Settings, cache: Cache, path: Path) -> Target:
    if (path / ".git").exists():
        git = Git(path.resolve())
        commit = git.ask("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if commit is None:
            raise UsageError(f"{path} has no commit at HEAD", hint="check one out")
        name = _one_of(lambda file: git.ask("cat-file", "-e", f"HEAD:{file}") is not None, path)
        if git.text("status", "--porcelain", "--untracked-files=no"):
            ui.warn(f"{path} has changes that are not committed; the series are tried on its HEAD")
        words = git.ask("describe", "--always", "--tags") or commit[:12]
        objects = git.text("rev-parse", "--path-format=absolute", "--git-path", "objects")
        return Target(name, Commit(f"{path} ({words})", Path(objects), commit))
    if path.is_dir():
        name = _one_of(lambda file: (path / file).is_file(), path)
    else:
        inside = _in_tarball(path)
        name = _one_of(lambda file: file in inside, path)
    own = (
        replace(settings, linux_tree=path) if name == "linux" else replace(settings, qemu_tree=path)
    )
    return _as_commit(cache, obtain(own, cache, name), f"{path}")


def _in_tarball(path: Path) -> set[str]:
    """The names of the files in a tarball, without the folder that all are in."""
    try:
        with tarfile.open(path) as archive:
            return {member.name.removeprefix("./").partition("/")[2] for member in archive}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(
            f"{path} is not a tarball: {error}",
            hint="name a git tree, a folder, a tarball or a release",
        ) from None


def _one_of(has: Callable[[str], bool], path: Path) -> str:
    lacks = {name: identity.missing_in(name, has) for name in _NAMES}
    for name, file in lacks.items():
        if file is None:
            return name
    words = ", or ".join(f"of {name}: it has no {file}" for name, file in lacks.items())
    raise UsageError(
        f"{path} is not a tree {words}", hint="name the top folder of a tree of Linux or QEMU"
    )


def _release(settings: Settings, cache: Cache, where: str, tree: TreeName | None) -> Target:
    known = [one for one in known_releases() if one[0] in _NAMES]
    listed = ", ".join(f"{name} {version}" for name, version in known)
    match = _VERSION.match(where)
    if match is None:
        raise UsageError(
            f"{where} is not a git tree, folder, tarball or release",
            hint=f"no file or folder has this name; known releases: {listed}",
        )
    wanted = match["name"] or (bases.SOURCES[tree] if tree else None)
    parts = match["version"].split(".")
    # 10.2.2 is one of 10.2, if no other is known by that name
    for version in dict.fromkeys((match["version"], ".".join(parts[:2]))):
        names = [one for one, other in known if other == version and wanted in (None, one)]
        if len(names) == 1:
            source = obtain_release(settings, cache, names[0], version)
            return _as_commit(cache, source, f"{source.name} {_upstream(source.version)}")
        if len(names) > 1:
            raise UsageError(
                f"{version} is a release of {' and of '.join(names)}",
                hint=f"say which: {' or '.join(f'{name}-{version}' for name in names)}",
            )
    raise UsageError(
        f"no release {where} is known", hint=f"known: {listed}; or name a tree that you have"
    )


def _upstream(version: str) -> str:
    """10.2.2 of Debian's 1:10.2.2+ds-1."""
    match = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return match[1] if match else version


def _as_commit(cache: Cache, source: Source, name: str) -> Target:
    tree: TreeName = "linux" if source.name == "linux" else "qemu"
    return Target(source.name, _commit_of(bases.repository_of(cache, source, tree), name))


def _commit_of(repository: Path, name: str) -> Commit:
    return Commit(name, repository / "objects", Git(repository).text("rev-parse", "HEAD"))


def run(
    settings: Settings,
    cache: Cache,
    where: str,
    *,
    patches: Path | None,
    tree: TreeName | None,
    only: str | None,
    as_json: bool = False,
    strict: bool = False,
) -> tuple[str, int]:
    """Try the series that are for the tree ``where``: the text to print, and the exit status.

    Without ``tree`` only what is for users is tried. The status is 0 whatever fits, and 1 if a
    series does not apply to its own base, or, with ``strict``, if a patch conflicts. Raises
    UsageError where no series is for that tree.
    """
    directory = patches or settings.repo / "patches"
    candidates, _ = validate.find_candidates(directory, tree=tree, only=only)
    target = target_of(settings, cache, where, tree)
    chosen = [
        one
        for one in candidates
        if bases.SOURCES[one.series.tree] == target.name and (tree or one.series.is_product)
    ]
    if not chosen:
        words = only or tree or str(directory)
        raise UsageError(
            f"{words} has no patches for {target.name}, and {where} is {target.name}",
            hint="name another series, or another tree",
        )
    tried: list[Tried] = []
    made_for: dict[str, str] = {}
    broken: UsageError | None = None
    scratch = cache.root / "tmp" / f"onto-{target.name}"
    with cache.lock(scratch.name):
        for one in chosen:
            source, repository = bases.repository(settings, cache, one.series.tree)
            base = _commit_of(repository, f"{source.name} {_upstream(source.version)}")
            made_for[one.series.label] = base.name
            if scratch.exists():
                remove(scratch)
            scratch.mkdir()
            try:
                with ui.step(f"try {one.series.label} on {target.commit.name}"):
                    tried += _try(one, base, target.commit, scratch)
            except UsageError as error:
                broken = error
                ui.warn(f"{one.series.label}: {error.message}")
        shutil.rmtree(scratch, ignore_errors=True)
    if broken is not None and not tried:
        raise broken
    text = (
        onto.to_json(tried, target.commit.name)
        if as_json
        else onto.render(tried, made_for, target.commit.name)
    )
    failed = broken is not None or (strict and any(one.result == "conflicts" for one in tried))
    return text, int(Exit.FAILED if failed else Exit.OK)


def _try(
    candidate: validate.Candidate, base: Commit, target: Commit, scratch: Path
) -> tuple[Tried, ...]:
    git = onto.work_repository(scratch, (base.objects, target.objects))
    series = candidate.series
    return onto.try_series(git, series.label, base, target, series.patches(), candidate.below)
