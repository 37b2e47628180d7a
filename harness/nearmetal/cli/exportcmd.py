# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.cache import Cache
from ..core.errors import Exit
from ..core.settings import Settings
from ..patches import series
from ..upstream import sendcmd
from .common import Commands, common_options


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "export",
        "write a series as mails that 'git send-email' sends and b4 reads",
        command,
        common_options(only=("cache_dir", "source_dir", "linux_tree", "qemu_tree", "jobs")),
    )
    one.description = (
        "Write the cover letter and the patches of a series as mails, with you as their author "
        "and your Signed-off-by, to a new folder. The series is validated first, as 'validate "
        "--quick' does (minutes), and checkpatch is run on the mails. To: are the maintainers, "
        "Cc: reviewers and lists, from the tree's scripts/get_maintainer.pl. With --linux-tree "
        "or --qemu-tree, a git tree with the right commit checked out, the cover letter says "
        "base-commit. Nothing is sent: 'git send-email DIR/*.patch' does that."
    )
    one.add_argument("--series", required=True, metavar="NAME", help="which series")
    one.add_argument(
        "--tree",
        choices=series.TREES,
        help="only the part for this tree (default: all, each in a folder of its own)",
    )
    one.add_argument(
        "--signoff",
        required=True,
        metavar="'NAME <MAIL>'",
        help="the sender: author and Signed-off-by of the patches and of the cover letter",
    )
    one.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    one.add_argument(
        "-v",
        "--revision",
        type=int,
        metavar="N",
        help="[PATCH vN]; the cover letter must then say what changed (default: what b4 notes"
        " in cover.txt, or 1)",
    )
    one.add_argument(
        "--changes",
        type=Path,
        metavar="FILE",
        help="what changed, instead of what is below the line '---' in cover.txt; an item"
        " '- patch 3: text' is also put below the '---' of that patch",
    )
    one.add_argument("--rfc", action="store_true", help="[PATCH RFC]")
    one.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="WORD",
        help="[PATCH WORD], such as RESEND; may be repeated",
    )
    one.add_argument(
        "--no-maintainers", action="store_true", help="leave To: and Cc: out of the mails"
    )
    one.add_argument(
        "--unvalidated",
        action="store_true",
        help="skip validation, and write the mails even if checkpatch finds errors",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    request = sendcmd.Request(
        name=options.series,
        signoff=options.signoff,
        output=options.output,
        tree=options.tree,
        revision=options.revision,
        prefixes=(*(["RFC"] if options.rfc else []), *options.prefix),
        changes=options.changes,
        validated=not options.unvalidated,
        maintainers=not options.no_maintainers,
    )
    for path in sendcmd.export(conf, Cache(conf.cache_dir).open(), request):
        print(path)
    return Exit.OK
