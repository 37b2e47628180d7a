# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults in whole runs: each ends in one clear line with a hint, and an intact cache.

docs/faults.md has the table of them. The lab is this machine (lib/fakes.py); what breaks is real as
far as it can be: file systems, processes, signals, downloads by apt, an SSH server.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lib import fakes, faults

from nearmetal.cli.main import main
from nearmetal.core.cache import Cache, key_of
from nearmetal.machines.console import Console
from nearmetal.machines.emulators import testbed
from nearmetal.report import document
from nearmetal.sources import debian

Capture = pytest.CaptureFixture[str]
KEY = key_of({"toy": 1})


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A repository with the toy."""
    faults.prepare(tmp_path)
    return tmp_path


def one_line(said: str, message: str, hint: str) -> None:
    """One error, with its hint, and no traceback."""
    assert "Traceback" not in said
    lines = said.splitlines()
    errors = [number for number, text in enumerate(lines) if text.startswith("nearmetal: ")]
    assert len(errors) == 1, said
    assert message in lines[errors[0]], said
    assert lines[errors[0] + 1].startswith("  hint: "), said
    assert hint in lines[errors[0] + 1], said


def nothing_half_made(top: Path) -> None:
    """The store has nothing, and the next run makes the thing anew."""
    assert Cache(top / "cache").entries() == []
    assert faults.run(top) == 0
    assert whole(top)


def whole(top: Path) -> bool:
    """Whether the store has the thing, and only the whole one."""
    (entry,) = Cache(top / "cache").entries()
    return entry.key == KEY and (entry.path / "thing").stat().st_size == 1 << 16


def report_of(top: Path) -> Any:
    return document.read(top / "results" / "latest")


# --- disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [faults.large, faults.large_here])
def test_the_disk_fills_in_a_build(top: Path, work: Any) -> None:
    (top / "cache").mkdir()
    mount = f"mount -t tmpfs -o size=1m none {top / 'cache'}"
    # dd ends with what of the store is left in that mount
    look = f"; ls {top / 'cache' / 'store'}"
    words = ["sh", "-c", f'"$@"; echo status $?{look}', "sh", *faults.line(top, work)]
    done = faults.mounted(mount, words)
    assert done.stdout.splitlines() == ["status 3"]
    words_of_it = "the disk is full" if work is faults.large else "No space left on device"
    one_line(done.stderr, words_of_it, "nearmetal cache --prune")
    nothing_half_made(top)


def test_the_disk_fills_when_the_report_is_written(top: Path) -> None:
    (top / "results").mkdir()
    (top / "measure").write_text(f"cat /dev/zero >{top}/results/large 2>/dev/null; echo 42\n")
    mount = f"mount -t tmpfs -o size=1m none {top / 'results'}"
    done = faults.mounted(mount, faults.line(top))
    assert done.stdout.splitlines()[-1] == "status 3"
    one_line(done.stderr, "report.json cannot be written: No space left", "--results-dir")
    assert whole(top)


def test_the_cache_is_read_only(top: Path) -> None:
    assert faults.run(top) == 0
    cache = top / "cache"
    mount = f"mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}"
    done = faults.mounted(mount, faults.line(top))
    assert done.stdout.splitlines() == ["status 3"]
    one_line(done.stderr, f"the cache directory {cache} cannot be written", "--cache-dir")
    assert whole(top)


def test_the_results_are_read_only(top: Path) -> None:
    results = top / "results"
    results.mkdir()
    mount = f"mount --bind {results} {results}; mount -o remount,bind,ro {results}"
    done = faults.mounted(mount, faults.line(top))
    assert done.stdout.splitlines() == ["status 3"]
    one_line(done.stderr, f"the results folder {results} cannot be written", "--results-dir")
    assert faults.BUILD not in done.stderr  # it is told before hours of building
    assert faults.run(top) == 0


def test_the_output_goes_to_a_full_disk(top: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nearmetal", "list", "tests"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    one_line(done.stderr, "No space left on device", "free disk space")


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"kind": "to', "[]"])
def test_a_broken_entry_of_the_cache_is_made_again(top: Path, text: str, capsys: Capture) -> None:
    assert faults.run(top) == 0
    meta = top / "cache" / "store" / "toy" / KEY / "meta.json"
    meta.write_text(text)
    (meta.parent / "thing").write_text("half")
    capsys.readouterr()
    assert faults.run(top) == 0
    said = capsys.readouterr().err
    assert said.count("is broken: its meta.json cannot be read; it is made again") == 1
    assert whole(top)


def test_a_broken_entry_is_shown_and_pruned(top: Path, capsys: Capture) -> None:
    assert faults.run(top) == 0
    (top / "cache" / "store" / "toy" / KEY / "meta.json").write_text("")
    assert main(["cache", "--cache-dir", str(top / "cache")]) == 0
    assert "broken: its meta.json" in capsys.readouterr().out
    assert main(["cache", "--cache-dir", str(top / "cache"), "--prune", "--older-than", "0"]) == 0
    assert Cache(top / "cache").entries() == []


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)]
)
def test_a_run_is_killed_in_a_build(top: Path, how: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        faults.line(top, faults.slow),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=faults.environment(),
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "building\n"
        child.send_signal(how)
        said = child.stderr.read()
    assert child.returncode == status
    assert "Traceback" not in said
    if how != signal.SIGKILL:
        assert said.count("interrupted; finished builds stay in the cache") == 1
        assert not [*(top / "results").iterdir()]
    nothing_half_made(top)


def test_two_runs_at_once(top: Path, capsys: Capture) -> None:
    """The second says for whom it waits, and goes on when that one is gone."""
    cache = Cache(top / "cache").open()
    holder = subprocess.Popen(["flock", str(cache.root / "locks" / "testbed"), "sleep", "2"])
    try:
        deadline = time.monotonic() + 10
        while _is_free(cache.root / "locks" / "testbed") and time.monotonic() < deadline:
            time.sleep(0.01)
        (cache.root / "locks" / "testbed").write_text(str(holder.pid))
        assert faults.run(top) == 0
    finally:
        holder.wait()
    said = capsys.readouterr().err
    assert said.count(f"waiting for process {holder.pid} (flock") == 1
    assert whole(top)


def _is_free(path: Path) -> bool:
    path.touch()
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# --- the network -----------------------------------------------------------------------------

CONTENTS = b"contents" * 100


def test_there_is_no_network(top: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"http://127.0.0.1:{gone.getsockname()[1]}/"
    work = faults.download(top, address, hashlib.sha256(CONTENTS).hexdigest())
    assert faults.run(top, work=work) == 3
    one_line(capsys.readouterr().err, "ended with status 100", "check the network")
    nothing_half_made(top)


@pytest.mark.parametrize("answer", [CONTENTS[:100], CONTENTS[:-1] + b"!"])
def test_a_download_is_cut_or_altered(top: Path, answer: bytes, capsys: Capture) -> None:
    with faults.mirror(answer, len(CONTENTS)) as address:
        work = faults.download(top, address, hashlib.sha256(CONTENTS).hexdigest())
        assert faults.run(top, work=work) == 3
    one_line(capsys.readouterr().err, "ended with status 100", "check the network")
    nothing_half_made(top)


# --- SSH -------------------------------------------------------------------------------------


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[faults.SshServer]:
    """A server on this machine."""
    server = faults.SshServer(tmp_path)
    yield server
    server.cut()


def to_server(top: Path, server: faults.SshServer, key: Path, host_key: str) -> int:
    (top / "inventory.yaml").write_text(
        f"hosts:\n  gpu1:\n    address: 127.0.0.1\n    port: {server.port}\n    user: root\n"
        f"    key: {key}\n    host_key: {host_key}\n"
    )
    return faults.run(top, "--host", "gpu1", "--inventory", str(top / "inventory.yaml"))


def test_a_server_refuses_the_key(top: Path, sshd: faults.SshServer, capsys: Capture) -> None:
    (top / "other").mkdir()
    other = faults.SshServer(top / "other")
    other.cut()
    assert to_server(top, sshd, other.key_file, str(sshd.address.host_key)) == 2
    one_line(capsys.readouterr().err, "refuses the login with", "authorized_keys")
    assert len(sshd.transports) == 1  # nothing is tried again: servers lock out who does
    nothing_half_made(top)


def test_the_private_key_is_none(top: Path, sshd: faults.SshServer, capsys: Capture) -> None:
    (top / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nhalf of it\n")
    assert to_server(top, sshd, top / "key", str(sshd.address.host_key)) == 2
    one_line(capsys.readouterr().err, "is no private key", "inventory")
    assert len(sshd.transports) == 1
    nothing_half_made(top)


def test_a_server_has_another_host_key(top: Path, sshd: faults.SshServer, capsys: Capture) -> None:
    (top / "other").mkdir()
    other = faults.SshServer(top / "other")
    other.cut()
    assert to_server(top, sshd, sshd.key_file, str(other.address.host_key)) == 2
    one_line(capsys.readouterr().err, "shows another host key", "is it the right machine?")
    nothing_half_made(top)


def test_the_private_key_is_missing(top: Path, sshd: faults.SshServer, capsys: Capture) -> None:
    begun = time.monotonic()
    assert to_server(top, sshd, top / "nothing", str(sshd.address.host_key)) == 2
    assert time.monotonic() - begun < 10  # nothing is tried again
    one_line(capsys.readouterr().err, "there is no key file", "private key")
    nothing_half_made(top)


def test_nobody_listens(top: Path, sshd: faults.SshServer, capsys: Capture) -> None:
    sshd.cut()
    assert to_server(top, sshd, sshd.key_file, str(sshd.address.host_key)) == 3
    one_line(capsys.readouterr().err, "refuses the connection", "does sshd run there")
    nothing_half_made(top)


# --- machines --------------------------------------------------------------------------------


def lost_on(top: Path, said: str, message: str, hint: str) -> None:
    """``on`` is lost with that reason and told once; vanilla has its figure; the cache is whole."""
    assert "Traceback" not in said
    lines = said.splitlines()
    (number,) = (n for n, text in enumerate(lines) if message in text and "nearmetal: " in text)
    assert hint in lines[number + 1]
    report = report_of(top)
    assert [row.values for row in report.measurements if row.subject.variant == "vanilla"] == [
        (42.0,)
    ]
    (lost,) = (one for one in report.checks if one.status == "error" and "measured:" in one.name)
    assert lost.name == "measured:toy:on-toy-series"
    assert message in lost.reason
    assert whole(top)


@pytest.fixture
def guest_shell(monkeypatch: pytest.MonkeyPatch, sshd: faults.SshServer) -> list[Any]:
    """Guests are reached by SSH; what is in the list is called with each guest's shell."""
    plain = fakes.guest
    hooks: list[Any] = []

    def over_ssh(host: Any, label: str = "guest") -> Any:
        up = plain(host, label)
        up.shell = sshd.shell(label)
        for hook in hooks:
            hook(up.shell)
        return up

    monkeypatch.setattr(fakes, "guest", over_ssh)
    return hooks


VARIANTS = ("--variant", "vanilla,on")
HANG = '[ "$1" = vanilla ] || { touch "$0.hangs"; sleep 12; }; echo 42\n'


def when_it_hangs(top: Path, what: Any) -> None:
    """Call something as soon as the guest of ``on`` hangs."""

    def wait() -> None:
        end = time.monotonic() + 20
        while not (top / "measure.hangs").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.5)  # the client has heard that the command runs
        what()

    threading.Thread(target=wait, daemon=True).start()


def test_ssh_is_cut(
    top: Path, sshd: faults.SshServer, guest_shell: list[Any], capsys: Capture
) -> None:
    (top / "measure").write_text(HANG)
    when_it_hangs(top, sshd.cut)
    assert faults.run(top, *VARIANTS) == 1
    lost_on(top, capsys.readouterr().err, "the connection broke in 'sh ", "logs of the run")


def test_a_guest_hangs(top: Path, guest_shell: list[Any], capsys: Capture) -> None:
    (top / "measure").write_text(HANG)
    assert faults.run(top, *VARIANTS) == 1
    lost_on(top, capsys.readouterr().err, "did not end within 5 s", "logs of the run")


def test_the_emulator_is_killed(top: Path, guest_shell: list[Any], capsys: Capture) -> None:
    (top / "measure").write_text(HANG)
    console = top / "console.log"
    console.write_text("nearmetal: up\n")
    sleep = ["sleep", "60"]
    with testbed.emulating(
        sleep, scratch=top / "scratch", emulator_log=top / "emulator.log"
    ) as process:
        host = testbed.Testbed(None, process, Console("host", console), 0)  # type: ignore[arg-type]
        guest_shell.append(lambda shell: setattr(shell, "watch", host.watch))
        when_it_hangs(top, process.kill)
        assert faults.run(top, *VARIANTS) == 1
    said = capsys.readouterr().err
    assert "nearmetal: up" in said  # the console's last lines
    lost_on(top, said, "the emulated host ended by itself (status -9)", "emulator.log")


def test_the_host_panics(top: Path, guest_shell: list[Any], capsys: Capture) -> None:
    (top / "measure").write_text(HANG)
    path = top / "console.log"
    path.write_text("nearmetal: up\n")
    console = Console("host", path)
    guest_shell.append(lambda shell: setattr(shell, "watch", console.broken))
    panic = "[  9.1] Kernel panic - not syncing: Fatal exception\n"
    when_it_hangs(top, lambda: path.write_text("nearmetal: up\n" + panic))
    assert faults.run(top, *VARIANTS) == 1
    said = capsys.readouterr().err
    lost_on(top, said, "Kernel panic - not syncing", f"the whole console is {path}")


# --- clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-86400.0, 86400.0 * 365])
def test_the_clock_jumps_in_a_run(top: Path, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    moved = [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + moved[0])

    def work(folder: Path) -> None:
        faults.whole(folder)
        moved[0] = jump

    assert faults.run(top, work=work) == 0
    assert 0 <= report_of(top).run.seconds < 60
    assert whole(top)


def test_package_lists_of_the_future_are_read_again(
    top: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A clock that was a year ahead once must not keep old lists for a year."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"http://127.0.0.1:{gone.getsockname()[1]}/"
    mirror = debian.Mirror("main", address, "/usr/share/keyrings/debian-archive-keyring.gpg")
    monkeypatch.setattr(debian, "machine_mirrors", lambda: (mirror,))
    cache = Cache(top / "cache").open()
    (cache.root / "apt").mkdir()
    (cache.root / "apt" / "nearmetal.sources").write_text(debian.sources_text((mirror,)))
    stamp = cache.root / "apt" / "updated"
    stamp.touch()
    debian.open_archive(cache)
    assert "could not be read again" not in capsys.readouterr().err
    later = time.time() + 86400 * 365
    os.utime(stamp, (later, later))
    debian.open_archive(cache)
    assert capsys.readouterr().err.count("could not be read again; the old ones are used") == 1


# --- files that somebody left ----------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"schema": 1, "run', "[]", "{}"])
def test_a_report_is_broken(top: Path, text: str, capsys: Capture) -> None:
    assert faults.run(top) == 0
    (run,) = (one for one in (top / "results").iterdir() if not one.is_symlink())
    if not run.is_dir():
        pytest.fail(f"{run} is no folder")
    (run / "report.json").write_text(text)
    capsys.readouterr()
    assert main(["report", "--results-dir", str(top / "results"), run.name]) == 2
    one_line(capsys.readouterr().err, str(run), "")


@pytest.mark.parametrize("text", ["", '{"name": "testb'])
def test_a_note_of_machines_is_broken(top: Path, text: str, capsys: Capture) -> None:
    cache = Cache(top / "cache").open()
    (cache.root / "sessions").mkdir()
    (cache.root / "sessions" / "testbed.json").write_text(text)
    assert main(["ssh", "--cache-dir", str(cache.root), "host"]) == 2
    one_line(capsys.readouterr().err, "testbed.json cannot be read", "nearmetal boot")


def test_a_history_is_broken(top: Path, capsys: Capture) -> None:
    assert faults.run(top) == 0
    (top / "history.db").write_text("no SQLite\n" * 1000)
    capsys.readouterr()
    words = ["history", "list", "--results-dir", str(top / "results")]
    assert main([*words, "--file", str(top / "history.db")]) == 3
    one_line(capsys.readouterr().err, "history.db", "")
    assert json.loads((top / "results" / "latest" / "report.json").read_text())


def test_the_table_has_all_of_these() -> None:
    table = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| .* \| `(\w+)` \|$", table, re.M)
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(rows) == tests - {"the_table_has_all_of_these"}
