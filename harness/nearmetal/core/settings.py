# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are: the repository, the cache, the user's own sources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .schema import StrictLoader
from .text import nearest


def repository() -> Path:
    """The checkout that this package belongs to (it holds patches/ and guest-images/)."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "patches" / "series.yaml").is_file():
            return folder
    raise UsageError(
        "the nearmetal package is not in its repository",
        hint="install it with: pip install --editable .",
    )


CONFIG_KEYS = ("cache_dir", "results_dir", "jobs", "inventory")
"""What a user's configuration file may hold."""


def config_file() -> Path:
    """The user's configuration file, which need not be there (XDG base directories)."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "nearmetal" / "config.yaml"


def user_config() -> Mapping[str, Any]:
    """What the user's configuration file says; nothing where there is none.

    Paths are absolute: relative ones are of the folder of the file. Raises UsageError for a file
    that cannot be read, an unknown key, and a value of the wrong kind.
    """
    path = config_file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="correct or remove it") from None
    try:
        document = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{path}: not YAML: {' '.join(str(error).split())}",
            hint="write lines such as 'jobs: 4'",
        ) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: not a mapping", hint="write lines such as 'jobs: 4'")
    found: dict[str, Any] = {}
    for key, value in document.items():
        if key not in CONFIG_KEYS:
            raise UsageError(f"{path}: unknown key '{key}'", hint=nearest(str(key), CONFIG_KEYS))
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (number if key == "jobs" else isinstance(value, str) and value):
            kind = "a number of 1 or more" if key == "jobs" else "a path"
            raise UsageError(
                f"{path}: {key} is not {kind}: {value!r}",
                hint="docs/commands.md describes the file",
            )
        found[key] = value if key == "jobs" else path.parent / Path(value).expanduser()
    return found


def default_cache_dir() -> Path:
    """$NEARMETAL_CACHE, the user's configuration, or nearmetal below the user's cache directory."""
    if own := os.environ.get("NEARMETAL_CACHE"):
        return Path(own).expanduser()
    if (configured := user_config().get("cache_dir")) is not None:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nearmetal"


def default_results_dir(repo: Path) -> Path:
    """That of the user's configuration, or results/ in the repository."""
    return Path(user_config().get("results_dir", repo / "results"))


def default_jobs() -> int:
    """That of the user's configuration, or the CPUs there are."""
    return int(user_config().get("jobs", os.cpu_count() or 2))


def default_inventory() -> Path:
    """inventory.yaml in the current folder, else that of the user's configuration."""
    here = Path("inventory.yaml")
    return here if here.exists() else Path(user_config().get("inventory", here))


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
