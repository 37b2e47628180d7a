# SPDX-License-Identifier: GPL-2.0-or-later
"""Serial consoles: kept in the run's folder, and read for what a kernel says when it breaks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import MeasurementError

UP = "nearmetal: up"
"""What /usr/lib/nearmetal/rc prints when a machine of ours can be logged in to."""

_SPLAT = re.compile(
    r"Kernel panic|BUG: |\bOops\b|WARNING: |general protection fault|"
    r"possible circular locking|possible recursive locking|inconsistent lock state|"
    r"suspicious RCU usage|rcu: INFO: .*stall|blocked for more than|"
    r"unable to handle (?:kernel )?(?:page fault|NULL)|invalid opcode: |"
    r"refcount_t: |UBSAN: |KASAN: |KCSAN: |kernel BUG at|"
    r"nearmetal: (?:no disk|the root file system)"
)


@dataclass(frozen=True)
class Splat:
    """What a kernel said: the line that tells, and the lines that follow."""

    line: str
    context: tuple[str, ...]


def find_splats(text: str, follow: int = 12) -> list[Splat]:
    """The panics, oopses, warnings and lockdep reports in a console's text."""
    lines = text.replace("\r", "").splitlines()
    found: list[Splat] = []
    skip_to = 0
    for number, line in enumerate(lines):
        if number >= skip_to and _SPLAT.search(line):
            found.append(Splat(line.strip(), tuple(lines[number : number + follow])))
            skip_to = number + follow
    return found


class Console:
    """The console of one machine, written to a file by whoever runs the machine."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._read_to = 0

    def text(self) -> str:
        """Everything so far."""
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def tail(self, lines: int = 15) -> str:
        """The last lines."""
        return "\n".join(self.text().replace("\r", "").rstrip().splitlines()[-lines:])

    def check(self) -> None:
        """Raise MeasurementError when the kernel broke since the last check."""
        text = self.text()
        new, self._read_to = text[self._read_to :], len(text)
        splats = find_splats(new)
        if splats:
            raise MeasurementError(
                f"{self.name}: the kernel says: {splats[0].line}",
                detail="\n".join(splats[0].context),
                hint=f"the whole console is {self.path}",
            )

    def broken(self) -> None:
        """Raise MeasurementError when the kernel died: an oops or a panic, not a WARN.

        Unlike ``check`` it may be called while something runs, and takes nothing from it.
        """
        fatal = [splat for splat in find_splats(self.text()) if "WARNING" not in splat.line]
        if fatal:
            raise MeasurementError(
                f"{self.name}: the kernel says: {fatal[0].line}",
                detail="\n".join(fatal[0].context),
                hint=f"the whole console is {self.path}",
            )

    def count(self, pattern: str, start: int = 0) -> int:
        """How often a regular expression occurs from a position on."""
        return len(re.findall(pattern, self.text()[start:]))

    @property
    def size(self) -> int:
        """The position to hand to ``count`` for what comes from now on."""
        return len(self.text())

    def wait_for(
        self, word: str, *, deadline_s: float, alive: Callable[[], None], start: int = 0
    ) -> None:
        """Wait until the console says a word; MeasurementError with its last lines otherwise.

        ``start`` is the position (``size``) from which on it counts.
        """
        end = time.monotonic() + deadline_s
        while True:
            text = self.text()[start:]
            if word in text:
                return
            broken = [splat for splat in find_splats(text) if "WARNING" not in splat.line]
            if broken:
                raise MeasurementError(
                    f"{self.name}: the kernel broke at boot: {broken[0].line}",
                    detail="\n".join(broken[0].context),
                    hint=f"the whole console is {self.path}",
                )
            try:
                alive()
            except MeasurementError as error:
                error.detail = "\n".join(part for part in (error.detail, self.tail()) if part)
                error.hint = error.hint or f"the console is {self.path}"
                raise
            if time.monotonic() > end:
                raise MeasurementError(
                    f"{self.name}: did not come up within {deadline_s:.0f} s",
                    detail=self.tail(),
                    hint=f"the whole console is {self.path}",
                )
            time.sleep(0.1)
