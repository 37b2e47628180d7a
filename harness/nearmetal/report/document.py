# SPDX-License-Identifier: GPL-2.0-or-later
"""A run's report on disk: report.json, junit.xml and report.html in the run's folder.

Every file is written beside its place and renamed into it, so a reader never sees half of
one. Design, section 10, describes report.json; report.schema.json holds it to that.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import EnvironmentBroken, UsageError
from ..core.model import (
    SUBJECT_KEYS,
    Build,
    CheckResult,
    Feature,
    Headline,
    Measurement,
    Report,
    RunInfo,
    Subject,
)
from ..core.schema import load_schema, violation
from .junit import junit
from .page import render_html

SCHEMA = 1
REPORT_NAME = "report.json"
JUNIT_NAME = "junit.xml"
HTML_NAME = "report.html"
LATEST = "latest"


def write(report: Report, folder: Path, *, logs: Sequence[Path] | None = None) -> None:
    """Write report.json, junit.xml and report.html into a run's folder.

    ``logs`` are the files that the page links to, inside the folder; without it all other
    files in the folder. report.json comes first, so that it is there even if a plot cannot
    be made. Raises EnvironmentBroken where the folder cannot be written, ValueError for a
    report that breaks the schema (a bug of the caller, not of the user).
    """
    document = to_json(report)
    if found := violation(document, load_schema("report.schema.json")):
        raise ValueError(f"report: {found.where}: {found.message}")
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / REPORT_NAME, text + "\n")
    write_pages(report, folder, logs=logs)


def write_pages(report: Report, folder: Path, *, logs: Sequence[Path] | None = None) -> None:
    """Write junit.xml and report.html alone; ``logs`` and errors as for ``write``."""
    write_atomically(folder / JUNIT_NAME, junit(report))
    links = [path.relative_to(folder) for path in logs] if logs is not None else find_logs(folder)
    write_atomically(folder / HTML_NAME, render_html(report, links))


def read(path: Path) -> Report:
    """The report in a file, or in a run's folder.

    Raises UsageError where there is none, or what is there is no report of this format.
    """
    file = path / REPORT_NAME if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"no report: {file}: {error.strerror}", hint="give a run's folder or its report.json"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{file} is not JSON: {error}", hint="give a run's folder or its report.json"
        ) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UsageError(
            f"{file} is of format {schema}, and this version of nearmetal reads format {SCHEMA}",
            hint="use the nearmetal that wrote it, or a newer one",
        )
    if found := violation(document, load_schema("report.schema.json")):
        raise UsageError(
            f"{file} is not a report of format {SCHEMA}: {found.where}: {found.message}",
            hint=found.hint or "was it edited by hand? Run again, or use another report",
        )
    return _from_json(document)


def write_atomically(path: Path, text: str) -> None:
    """Put a text into a file, whole or not at all.

    Raises EnvironmentBroken where the file cannot be written; what was there stays then.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as stream:
            temporary = Path(stream.name)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentBroken(
            f"{path} cannot be written: {error.strerror or error}",
            hint="free some disk, or choose another --results-dir",
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def publish(results_dir: Path, run_id: str) -> Path:
    """Point results/latest to a run, in one step; returns the link.

    Raises UsageError where there is no such run, EnvironmentBroken where ``latest`` is
    not a link or cannot be made.
    """
    link = results_dir / LATEST
    if run_id == LATEST or not (results_dir / run_id).is_dir():
        raise UsageError(
            f"no run '{run_id}' in {results_dir}", hint="list the folder for the runs there are"
        )
    if link.exists() and not link.is_symlink():
        raise EnvironmentBroken(
            f"{link} is not a link to a run", hint="move it away, then run again"
        )
    temporary = results_dir / f".{LATEST}.{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run_id, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentBroken(
            f"{link} cannot be made: {error.strerror or error}",
            hint="choose another --results-dir",
        ) from None
    return link


def find_logs(folder: Path) -> list[Path]:
    """The logs and consoles in a run's folder, relative to it, in order of their names."""
    ours = {REPORT_NAME, JUNIT_NAME, HTML_NAME}
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.relative_to(folder).as_posix() not in ours
    )


# --- report.json -----------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
    """A report as report.json holds it; times in seconds."""
    run = report.run
    return {
        "schema": SCHEMA,
        "run": {
            "id": run.id,
            "started": run.started,
            "finished": run.finished,
            "host": run.host,
            "command": run.command,
            "cold_s" if run.cold else "warm_s": run.seconds,
            "boot_retries": run.boot_retries,
        },
        "builds": [
            {
                "role": build.role,
                "variant": build.variant,
                "testbed": build.testbed,
                "source": build.source,
                "series": list(build.series),
                "sha256": build.sha256,
            }
            for build in report.builds
        ],
        "measurements": [
            {
                "name": row.name,
                "variant": row.variant,
                "series": row.series,
                "unit": row.unit,
                "values": [_figure(value) for value in row.values],
                "median": _figure(row.median if row.values else math.nan),
                "provenance": row.provenance,
                "derived": row.derived,
                "context": dict(row.where),
            }
            for row in report.measurements
        ],
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "observed": check.observed,
                "expected": check.expected,
                "reason": check.reason,
            }
            for check in report.checks
        ],
        **({"series": [_feature(one) for one in report.series]} if report.series else {}),
    }


def _feature(one: Feature) -> dict[str, Any]:
    return {
        "name": one.name,
        "purpose": one.purpose,
        "headlines": [
            {
                "metric": headline.metric,
                "label": headline.label,
                "rows": dict(headline.rows),
                "before": dict(headline.before),
                "after": dict(headline.after),
            }
            for headline in one.headlines
        ],
        "checks": list(one.checks),
    }


def _figure(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _from_json(document: Mapping[str, Any]) -> Report:
    """The report in a document that the schema holds."""
    run = document["run"]
    return Report(
        run=RunInfo(
            id=run["id"],
            started=run["started"],
            finished=run["finished"],
            host=run["host"],
            command=run["command"],
            seconds=run["cold_s"] if "cold_s" in run else run["warm_s"],
            cold="cold_s" in run,
            boot_retries=run["boot_retries"],
        ),
        builds=tuple(
            Build(
                role=entry["role"],
                variant=entry["variant"],
                source=entry["source"],
                sha256=entry["sha256"],
                series=tuple(entry["series"]),
                testbed=entry["testbed"],
            )
            for entry in document["builds"]
        ),
        measurements=tuple(
            Measurement(
                name=entry["name"],
                subject=_subject(entry),
                unit=entry["unit"],
                values=tuple(math.nan if value is None else value for value in entry["values"]),
                provenance=entry["provenance"],
                derived=entry["derived"],
                context={
                    key: value for key, value in entry["context"].items() if key not in SUBJECT_KEYS
                },
            )
            for entry in document["measurements"]
        ),
        checks=tuple(
            CheckResult(
                name=entry["name"],
                status=entry["status"],
                observed=entry["observed"],
                expected=entry["expected"],
                reason=entry["reason"],
            )
            for entry in document["checks"]
        ),
        series=tuple(
            Feature(
                name=entry["name"],
                purpose=entry["purpose"],
                headlines=tuple(Headline(**headline) for headline in entry["headlines"]),
                checks=tuple(entry["checks"]),
            )
            for entry in document.get("series", ())
        ),
    )


def _subject(entry: Mapping[str, Any]) -> Subject:
    """Set-up and testbed stand in a row's context in report.json, as any selector of a check."""
    context = entry["context"]
    return Subject(entry["variant"], entry["series"], context.get("setup"), context.get("testbed"))
