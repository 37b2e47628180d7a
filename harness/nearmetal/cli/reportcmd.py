# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``report`` and ``compare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core import ui
from ..core.errors import Exit
from ..core.settings import Settings
from ..judging import judge
from ..report import compare, document, tables
from .common import Commands, folder_of


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add("report", "show a run's report again, or write its page anew", command)
    one.add_argument(
        "run", nargs="?", default="latest", help="a run's name or folder (default: latest)"
    )
    one.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="put the table of results into this file, between its markers",
    )
    one.add_argument("--html", action="store_true", help="write report.html and junit.xml anew")

    one = commands.add("compare", "compare the measurements of two runs", compare_runs)
    one.add_argument("a", help="a run's name or folder")
    one.add_argument("b", help="another")
    one.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="a change of the median within this share is none (default: 0.1)",
    )
    one.add_argument(
        "--mix-provenance",
        action="store_true",
        help="allow emulated figures beside those of hardware",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    folder = folder_of(conf, options.run)
    whole = document.read(folder)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        document.write_atomically(options.readme, tables.update_readme(text, whole))
    if options.html:
        document.write(whole, folder if folder.is_dir() else folder.parent)
    ui.console.print(tables.render_terminal(whole))
    return judge.exit_status(whole.checks)


def compare_runs(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    first, second = (document.read(folder_of(conf, name)) for name in (options.a, options.b))
    result = compare.compare(
        first, second, tolerance=options.tolerance, mix_provenance=options.mix_provenance
    )
    if sys.stdout.isatty():
        ui.console.print(compare.render_rich(result))
    else:
        print(compare.render_text(result))
    return Exit.OK
