# SPDX-License-Identifier: GPL-2.0-or-later
"""The one way to run a command on this machine.

Every command has a deadline, and no command outlives the harness, not even after
kill -9: it starts under ``setpriv --pdeathsig`` (util-linux), and whole process trees
(make, mmdebstrap) in a PID namespace of their own where the kernel allows one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import ui
from .errors import EnvironmentBroken, UsageError


@dataclass(frozen=True)
class Completed:
    """A command that ended: its exit status and what it printed."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


class CommandFailed(EnvironmentBroken):
    """A command ended with a status other than 0, or did not end in time."""

    def __init__(
        self, message: str, *, output: str, hint: str | None = None, status: int = 1
    ) -> None:
        super().__init__(message, hint=hint, detail=tail(output))
        self.output = output
        self.command_status = status


def tail(text: str, lines: int = 20) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


@functools.cache
def _own_pid_namespace() -> tuple[str, ...]:
    """The prefix that puts a process tree into a PID namespace, or nothing."""
    user = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    prefix = ("unshare", *user, "--pid", "--fork", "--kill-child=KILL")
    if shutil.which("unshare") is None:
        return ()
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if probe.returncode == 0 else ()


def guarded(argv: Sequence[str], *, tree: bool = False) -> list[str]:
    """The command line that dies with the harness; ``tree``: with all its descendants."""
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    return [*guard, *(_own_pid_namespace() if tree else ()), *argv]


def run(
    argv: Sequence[str | Path],
    *,
    deadline_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    input_text: str | None = None,
    tree: bool = False,
    check: bool = True,
    hint: str | None = None,
) -> Completed:
    """Run a command to its end.

    ``env`` is added to the environment; with ``log`` standard output and error go to that
    file together (and come back as ``stdout``). Raises CommandFailed on a status other
    than 0 (unless ``check`` is false) and on the deadline, UsageError where the program
    is not on the PATH of that environment.
    """
    words = [str(word) for word in argv]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    if shutil.which(words[0], path=environment.get("PATH")) is None:
        raise UsageError(
            f"the program '{words[0]}' is not installed", hint=hint or "run scripts/run"
        )
    ui.trace(words)
    started = time.monotonic()
    sink = log.open("w", encoding="utf-8") if log else None
    try:
        process = subprocess.Popen(
            guarded(words, tree=tree),
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE if input_text is not None else subprocess.DEVNULL,
            stdout=sink or subprocess.PIPE,
            stderr=subprocess.STDOUT if sink else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(input_text, timeout=deadline_s)
        except BaseException as error:
            _kill_group(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            so_far = log.read_text(errors="replace") if log else ""
            raise CommandFailed(
                f"'{_short(words)}' did not end within {deadline_s:.0f} s", output=so_far, hint=hint
            ) from None
    finally:
        if sink:
            sink.close()
    if log:
        out = log.read_text(errors="replace")
    done = Completed(tuple(words), process.returncode, out or "", err or "")
    if check and done.status != 0:
        elapsed = time.monotonic() - started
        if disk_full(done.stdout + done.stderr):
            raise CommandFailed(
                f"the disk is full: '{_short(words)}' could not go on",
                output=done.stdout + done.stderr,
                hint=DISK_HINT,
                status=done.status,
            )
        raise CommandFailed(
            f"'{_short(words)}' ended with status {done.status} after {elapsed:.0f} s",
            output=done.stdout + done.stderr,
            hint=hint or (f"the whole log is {log}" if log else None),
            status=done.status,
        )
    return done


DISK_HINT = "free some disk ('nearmetal cache --prune'), or use --cache-dir"


def disk_full(output: str) -> bool:
    """Whether a program says that there was no room (ENOSPC, in the C locale's words)."""
    return "No space left on device" in output


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _short(words: Sequence[str]) -> str:
    text = " ".join(words)
    return text if len(text) <= 120 else text[:117] + "..."
