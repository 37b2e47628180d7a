# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``tree``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..patches import series
from ..upstream import bases, trees
from .common import Commands

TREE_WORDS = ("testbed", *series.TREES)


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add("tree", "the patches as git commits: check out, look, export", command)
    one.description = (
        "The patches as git commits: the pristine sources in one commit, then each series, headed"
        " by an empty commit with its cover letter. Change them with git as you are used to, and"
        " write patches/ back with 'tree export'."
    )
    one.add_argument(
        "action",
        choices=("checkout", "status", "export", "new-series"),
        help="checkout: make the work tree; status: what an export would change; export: write"
        " patches/ back; new-series: begin one at the tip",
    )
    one.add_argument(
        "tree",
        choices=TREE_WORDS,
        help="whose patches; testbed: those of both emulators, which users do not get",
    )
    one.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="the work tree (default: trees/<tree> in the repository)",
    )
    one.add_argument("--name", help="new-series: the name of the series")
    one.add_argument("--title", help="new-series: the subject of its cover letter")


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    patches = conf.repo / "patches"
    every = series.load_series(patches)
    cache = Cache(conf.cache_dir).open()
    for name in trees.trees_of(options.tree):
        if options.tree == "testbed" and not [one for one in every if one.tree == name]:
            continue
        folder = options.dir or trees.default_folder(conf.repo, name)
        if options.action == "checkout":
            with ui.step(f"checking out {name}"):
                done = bases.checkout(conf, cache, name, every, folder)
            print(done.folder)
        elif options.action == "status":
            print(trees.tree_status(folder, patches))
        elif options.action == "export":
            for one in trees.tree_export(folder, patches, every):
                state = "written" if one.changed else "unchanged"
                print(f"{one.folder}: {one.patches} patches, {state}")
        else:
            if not options.name or not options.title:
                raise UsageError(
                    "new-series needs --name and --title",
                    hint="--name my-series --title 'KVM: Do something better'",
                )
            print(trees.tree_new_series(folder, options.name, options.title))
    return Exit.OK
