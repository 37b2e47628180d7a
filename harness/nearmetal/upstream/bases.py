# SPDX-License-Identifier: GPL-2.0-or-later
"""The bases of the work trees: sources from the cache, as repositories and as builds.

This is where the patch layer (trees, validate), which knows of no cache, meets the sources.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import builds
from ..builds import newer
from ..core.cache import Cache
from ..core.settings import Settings
from ..patches.series import Series, TreeName
from ..sources.archive import Source, obtain
from . import findings as findings_as
from . import form, identity, trees, validate
from .validation import full as validation

SOURCES: dict[TreeName, str] = {
    "linux": "linux",
    "qemu": "qemu",
    "testbed-qemu": "qemu",
    "testbed-bochs": "bochs",
}


def repository(settings: Settings, cache: Cache, tree: TreeName) -> tuple[Source, Path]:
    """The tree's sources, and a git repository with them as its one commit (cached)."""
    source = obtain(settings, cache, SOURCES[tree])
    return source, repository_of(cache, source, tree)


def repository_of(cache: Cache, source: Source, tree: TreeName) -> Path:
    """A git repository with a source as its one commit (cached)."""

    def build(work: Path) -> None:
        trees.make_base_repository(source.folder, tree, source.version, work / "git")

    ingredients = {"source": source.ingredients(), "tree": tree, "recipe": 1}
    what = f"committing {source.name} {source.version} as the base of {tree}"
    return cache.make("repository", ingredients, build, what=what).path / "git"


def checkout(
    settings: Settings, cache: Cache, tree: TreeName, every: Sequence[Series], target: Path
) -> trees.Checkout:
    """The work tree of ``tree`` with all its series, in ``target``."""
    source, repo = repository(settings, cache, tree)
    with cache.lock(f"worktree-{tree}"):
        return trees.tree_checkout(
            tree, source.folder, source.version, every, target, base_repository=repo
        )


def setup(settings: Settings, cache: Cache, tree: TreeName) -> validate.BuildSetup | None:
    """How the objects of a tree are built when its patches are validated."""
    env = builds.ccache(cache, cache.root / "validate" / tree)
    if tree == "linux":
        fragment = settings.repo / "guest-images" / "kernel" / "base.config"
        return validate.LinuxBuild(fragment, settings.jobs, ("CC=ccache gcc",), environment=env)
    if tree in ("qemu", "testbed-qemu"):
        python = builds.qemu_python(cache)
        arguments = (f"--python={python}", "--cc=ccache gcc", *builds.QEMU_CONFIGURE)
        path = f"{python.parent}:{os.environ['PATH']}"
        return validate.QemuBuild(arguments, settings.jobs, {**env, "PATH": path})
    return None


def _is_given(settings: Settings, tree: TreeName) -> bool:
    """Whether the user named the sources: he may well try a series on another version."""
    return (settings.linux_tree if tree == "linux" else settings.qemu_tree) is not None


def _versions(
    candidates: Sequence[validate.Candidate], tree: TreeName, version: str, *, given: bool
) -> list[validate.Finding]:
    """The series whose ``base:`` in series.yaml is not the version of the sources."""
    return [
        validate.Finding(
            one.series.label,
            "",
            "base",
            "note" if given else "error",
            f"series.yaml says its base is {one.series.base}, the sources are {version}",
        )
        for one in candidates
        if one.ours and one.series.tree == tree and not identity.fits(version, one.series.base)
    ]


def abidiff(settings: Settings, cache: Cache) -> Path:
    """The abidiff that Linux' scripts/check-uapi.sh takes (2.4): the machine's own, or Debian 13's.

    Raises EnvironmentBroken where neither can be had.
    """
    here = shutil.which("abidiff")
    if here and newer.version(here) >= (2, 4):
        return Path(here)
    return newer.programs(settings, cache, "abigail-tools", ["abidiff"]) / "abidiff"


def run_validate(
    settings: Settings,
    cache: Cache,
    *,
    patches: Path | None,
    tree: TreeName | None,
    only: str | None,
    quick: bool,
    full: bool = False,
    as_json: bool = False,
) -> tuple[str, int]:
    """Validate a directory of patches: the text to print, and the exit status."""
    directory = patches or settings.repo / "patches"
    candidates, early = validate.find_candidates(directory, tree=tree, only=only)
    findings = list(early)
    needed = {}
    for name in validate.trees_needed(candidates):
        source, repo = repository(settings, cache, name)
        version = identity.version_in(name, source.folder)
        findings += _versions(candidates, name, version, given=_is_given(settings, name))
        needed[name] = validate.Base(
            name, source.folder, source.version, repo, setup(settings, cache, name)
        )
    scratch = cache.root / "validate"
    with contextlib.ExitStack() as locks:
        for name in sorted(
            needed
        ):  # in one order: two that need two trees wait, never for each other
            locks.enter_context(cache.lock(f"validate-{name}"))
        scratch.mkdir(exist_ok=True)
        found = [*findings, *form.check_form(candidates)]
        found += validate.validate(candidates, needed, scratch, quick=quick)
        if full:
            found += validation.full(
                candidates, needed, scratch, found, abidiff=lambda: abidiff(settings, cache)
            )
    render = findings_as.to_json if as_json else validate.render_findings
    return render(found, candidates), int(validate.exit_status(found))
