# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``validate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.cache import Cache
from ..core.errors import UsageError
from ..core.settings import Settings
from ..patches import series
from ..upstream import bases, ontocmd
from .common import Commands, common_options


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "validate",
        "check patches by the rules of their maintainers",
        command,
        common_options(only=("cache_dir", "source_dir", "linux_tree", "qemu_tree", "jobs")),
    )
    one.description = (
        "Apply each series to the sources that it is made for, alone and all stacked, run"
        " checkpatch, look at cover letters and documentation, and build what each patch touches"
        " with its parent's warnings left out (minutes; a second time only what changed)."
        " docs/patches.md has the rules. Exit status 1: there are errors."
    )
    one.add_argument(
        "--patches",
        type=Path,
        metavar="DIR",
        help="a directory of patches (default: patches/ in the repository)",
    )
    one.add_argument(
        "--tree",
        choices=series.TREES,
        help="only the series for this tree; a folder that holds patches alone needs it",
    )
    one.add_argument("--series", metavar="NAME", help="only this series")
    extent = one.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", action="store_true", help="leave out the build of all series stacked"
    )
    extent.add_argument(
        "--full",
        action="store_true",
        help="also sparse, coccicheck, options off and on, built in, arm64 and i386, the"
        " documentation, check-uapi and qtests (hours; a tool that is missing is an error)",
    )
    extent.add_argument(
        "--onto",
        metavar="TREE",
        help="instead: try the patches on another tree, and say of each whether it applies, merges"
        " three ways, or conflicts and where. TREE is a git tree (its HEAD is taken), a folder or"
        " a tarball of Linux or QEMU, or a release, such as 10.2. Nothing is built, and nothing is"
        " written to TREE",
    )
    one.add_argument("--json", action="store_true", help="print JSON, for programs")
    one.add_argument(
        "--fail-on-conflict",
        action="store_true",
        help="with --onto: exit status 1 if a patch conflicts (otherwise 0)",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    if options.onto is not None:
        text, status = ontocmd.run(
            conf,
            Cache(conf.cache_dir).open(),
            options.onto,
            patches=options.patches,
            tree=options.tree,
            only=options.series,
            as_json=options.json,
            strict=options.fail_on_conflict,
        )
        print(text)
        return status
    if options.fail_on_conflict:
        raise UsageError(
            "--fail-on-conflict says how --onto ends", hint="add --onto TREE, or leave it out"
        )
    text, status = bases.run_validate(
        conf,
        Cache(conf.cache_dir).open(),
        patches=options.patches,
        tree=options.tree,
        only=options.series,
        quick=options.quick,
        full=options.full,
        as_json=options.json,
    )
    print(text)
    return status
