# SPDX-License-Identifier: GPL-2.0-or-later
"""What builds and tools said of a commit, kept between validations by what went in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.cache import key_of

_KEPT_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Results:
    """A folder of results, each in a file named by a hash of its ingredients."""

    folder: Path

    def open(self) -> Results:
        """The same folder, made and without what nobody has used for 30 days."""
        self.folder.mkdir(parents=True, exist_ok=True)
        oldest = time.time() - _KEPT_S
        for path in self.folder.glob("*.json"):
            if path.stat().st_mtime < oldest:
                path.unlink()
        return self

    def get(self, ingredients: Mapping[str, Any]) -> Any | None:
        """A result that was kept, or None."""
        path = self._path(ingredients)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        path.touch()
        return found

    def keep(self, ingredients: Mapping[str, Any], result: Any) -> None:
        """Keep a result, which JSON can hold and which is not None."""
        path = self._path(ingredients)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(result), encoding="utf-8")
        fresh.replace(path)

    def _path(self, ingredients: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(ingredients)}.json"


@dataclass(frozen=True)
class Times:
    """How long each stage took the last time that it had to work, in seconds for one patch."""

    path: Path

    def expected(self, stage: str) -> float | None:
        """Seconds for one patch, or None for a stage that never ran."""
        found = self._all().get(stage)
        return float(found) if found is not None else None

    def note(self, stage: str, seconds: float) -> None:
        """Keep how long one patch took."""
        self.path.write_text(json.dumps({**self._all(), stage: round(seconds, 1)}, indent=1))

    def _all(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found
