# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user sees while work goes on: steps, progress, tables; all on standard error."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from .errors import NearmetalError

# a file has no width; rich would take 80 columns, too few for the tables
_WIDTH = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 140

console = Console(stderr=True, highlight=False, soft_wrap=True, width=_WIDTH)

_HEARTBEAT_S = 30.0


def say(text: str) -> None:
    """One line of progress."""
    console.print(text, markup=False)


def warn(text: str) -> None:
    """One line that the user should not overlook."""
    console.print(f"warning: {text}", style="yellow", markup=False)


def tell_error(error: NearmetalError) -> None:
    """The error, what goes with it, and the mend."""
    if error.detail:
        for line in error.detail.rstrip().splitlines():
            console.print(f"  | {line}", markup=False)
    console.print(f"nearmetal: {error.message}", style="bold red", markup=False)
    if error.hint:
        console.print(f"  mend: {error.hint}", markup=False)


class Step:
    """A piece of work with a name; ``status`` says what it waits for now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status = ""


@contextmanager
def step(name: str) -> Iterator[Step]:
    """Tell that work begins, every 30 s that it goes on (and on what), and how long it took."""
    current = Step(name)
    started = time.monotonic()
    say(f"==> {name}")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_HEARTBEAT_S):
            elapsed = time.monotonic() - started
            say(f"    {name}: {elapsed:.0f} s {current.status}".rstrip())

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield current
    except BaseException:
        done.set()
        say(f"    {name}: stopped after {time.monotonic() - started:.1f} s")
        raise
    done.set()
    say(f"    {name}: {time.monotonic() - started:.1f} s")


def is_interactive() -> bool:
    """Whether somebody looks at the terminal."""
    return sys.stderr.isatty()
