# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of work in processes beside each other: real ones, which end as such do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nearmetal.core import ui
from nearmetal.core.beside import beside
from nearmetal.core.errors import Exit, MeasurementError, NearmetalError

_LIMIT_S = 30.0


def until(found: Callable[[], bool]) -> None:
    """Wait for something; a test that waits for ever says nothing."""
    end = time.monotonic() + _LIMIT_S
    while not found():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def test_results_come_in_order_and_from_processes_of_their_own() -> None:
    first, second, third = beside(
        {"a": lambda: ("a", os.getpid()), "b": lambda: ("b", os.getpid()), "c": lambda: ("c", 0)}
    )
    assert (first[0], second[0], third[0]) == ("a", "b", "c")
    assert first[1] == os.getpid() != second[1]


def test_they_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for what the other leaves: one after another they would wait for ever."""

    def meet(mine: str, other: str) -> str:
        (tmp_path / mine).touch()
        until((tmp_path / other).exists)
        return mine

    work = {"a": lambda: meet("a", "b"), "b": lambda: meet("b", "a")}
    assert beside(work) == ["a", "b"]


def test_lines_say_whose_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    beside({"amd": lambda: ui.say("booting"), "intel": lambda: ui.say("booting")})
    ui.say("done")
    assert set(re.findall(r".+", capfd.readouterr().err)) >= {
        "[amd] booting",
        "[intel] booting",
        "done",
    }


def test_an_error_of_a_child_is_the_same_error_here() -> None:
    def broken() -> None:
        raise MeasurementError("no host", hint="look", detail="line 1\nline 2")

    with pytest.raises(NearmetalError) as caught:
        beside({"a": lambda: None, "b": broken})
    assert (caught.value.message, caught.value.hint) == ("no host", "look")
    assert (caught.value.detail, caught.value.status) == ("line 1\nline 2", Exit.FAILED)


def test_a_full_disk_of_a_child_is_an_os_error_here() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/x/y")

    with pytest.raises(OSError, match="No space left") as caught:
        beside({"a": lambda: None, "b": full})
    assert (caught.value.errno, caught.value.filename) == (28, "/x/y")


def test_a_fault_of_a_child_is_told_with_its_traceback() -> None:
    with pytest.raises(NearmetalError, match="b broke: ZeroDivisionError") as caught:
        beside({"a": lambda: None, "b": lambda: print(1 // 0)})
    assert "1 // 0" in (caught.value.detail or "")


def test_a_child_that_is_killed_is_told_by_its_signal() -> None:
    with pytest.raises(NearmetalError, match="for b was killed by signal 9"):
        beside({"a": lambda: None, "b": lambda: os.kill(os.getpid(), signal.SIGKILL)})


def test_children_end_in_order_when_the_first_breaks(tmp_path: Path) -> None:
    ready, ended = tmp_path / "ready", tmp_path / "ended"

    def waits() -> None:
        try:
            ready.touch()
            time.sleep(_LIMIT_S)
        finally:
            ended.touch()

    def breaks() -> None:
        until(ready.exists)
        raise MeasurementError("no host")

    with pytest.raises(MeasurementError):
        beside({"a": breaks, "b": waits})
    assert ended.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    pids, ended = tmp_path / "pids", tmp_path / "ended"
    program = f"""
import os, pathlib, signal, time
from nearmetal.core.beside import beside
signal.signal(signal.SIGTERM, signal.default_int_handler)
def child():
    try:
        pathlib.Path({str(pids)!r}).write_text(str(os.getpid()))
        time.sleep({_LIMIT_S})
    finally:
        pathlib.Path({str(ended)!r}).touch()
beside({{"a": lambda: time.sleep({_LIMIT_S}), "b": child}})
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    until(lambda: pids.exists() and bool(pids.read_text()))
    parent.send_signal(how)
    parent.wait(_LIMIT_S)
    until(ended.exists)
    until(lambda: not Path("/proc", pids.read_text()).exists())
