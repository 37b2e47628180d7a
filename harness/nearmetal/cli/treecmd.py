# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``tree``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit
from ..core.settings import Settings
from ..patches import series
from ..upstream import bases, trees
from .common import Commands, Parser, common_options

TREE_WORDS = ("testbed", *series.TREES)


def add(commands: Commands) -> None:
    """Add the command and its own commands."""
    one = commands.sub.add_parser(
        "tree",
        help="work on the patches as git commits: check out, look, export",
        description="The patches as git commits: the unpatched sources in one commit, then each"
        " series, which begins with an empty commit that holds its cover letter. Change them with"
        " git as usual, and write patches/ with 'tree export'.",
    )
    sub = one.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    actions = Commands(sub, common_options(only=()), commands.top)
    sources = common_options(only=("cache_dir", "source_dir", "linux_tree", "qemu_tree"))
    _tree(actions.add("checkout", "make the work tree", checkout, sources))
    shown = actions.add("status", "show what an export would change", status)
    _tree(shown)
    shown.add_argument("--json", action="store_true", help="print JSON, for programs")
    _tree(actions.add("export", "write patches/ from the work tree", export))
    new = actions.add("new-series", "begin a series at the tip of the work tree", new_series)
    _tree(new)
    new.add_argument("name", metavar="NAME", help="the name of the series, such as my-series")
    new.add_argument(
        "--title",
        required=True,
        help="the subject of its cover letter, such as 'KVM: Do something better'",
    )


def _tree(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "tree",
        choices=TREE_WORDS,
        metavar="TREE",
        help=f"whose patches ({', '.join(TREE_WORDS)}); testbed: those of both emulators",
    )
    one.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="the work tree (default: trees/TREE in the repository)",
    )


def _folders(
    options: argparse.Namespace, conf: Settings
) -> Iterator[tuple[series.TreeName, Path, Sequence[series.Series]]]:
    """The trees that are meant, their folders, and all series."""
    every = series.load_series(conf.repo / "patches")
    for name in trees.trees_of(options.tree):
        if options.tree == "testbed" and not [one for one in every if one.tree == name]:
            continue
        yield name, options.dir or trees.default_folder(conf.repo, name), every


def checkout(options: argparse.Namespace, conf: Settings) -> int:
    """Make the work trees."""
    cache = Cache(conf.cache_dir).open()
    for name, folder, every in _folders(options, conf):
        with ui.step(f"checking out {name}"):
            done = bases.checkout(conf, cache, name, every, folder)
        print(done.folder)
    return Exit.OK


def status(options: argparse.Namespace, conf: Settings) -> int:
    """Show what an export would change."""
    folders = [folder for _, folder, _ in _folders(options, conf)]
    if options.json:
        found = [asdict(trees.status_of(folder, conf.repo / "patches")) for folder in folders]
        print(json.dumps({"trees": found}, indent=1))
        return Exit.OK
    for folder in folders:
        print(trees.tree_status(folder, conf.repo / "patches"))
    return Exit.OK


def export(options: argparse.Namespace, conf: Settings) -> int:
    """Write patches/."""
    for _, folder, every in _folders(options, conf):
        for one in trees.tree_export(folder, conf.repo / "patches", every):
            state = "written" if one.changed else "unchanged"
            print(f"{one.folder}: {one.patches} patches, {state}")
    return Exit.OK


def new_series(options: argparse.Namespace, conf: Settings) -> int:
    """Begin a series."""
    for _, folder, _ in _folders(options, conf):
        print(trees.tree_new_series(folder, options.name, options.title))
    return Exit.OK
