# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user sees: results on standard output, all else on standard error.

Progress is one line that changes on a terminal, and plain lines in a pipe or a log.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from .errors import NearmetalError


def _console(stream: TextIO, *, stderr: bool) -> Console:
    # a file has no width; rich would take 80 columns, too few for the tables
    isatty = getattr(stream, "isatty", lambda: False)  # avocado's streams have none
    width = None if isatty() or "COLUMNS" in os.environ else 140
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


console = _console(sys.stderr, stderr=True)
"""Progress, warnings and errors."""
out = _console(sys.stdout, stderr=False)
"""Results."""

QUIET, NORMAL, VERBOSE = -1, 0, 1
_HEARTBEAT_S = 30.0
_LIVE_S = 1.0


class _State:
    """How much is told, and what stands in the line that changes."""

    level = NORMAL
    lock = threading.RLock()
    steps: list[Step]
    drawn = False
    label = ""
    alone = True
    """Whether no other process writes to the same terminal, so that a line may change."""


_state = _State()
_state.steps = []


def set_level(level: int) -> None:
    """QUIET: warnings and errors alone; VERBOSE: also the commands that are run here."""
    _state.level = level


def _print(text: str, style: str | None = None) -> None:
    with _state.lock:
        _erase()
        console.print(f"{_state.label}{text}", style=style, markup=False)


@contextmanager
def labelled(name: str, *, alone: bool = True) -> Iterator[None]:
    """Put a name before each line that is told; not ``alone``: another process tells, too."""
    before = _state.label, _state.alone
    _state.label, _state.alone = f"[{name}] ", alone
    try:
        yield
    finally:
        _state.label, _state.alone = before


def _erase() -> None:
    if _state.drawn or (not _state.alone and console.is_terminal):
        console.file.write("\r\x1b[K")
        console.file.flush()
        _state.drawn = False


def say(text: str) -> None:
    """One line of progress."""
    if _state.level >= NORMAL:
        _print(text)


def trace(words: Sequence[str]) -> None:
    """A command that is run on this machine, for those who asked for it."""
    if _state.level >= VERBOSE:
        _print(f"    + {shlex.join(words)}")


def warn(text: str) -> None:
    """One line that the user should not overlook."""
    _print(f"warning: {text}", "yellow")


def tell_error(error: NearmetalError) -> None:
    """The error, what goes with it, and the hint."""
    if error.detail:
        for line in error.detail.rstrip().splitlines():
            _print(f"  | {line}")
    _print(f"nearmetal: {error.message}", "bold red")
    if error.hint:
        _print(f"  hint: {error.hint}")


class Step:
    """A piece of work with a name; ``status`` says what it waits for now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status = ""
        self.started = time.monotonic()

    @property
    def line(self) -> str:
        """What it is, for how long, and what it waits for."""
        elapsed = time.monotonic() - self.started
        return f"    {self.name}: {elapsed:.0f} s {self.status}".rstrip()


@contextmanager
def step(name: str) -> Iterator[Step]:
    """Tell that work begins, that it goes on (and on what), and how long it took.

    On a terminal a line shows all that goes on, anew every second; elsewhere there is a line
    every 30 s.
    """
    current = Step(name)
    say(f"==> {name}")
    live = console.is_terminal and _state.level == NORMAL and _state.alone
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_LIVE_S if live else _HEARTBEAT_S):
            _draw() if live else say(current.line)

    with _state.lock:
        _state.steps.append(current)
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    how = "stopped after "
    try:
        yield current
        how = ""
    finally:
        done.set()
        with _state.lock:
            _state.steps.remove(current)
        say(f"    {name}: {how}{time.monotonic() - current.started:.1f} s")


def _draw() -> None:
    with _state.lock:
        _erase()
        text = " |".join(one.line for one in _state.steps)
        if text:
            console.file.write(text[: console.width - 1])
            console.file.flush()
            _state.drawn = True
