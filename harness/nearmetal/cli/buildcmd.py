# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``build``."""

from __future__ import annotations

import argparse

from rich.table import Table

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit
from ..core.settings import Settings
from ..machines.lab import Lab
from ..patches import series, variants
from .common import Commands, listed, variants_of


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add("build", "fetch the sources and build all that a run needs", command)
    one.add_argument(
        "--variant",
        action="append",
        metavar="VARIANT",
        help="only these variants (vanilla, off, on); a list with commas",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    every = series.load_series(conf.repo / "patches")
    plan = variants.configs(
        every, variants_of(listed(options.variant)) or variants.available(every)
    )
    lab = Lab.build(conf, Cache(conf.cache_dir).open(), plan)
    table = Table("role", "variant", "source", "sha256")
    for record in lab.records:
        table.add_row(record.role, record.variant, record.source, record.sha256[:16])
    ui.out.print(table)
    return Exit.OK
