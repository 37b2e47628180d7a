# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own selftests of KVM, VFIO and iommufd, linked statically."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..core.cache import Cache
from ..core.settings import Settings
from ..sources.archive import Source
from . import recipe


def kernel_selftests(
    settings: Settings,
    cache: Cache,
    source: Source,
    part: str,
    programs: Sequence[str],
    *,
    patches: Sequence[Path] = (),
) -> Path:
    """The folder of selftests of a tree, tools/testing/selftests/``part``, linked statically.

    ``part`` is ``kvm``, ``vfio`` or ``iommu``; ``programs`` are names as in its Makefile, such as
    ``x86/userspace_io_test``, and lie in the folder by their last part. Raises BuildFailed.
    """
    what = f"the {part.upper()} selftests of Linux {source.version}"

    def build(work: Path) -> None:
        with recipe.workshop(cache, work, source, patches, what=what) as shop:
            src, out = shop.src, shop.out
            headers: list[str | Path] = [
                *("make", "-s", "-C", src, "headers_install"),
                f"INSTALL_HDR_PATH={work / 'usr'}",
            ]
            tests: list[str | Path] = [
                *("make", "-s", f"-j{settings.jobs}", "-C", src / "tools/testing/selftests" / part),
                *("CC=ccache gcc", "LDFLAGS=-static -pthread", f"OUTPUT={out}"),
                f"KHDR_INCLUDES=-isystem {work / 'usr' / 'include'}",
                *(str(out / program) for program in programs),
            ]
            for words in (headers, tests):
                shop.run(words, deadline_s=1800)
            for program in programs:
                shutil.copy(out / program, work / Path(program).name)
        shutil.rmtree(work / "usr")

    ingredients = {
        "source": source.ingredients(),
        "patches": recipe.digests(patches),
        "programs": list(programs),
        "compiler": recipe.compiler(),
        "recipe": 1,
    }
    # what there was before there were others is found again by its old key
    if part != "kvm":
        ingredients["part"] = part
    what_made = f"building {part.upper()}'s selftests"
    return cache.make("selftests", ingredients, build, what=what_made).path
