# SPDX-License-Identifier: GPL-2.0-or-later
"""Running commands: deadlines, output, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nearmetal.core import proc
from nearmetal.core.errors import UsageError


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_output_and_status() -> None:
    done = proc.run(["sh", "-c", "echo out; echo err >&2; exit 3"], deadline_s=10, check=False)
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_failure_carries_the_output() -> None:
    with pytest.raises(proc.CommandFailed, match="status 4") as caught:
        proc.run(["sh", "-c", "echo why; exit 4"], deadline_s=10)
    assert "why" in str(caught.value.detail)
    assert caught.value.command_status == 4


def test_deadline(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begun = time.monotonic()
    with pytest.raises(proc.CommandFailed, match="did not end within 1 s") as caught:
        proc.run(["sh", "-c", "echo started; sleep 60"], deadline_s=1, log=log)
    assert time.monotonic() - begun < 10
    assert "started" in str(caught.value.detail)


def test_unknown_program() -> None:
    with pytest.raises(UsageError, match="'no-such-program' is not installed"):
        proc.run(["no-such-program"], deadline_s=1)


def test_a_program_is_looked_for_where_it_will_run(tmp_path: Path) -> None:
    """As ninja lies in the environment of QEMU's build, and maybe nowhere else."""
    program = tmp_path / "nm-only-here"
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert proc.run([program.name], deadline_s=10, env={"PATH": path}).stdout == "found\n"
    with pytest.raises(UsageError, match="not installed"):
        proc.run([program.name], deadline_s=10)
    with pytest.raises(UsageError, match="not installed"):
        proc.run(["sh"], deadline_s=10, env={"PATH": str(tmp_path)})


HARNESS = """
import sys
from nearmetal.core import proc
proc.run(["sh", "-c", "sleep 60 & echo $! > {0}; wait".format(sys.argv[1])],
         deadline_s=50, tree=True)
"""


def test_kill_9_of_the_harness_takes_the_whole_tree_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = subprocess.Popen([sys.executable, "-c", HARNESS, str(note)])
    end = time.monotonic() + 20
    while not (note.exists() and note.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    # inside the PID namespace the number is another: find the sleeper by its parentage
    sleepers = descendants(child.pid)
    assert sleepers
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert all(gone(pid) for pid in sleepers)


def descendants(top: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [top]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def test_full_disk_is_told_as_such() -> None:
    with pytest.raises(proc.CommandFailed, match="the disk is full") as caught:
        proc.run(["cp", "/etc/passwd", "/dev/full"], deadline_s=10)
    assert "cache --prune" in str(caught.value.hint)
