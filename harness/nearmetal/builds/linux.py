# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux: allnoconfig with fragments laid over it, KVM as modules."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.cache import Cache, Stored, sha256_file, sha256_tree
from ..core.kconfig import lost_options
from ..core.settings import Settings
from ..patches.series import series_options
from ..sources.archive import Source
from . import recipe
from .recipe import BuildFailed

STAMPS = {
    "KBUILD_BUILD_USER": "nearmetal",
    "KBUILD_BUILD_HOST": "nearmetal",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_VERSION": "1",
}
"""What a kernel says of its build: always the same, so that the same source is the same image."""


@dataclass(frozen=True)
class Kernel:
    """A built kernel: the image, and its modules as a tree below ``modules``/lib/modules.

    ``sha256`` is over both.
    """

    image: Path
    modules: Path
    release: str
    sha256: str
    fresh: bool


def base_fragment(settings: Settings) -> Path:
    """The configuration of hosts and guests, to be laid over allnoconfig."""
    return settings.repo / "guest-images" / "kernel" / "base.config"


def make_line(shop: recipe.Workshop) -> list[str]:
    """make for a kernel in a workshop; targets are to be added."""
    line = ["make", "-s", "-C", str(shop.src), f"O={shop.out}"]
    return [*line, "CC=ccache gcc", "HOSTCC=ccache gcc"]


def kernel(
    settings: Settings,
    cache: Cache,
    source: Source,
    *,
    patches: Sequence[Path] = (),
    fragments: Sequence[Path] | None = None,
) -> Kernel:
    """Build a kernel: allnoconfig with the fragments laid over it.

    Options that a series adds are in a fragment beside its patches (series.SERIES_OPTIONS).

    Raises BuildFailed with the compiler's error, or with the options that the
    configuration dropped silently (a dependency that is missing).
    """
    if fragments is None:
        fragments = [base_fragment(settings)]
    wanted = "".join(path.read_text() for path in (*fragments, *series_options(patches)))
    what = f"Linux {source.version}"

    def build(work: Path) -> dict[str, Any]:
        with recipe.workshop(cache, work, source, patches, what=what) as shop:
            return {"release": _build(settings, work, shop, wanted)} | {
                "sha256": sha256_file(work / "bzImage")
            }

    ingredients = {
        "source": source.ingredients(),
        "patches": recipe.digests(patches),
        "fragment": wanted,
        "compiler": recipe.compiler(),
        "recipe": 1,
    }
    return stored(cache.make("kernel", ingredients, build, what=recipe.label(what, patches)))


def stored(done: Stored) -> Kernel:
    """A kernel of the cache's store: bzImage, modules, and meta with release and sha256."""
    modules = done.path / "modules"
    # KVM is a module: a patch in it leaves the image as it was, to the byte
    both = {"image": done.meta["sha256"], "modules": sha256_tree(modules)}
    digest = hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()
    return Kernel(done.path / "bzImage", modules, done.meta["release"], digest, done.fresh)


def unlink_build_links(modules: Path, release: str) -> None:
    """Remove what modules_install links to the build folder."""
    for link in (modules / "lib" / "modules" / release).glob("*"):
        if link.is_symlink():
            link.unlink()


def _build(settings: Settings, work: Path, shop: recipe.Workshop, wanted: str) -> str:
    """Configure, build, and put bzImage, config and modules into ``work``; the release."""
    (work / "fragment").write_text(wanted)
    env = {"KCONFIG_ALLCONFIG": str(work / "fragment"), **STAMPS}
    out = shop.out
    make = make_line(shop)
    shop.run([*make, "allnoconfig"], deadline_s=600, env=env)
    lost = lost_options(wanted, (out / ".config").read_text())
    if lost:
        raise BuildFailed(
            f"the kernel configuration drops {', '.join(lost)}",
            hint="a dependency is missing in guest-images/kernel; see the Kconfig",
        )
    jobs = f"-j{settings.jobs}"
    shop.run([*make, jobs, "bzImage", "modules"], deadline_s=recipe.BUILD_DEADLINE_S, env=env)
    install = [*make, "modules_install", f"INSTALL_MOD_PATH={work / 'modules'}"]
    shop.run(install, deadline_s=600, env=env)
    release = (out / "include" / "config" / "kernel.release").read_text().strip()
    shutil.copy(out / "arch" / "x86" / "boot" / "bzImage", work / "bzImage")
    shutil.copy(out / ".config", work / "config")
    unlink_build_links(work / "modules", release)
    return release
