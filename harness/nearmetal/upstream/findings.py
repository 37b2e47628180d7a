# SPDX-License-Identifier: GPL-2.0-or-later
"""What a validation found, as JSON for programs.

It stands beside validate.py, whose text is an ingredient of each kept result: no build is done
again because a document for programs changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from .validate import Candidate, Finding, Severity


def to_json(findings: Sequence[Finding], candidates: Sequence[Candidate]) -> str:
    """Counts of all and of each series, then each finding.

    ``patches`` is 0 for what is no series (``all series``, stacked).
    """
    patches = {one.series.label: len(one.series.patches()) for one in candidates}
    names = dict.fromkeys([*patches, *(one.series for one in findings)])

    def count(severity: Severity, name: str | None = None) -> int:
        return sum(one.severity == severity and name in (None, one.series) for one in findings)

    document = {
        "errors": count("error"),
        "notes": count("note"),
        "series": [
            {
                "series": name,
                "patches": patches.get(name, 0),
                "errors": count("error", name),
                "notes": count("note", name),
            }
            for name in names
        ],
        "findings": [asdict(one) for one in findings],
    }
    return json.dumps(document, indent=1)
