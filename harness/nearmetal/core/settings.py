# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are: the repository, the cache, the user's own sources."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError


def repository() -> Path:
    """The checkout that this package belongs to (it holds patches/ and guest-images/)."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "patches" / "series.yaml").is_file():
            return folder
    raise UsageError(
        "the nearmetal package does not lie in its repository",
        hint="install it with: pip install --editable .",
    )


def default_cache_dir() -> Path:
    """$NEARMETAL_CACHE, else nearmetal below the user's cache directory (XDG base directories)."""
    if own := os.environ.get("NEARMETAL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nearmetal"


@dataclass(frozen=True)
class Settings:
    """What every command needs to know.

    ``source_dir`` holds copies of source archives that are used before any download;
    ``linux_tree`` and ``qemu_tree`` are a git tree, a folder or a tarball of the user's,
    built as they stand. ``host_kernel``, ``guest_kernel`` and ``qemu_build`` are folders in which
    the user has built. ``jobs`` is the number of processes a build may use.
    """

    repo: Path
    cache_dir: Path
    results_dir: Path
    source_dir: Path | None = None
    linux_tree: Path | None = None
    qemu_tree: Path | None = None
    host_kernel: Path | None = None
    guest_kernel: Path | None = None
    qemu_build: Path | None = None
    jobs: int = 2
    testbed: str = "amd"

    @property
    def has_own(self) -> bool:
        """Whether a kernel or QEMU of the user's is measured, as it stands: without our patches."""
        own = (self.linux_tree, self.qemu_tree, self.host_kernel, self.guest_kernel)
        return any(one is not None for one in (*own, self.qemu_build))
