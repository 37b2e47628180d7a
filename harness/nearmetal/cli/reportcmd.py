# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``report`` and ``compare``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from ..core import ui
from ..core.errors import Exit, UsageError
from ..core.model import Report
from ..core.settings import Settings
from ..judging import judge
from ..judging.again import judge_again
from ..judging.load import load_checks
from ..patches.series import features, load_series
from ..report import by_route, compare, document, markdown, tables
from ..report.text import render_text
from .common import Commands, common_options, folder_of

RESULTS = ("results_dir",)


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add("report", "show the results of a run", command, common_options(only=RESULTS))
    one.description = (
        "Show the results of a run as a table, or in another form. Exit status: 0, whatever the"
        " run's verdict; with --checks 1 if one of them fails."
    )
    one.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        default="latest",
        help="a run's name or folder (default: latest)",
    )
    form = one.add_mutually_exclusive_group()
    form.add_argument(
        "--text",
        action="store_true",
        help="a plain-text table of vanilla, off and on for each series, to paste into a mail",
    )
    form.add_argument("--html", action="store_true", help="write report.html and junit.xml again")
    form.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="replace the table of results between the markers of this file",
    )
    form.add_argument(
        "--checks",
        action="append",
        type=Path,
        metavar="FILE",
        help="judge the run's measurements by these checks; may be repeated; nothing is written",
    )
    one.add_argument(
        "--series",
        action="append",
        default=[],
        metavar="NAME",
        help="with --text: only this series; may be repeated",
    )
    one.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="with --text: this metric instead of the series' headlines; may be repeated",
    )

    one = commands.add(
        "compare",
        "show what changed between two runs",
        compare_runs,
        common_options(only=RESULTS),
    )
    one.add_argument("a", metavar="RUN1", help="the run before: its name or folder")
    one.add_argument("b", metavar="RUN2", nargs="?", help="the run after")
    one.add_argument(
        "--routes",
        action="store_true",
        help="peer-to-peer figures of one run or two: bare metal, VM redirected and VM direct"
        " beside each other",
    )
    one.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="ignore relative changes of the median up to SHARE (default: 0.1)",
    )
    one.add_argument("--all", action="store_true", help="also show what did not change")
    one.add_argument(
        "--fail-on-worse", action="store_true", help="exit status 1 if something got worse"
    )
    one.add_argument("--json", action="store_true", help="print JSON, for programs")
    one.add_argument(
        "--mix-provenance",
        action="store_true",
        help="compare emulated figures with those of hardware",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    if (options.series or options.metric) and not options.text:
        raise UsageError("--series and --metric choose rows of --text", hint="add --text")
    folder = folder_of(conf, options.run)
    whole = with_series(document.read(folder), conf)
    if options.text:
        print(render_text(whole, options.series, options.metric))
    elif options.readme:
        text = options.readme.read_text(encoding="utf-8")
        document.write_atomically(options.readme, markdown.update_readme(text, whole))
    elif options.html:
        document.write_pages(whole, folder if folder.is_dir() else folder.parent)
    elif options.checks:
        results = judge_again(whole, load_checks(options.checks))
        ui.out.print(tables.render_checks(dataclasses.replace(whole, checks=results)))
        return judge.exit_status(results)
    else:
        ui.out.print(tables.render_terminal(whole))
    return Exit.OK


def with_series(report: Report, conf: Settings) -> Report:
    """A report that says what its series are for; an old one has that of the series at hand."""
    if report.series:
        return report
    return dataclasses.replace(report, series=features(load_series(conf.repo / "patches")))


def compare_runs(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    if options.routes:
        names = [name for name in (options.a, options.b) if name is not None]
        print(by_route.render([document.read(folder_of(conf, name)) for name in names]), end="")
        return Exit.OK
    if options.b is None:
        raise UsageError(
            "compare needs two runs", hint="'nearmetal list runs'; --routes takes one, too"
        )
    first, second = (document.read(folder_of(conf, name)) for name in (options.a, options.b))
    result = compare.compare(
        first, second, tolerance=options.tolerance, mix_provenance=options.mix_provenance
    )
    if options.json:
        print(compare.render_json(result, every=options.all))
    elif sys.stdout.isatty():
        ui.out.print(compare.render_rich(result, every=options.all))
    else:
        print(compare.render_text(result, every=options.all))
    worse = any(row.verdict == "worse" for row in result.rows)
    return Exit.FAILED if options.fail_on_worse and worse else Exit.OK
