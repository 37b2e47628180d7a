# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``history``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core import proc, ui
from ..core.errors import Exit, NearmetalError, UsageError
from ..core.settings import Settings
from ..core.text import nearest, number
from ..nights import changes
from ..nights.history import History, Night, of_report, opened
from ..report import document
from .common import Commands, Parser, common_options, folder_of

FILE_NAME = "history.sqlite"
RESULTS = ("results_dir",)


def add(commands: Commands) -> None:
    """Add the command and its own commands."""
    one = commands.sub.add_parser(
        "history",
        help="remember runs, and tell what changed since when",
        description="Keep the figures and verdicts of runs in one SQLite file, and hold each run"
        " to the good ones before it: exact counts by equality, others by their spread.",
    )
    sub = one.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    actions = Commands(sub, common_options(only=()), commands.top)

    def action(name: str, summary: str, handler: object) -> argparse.ArgumentParser:
        made = actions.add(name, summary, handler, common_options(only=RESULTS))  # type: ignore[arg-type]
        made.add_argument(
            "--file",
            type=Path,
            metavar="FILE",
            help=f"the history (default: {FILE_NAME} in the folder of the results)",
        )
        return made

    made = action("add", "add runs to the history", add_runs)
    made.description = (
        "Add runs, each with the project's commit at this time. A run that is there stays as it"
        " was. Exit status: 0, whatever the verdicts."
    )
    made.add_argument(
        "run",
        nargs="*",
        metavar="RUN",
        default=["latest"],
        help="a run's name or folder (default: latest)",
    )
    made.add_argument("--revision", help="the project's commit that was run (default: HEAD)")
    made = action("list", "list the runs of the history, the newest first", list_runs)
    made.add_argument("--limit", type=int, default=30, metavar="N", help="at most N (default: 30)")
    made = action("show", "hold a run to those before it", show)
    made.description = (
        "Show what changed in a run against the good ones before it, since when, and what else"
        " changed then. Exit status 1 if the run failed or something got worse."
    )
    made.add_argument(
        "run", nargs="?", metavar="RUN", default="latest", help="a run's name (default: latest)"
    )
    form = made.add_mutually_exclusive_group()
    form.add_argument(
        "--line", action="store_true", help="one line, for a mail's subject or a chat"
    )
    form.add_argument("--json", action="store_true", help="print JSON, for programs")
    made = action("trend", "show a figure over the runs", trend)
    made.add_argument("metric", metavar="METRIC", help="a measurement's name, such as lspci.exits")
    made.add_argument("--variant", metavar="NAME", help="only rows of this variant")
    made.add_argument("--limit", type=int, default=14, metavar="N", help="last N (default: 14)")
    made = action("accept", "take a run's figures for good though they changed", accept)
    made.add_argument("run", metavar="RUN", help="a run's name")


def file_of(options: argparse.Namespace, conf: Settings) -> Path:
    """The history's file."""
    return Path(options.file) if options.file else conf.results_dir / FILE_NAME


def revision_of(repo: Path) -> str:
    """The project's commit, ``-dirty`` behind it where files were changed; empty without git."""
    try:
        words = ["git", "-C", str(repo), "describe", "--always", "--dirty", "--abbrev=12"]
        return proc.run([*words, "--exclude=*"], deadline_s=30).stdout.strip()
    except NearmetalError:
        return ""


def add_runs(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    revision = options.revision or revision_of(conf.repo)
    with opened(file_of(options, conf)) as history:
        for name in options.run:
            folder = folder_of(conf, name)
            report = document.read(folder)
            night = of_report(report, revision=revision, folder=str(folder.resolve()))
            done = "added" if history.add(night) else "is there already"
            ui.out.print(f"{night.id} {done}", markup=False, highlight=False)
    return Exit.OK


def list_runs(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    with opened(file_of(options, conf)) as history:
        nights = history.nights()
    table = _table("run", "started", "host", "verdict", "changed", "commit", "command")
    for index in reversed(range(max(0, len(nights) - options.limit), len(nights))):
        night = nights[index]
        found = changes.judge(night, nights[:index])
        table.add_row(
            *(night.id, night.date, night.host),
            Text("accepted" if night.accepted else "good" if found.good else "bad"),
            *(str(len(found.red)), night.revision, Text(night.command)),
        )
    ui.out.print(table)
    return Exit.OK


def show(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    with opened(file_of(options, conf)) as history:
        verdict = of_run(history, options.run)
    if options.json:
        print(json.dumps(as_json(verdict), indent=1))
    else:
        for line in [verdict.line()] if options.line else as_lines(verdict):
            print(line)
    return Exit.OK if verdict.good else Exit.FAILED


def of_run(history: History, run: str) -> changes.Verdict:
    """The verdict over a run of the history."""
    night = history.night(run)
    return changes.judge(night, _before(history, night))


def _before(history: History, night: Night) -> list[Night]:
    ids = history.ids()
    return [history.night(one) for one in ids[: ids.index(night.id)]]


def as_lines(verdict: changes.Verdict) -> list[str]:
    """A verdict for a terminal."""
    base = verdict.base
    lines = [
        verdict.line(),
        f"held to: {base.id} of {base.date}" if base else "held to: nothing, no good run is known",
    ]
    for one in verdict.changes:
        lines.append(f"{one.kind}: {one.text}")
        if found := verdict.since.get(one.what):
            lines.append(f"    first seen in {found.run} of {found.date}")
            if found.before:
                said = found.between or ("nothing that is recorded",)
                lines += [f"    changed since {found.before}: {what}" for what in said]
    return lines


def as_json(verdict: changes.Verdict) -> dict[str, object]:
    """A verdict for programs."""
    return {
        "run": verdict.night.id,
        "good": verdict.good,
        "line": verdict.line(),
        "base": verdict.base.id if verdict.base else None,
        "changes": [
            {
                "kind": one.kind,
                "what": one.what,
                "text": one.text,
                "since": vars(verdict.since[one.what]) if one.what in verdict.since else None,
            }
            for one in verdict.changes
        ],
    }


def trend(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    with opened(file_of(options, conf)) as history:
        nights = history.nights(limit=options.limit)
    keys = list(dict.fromkeys(key for night in nights for key in night.figures))
    names = {key.name for key in keys}
    if options.metric not in names:
        raise UsageError(
            f"the history has no measurement '{options.metric}'",
            hint=nearest(options.metric, names) if names else "add a run: 'nearmetal history add'",
        )
    table = _table("run", "row", "median", "range", "unit")
    for key in keys:
        if key.name != options.metric or options.variant not in (None, key.variant):
            continue
        for night in nights:
            if (one := night.figures.get(key)) is None:
                continue
            low, high = (min(one.values), max(one.values)) if one.values else (None, None)
            spread = "" if low == high else f"{number(low)} .. {number(high)}"
            table.add_row(night.id, " ".join(key.words), number(one.median), spread, one.unit)
    ui.out.print(table)
    return Exit.OK


def accept(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    with opened(file_of(options, conf)) as history:
        history.accept(options.run)
    ui.out.print(f"{options.run}: later runs are held to it", markup=False, highlight=False)
    return Exit.OK


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
