# SPDX-License-Identifier: GPL-2.0-or-later
"""The history of runs, in one SQLite file: what each measured, how it was judged, and of what.

A run is in it whole or not at all: one transaction adds it, and SQLite undoes one that was killed.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EnvironmentBroken, UsageError
from ..core.model import Report
from ..core.text import nearest
from ..report.tables import verdict

FORMAT = 1
"""Of the file: SQLite's ``user_version``."""
BUSY_S = 60.0
"""How long an addition waits for another one."""

_TABLES = """
CREATE TABLE run (
    id TEXT PRIMARY KEY, started TEXT NOT NULL, host TEXT NOT NULL, command TEXT NOT NULL,
    verdict TEXT NOT NULL, revision TEXT NOT NULL, folder TEXT NOT NULL,
    accepted INTEGER NOT NULL DEFAULT 0);
CREATE TABLE figure (
    run TEXT NOT NULL REFERENCES run(id) ON DELETE CASCADE,
    name TEXT NOT NULL, variant TEXT NOT NULL, series TEXT NOT NULL, context TEXT NOT NULL,
    unit TEXT NOT NULL, provenance TEXT NOT NULL, vals TEXT NOT NULL, median REAL,
    PRIMARY KEY (run, name, variant, series, context));
CREATE TABLE verdict (
    run TEXT NOT NULL REFERENCES run(id) ON DELETE CASCADE,
    name TEXT NOT NULL, status TEXT NOT NULL, observed TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (run, name));
CREATE TABLE build (
    run TEXT NOT NULL REFERENCES run(id) ON DELETE CASCADE,
    role TEXT NOT NULL, variant TEXT NOT NULL, testbed TEXT NOT NULL, source TEXT NOT NULL,
    series TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE INDEX figure_of ON figure (name, run);
"""


@dataclass(frozen=True)
class Key:
    """What tells a figure from the others of its run."""

    name: str
    variant: str
    series: str
    """Empty where none is on."""
    context: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.words)}]"

    @property
    def words(self) -> tuple[str, ...]:
        """Variant, series and context."""
        series = (self.series,) if self.series else ()
        return (self.variant, *series, *(f"{key}={value}" for key, value in self.context))


@dataclass(frozen=True)
class Value:
    """One figure of a night, in ``unit``."""

    unit: str
    provenance: str
    values: tuple[float, ...]
    median: float | None
    """None where it is no finite number."""


@dataclass(frozen=True)
class Judged:
    """How a check came out."""

    status: str
    observed: str
    reason: str


@dataclass(frozen=True)
class Made:
    """Something that was built, and of what."""

    role: str
    variant: str
    testbed: str
    source: str
    series: tuple[str, ...]
    sha256: str

    @property
    def place(self) -> str:
        """What it is, in words, without what it is made of."""
        where = f" on {self.testbed}" if self.testbed else ""
        return f"{self.role.replace('-', ' ')} of {self.variant}{where}"


@dataclass(frozen=True)
class Night:
    """One run, as the history knows it."""

    id: str
    started: str
    host: str
    command: str
    verdict: str
    revision: str
    """The project's commit; ``-dirty`` behind it where files were changed. Empty: not known."""
    folder: str
    accepted: bool
    """Whether somebody said that its figures are the new ones."""
    figures: dict[Key, Value]
    checks: dict[str, Judged]
    builds: tuple[Made, ...]

    @property
    def date(self) -> str:
        """The day and the minute, in UTC."""
        return self.started[:16].replace("T", " ")


def of_report(report: Report, *, revision: str = "", folder: str = "") -> Night:
    """A report as a night."""
    figures: dict[Key, Value] = {}
    for row in report.measurements:
        key = Key(row.name, row.variant, row.series or "", tuple(sorted(row.where.items())))
        finite = [one for one in row.values if one == one and abs(one) != float("inf")]
        whole = len(finite) == len(row.values) and bool(finite)
        figures[key] = Value(row.unit, row.provenance, tuple(finite), row.median if whole else None)
    return Night(
        report.run.id,
        report.run.started,
        report.run.host,
        report.run.command,
        verdict(report.checks)[0],
        revision,
        folder,
        False,
        figures,
        {one.name: Judged(one.status, one.observed, one.reason) for one in report.checks},
        tuple(
            Made(one.role, one.variant, one.testbed or "", one.source, one.series, one.sha256)
            for one in report.builds
        ),
    )


def together(name: str, nights: Sequence[Night], *, folder: str = "") -> Night:
    """Several runs of a host as one night, each of which measured another part.

    A check has its emulated host beside its name, since two runs judge it for one each. One that
    was skipped in a run and judged in another counts as judged.
    """
    first = nights[0]
    figures: dict[Key, Value] = {}
    checks: dict[str, Judged] = {}
    builds: dict[Made, None] = {}
    for night in nights:
        figures |= night.figures
        beds = sorted({dict(key.context).get("testbed", "") for key in night.figures} - {""})
        for check, judged in night.checks.items():
            single = f" ({beds[0]})" if len(beds) == 1 and not check.endswith(")") else ""
            was = checks.get(check + single)
            if was is None or was.status == "skip" or judged.status in ("fail", "error"):
                checks[check + single] = judged
        builds |= dict.fromkeys(night.builds)
    order = ("error", "fail", "pass", "skip")
    worst = min((night.verdict for night in nights), key=order.index)
    return Night(
        id=name,
        started=min(night.started for night in nights),
        host=first.host,
        command="; ".join(sorted({_asked(night.command) for night in nights})),
        verdict=worst,
        revision=first.revision,
        folder=folder or first.folder,
        accepted=False,
        figures=figures,
        checks=checks,
        builds=tuple(builds),
    )


def _asked(command: str) -> str:
    """A command without the folder of its results, which is another each night."""
    words = command.split()
    if "--results-dir" in words:
        at = words.index("--results-dir")
        del words[at : at + 2]
    return " ".join(word.rsplit("/", 1)[-1] for word in words)


class History:
    """The file; ``opened`` gives one."""

    def __init__(self, base: sqlite3.Connection, path: Path) -> None:
        self._base, self.path = base, path

    def add(self, night: Night) -> bool:
        """Add a run; False where it is there already, and stays as it was."""
        with self._base as base:
            if base.execute("SELECT 1 FROM run WHERE id = ?", (night.id,)).fetchone():
                return False
            base.execute(
                "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(night.id, night.started, night.host, night.command),
                    *(night.verdict, night.revision, night.folder, int(night.accepted)),
                ),
            )
            base.executemany(
                "INSERT INTO figure VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(night.id, key.name, key.variant, key.series, json.dumps(key.context)),
                        *(one.unit, one.provenance, json.dumps(one.values), one.median),
                    )
                    for key, one in night.figures.items()
                ],
            )
            base.executemany(
                "INSERT INTO verdict VALUES (?, ?, ?, ?, ?)",
                [
                    (night.id, name, one.status, one.observed, one.reason)
                    for name, one in night.checks.items()
                ],
            )
            base.executemany(
                "INSERT INTO build VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(night.id, one.role, one.variant, one.testbed, one.source),
                        *(json.dumps(one.series), one.sha256),
                    )
                    for one in night.builds
                ],
            )
        return True

    def accept(self, run: str) -> None:
        """Take a run's figures for good though they changed. Raises UsageError for no such run."""
        known = self.night(run)
        with self._base as base:
            base.execute("UPDATE run SET accepted = 1 WHERE id = ?", (known.id,))

    def ids(self) -> list[str]:
        """The runs, the oldest first."""
        rows = self._base.execute("SELECT id FROM run ORDER BY started, id")
        return [str(row[0]) for row in rows]

    def night(self, run: str) -> Night:
        """A run by its name, or ``latest``. Raises UsageError where there is none."""
        ids = self.ids()
        if run == "latest" and ids:
            run = ids[-1]
        if run not in ids:
            raise UsageError(
                f"the history has no run '{run}'",
                hint=nearest(run, ids) if ids else "add one with 'nearmetal history add'",
            )
        return self._read(run)

    def nights(self, *, limit: int | None = None) -> list[Night]:
        """The last ``limit`` runs, or all, the oldest first."""
        ids = self.ids()
        return [self._read(one) for one in (ids if limit is None else ids[-limit:])]

    def _read(self, run: str) -> Night:
        base = self._base
        head = base.execute("SELECT * FROM run WHERE id = ?", (run,)).fetchone()
        figures = {
            Key(name, variant, series, tuple((k, v) for k, v in json.loads(context))): Value(
                unit, provenance, tuple(json.loads(values)), median
            )
            for _, name, variant, series, context, unit, provenance, values, median in base.execute(
                "SELECT * FROM figure WHERE run = ? ORDER BY rowid", (run,)
            )
        }
        checks = {
            name: Judged(status, observed, reason)
            for _, name, status, observed, reason in base.execute(
                "SELECT * FROM verdict WHERE run = ? ORDER BY rowid", (run,)
            )
        }
        builds = tuple(
            Made(role, variant, testbed, source, tuple(json.loads(series)), sha256)
            for _, role, variant, testbed, source, series, sha256 in base.execute(
                "SELECT * FROM build WHERE run = ? ORDER BY rowid", (run,)
            )
        )
        return Night(
            id=head[0],
            started=head[1],
            host=head[2],
            command=head[3],
            verdict=head[4],
            revision=head[5],
            folder=head[6],
            accepted=bool(head[7]),
            figures=figures,
            checks=checks,
            builds=builds,
        )


@contextmanager
def opened(path: Path) -> Iterator[History]:
    """The history in a file, which is made if it is not there.

    Raises EnvironmentBroken where the file cannot be used, or is of a newer format.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as base:
            base.execute("PRAGMA foreign_keys = ON")
            base.execute("BEGIN IMMEDIATE")
            found = base.execute("PRAGMA user_version").fetchone()[0]
            if found > FORMAT:
                raise EnvironmentBroken(
                    f"{path} is of format {found}, and this version of nearmetal uses {FORMAT}",
                    hint="use the nearmetal that wrote it, or a newer one",
                )
            if found == 0:
                for statement in _TABLES.split(";\n"):
                    base.execute(statement)
                base.execute(f"PRAGMA user_version = {FORMAT}")
            base.commit()
            yield History(base, path)
    except (sqlite3.Error, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise EnvironmentBroken(
            f"the history {path} cannot be used: {said}",
            hint="choose another file with --file; a damaged one is made anew from results/ with"
            " 'nearmetal history add'",
        ) from None
