# SPDX-License-Identifier: GPL-2.0-or-later
"""What is up is found by ``ssh``, and what is gone is told; a command in a guest; a second boot."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes

from nearmetal import builds
from nearmetal.cli import bootcmd
from nearmetal.cli.main import main
from nearmetal.core.cache import Cache, process
from nearmetal.core.errors import MeasurementError, UsageError
from nearmetal.core.settings import Settings
from nearmetal.machines import session
from nearmetal.machines.session import Session
from nearmetal.machines.shell import Address
from nearmetal.runs import execute, plan

GUEST = Address("127.0.0.1", 40022)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache").open()


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# --- notes -----------------------------------------------------------------------------------


def test_nothing_is_up(cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"^no host is up$"):
        session.find(cache)


def test_what_is_up_is_found_until_it_ends(cache: Cache, port: int) -> None:
    keys = builds.keys(cache)
    up = Session(Address("127.0.0.1", port, key=keys.login), GUEST)
    with session.noted(cache, up):
        line = session.ssh_command(cache, keys, "guest", ["true"])
        assert line[-2:] == ["root@127.0.0.1", "true"]
        assert str(port) in next(word for word in line if word.startswith("ProxyCommand="))
    with pytest.raises(UsageError, match=r"^no host is up$"):
        session.find(cache)


def test_a_host_alone_has_no_guest(cache: Cache, port: int) -> None:
    with (
        session.noted(cache, Session(Address("127.0.0.1", port), None)),
        pytest.raises(UsageError, match="no guest is up"),
    ):
        session.ssh_command(cache, builds.keys(cache), "guest", [])


def test_a_host_that_died_is_told_with_the_reason(cache: Cache) -> None:
    with (
        pytest.raises(MeasurementError),
        session.noted(cache, Session(fakes.HERE, GUEST)),
    ):
        raise MeasurementError("the emulated host ended by itself (status 1)\nand more")
    with pytest.raises(UsageError, match=r"is gone: testbed: the emulated host ended by itself"):
        session.find(cache)
    with session.noted(cache, Session(fakes.HERE, GUEST)):
        assert session.find(cache)["pid"] == os.getpid()


def test_a_process_that_was_killed_is_told_once(cache: Cache) -> None:
    pid = dead_process()
    (cache.root / "sessions").mkdir()
    note = cache.root / "sessions" / "testbed.json"
    note.write_text(f'{{"name": "testbed", "pid": {pid}, "host": null, "guest": null}}')
    with pytest.raises(UsageError, match=f"its process {pid} was killed"):
        session.find(cache)
    with pytest.raises(UsageError, match=r"^no host is up$"):
        session.find(cache)


def test_a_host_that_does_not_answer(cache: Cache) -> None:
    keys = builds.keys(cache)
    with socket.socket() as silent:  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        here = Address("127.0.0.1", silent.getsockname()[1], key=keys.login)
        with (
            session.noted(cache, Session(here, GUEST)),
            pytest.raises(UsageError, match="does not answer") as caught,
        ):
            session.ssh_command(cache, keys, "guest", [])
    assert f"process {os.getpid()}" in str(caught.value.hint)


def test_of_several_hosts_one_is_named(cache: Cache, port: int) -> None:
    here = Address("127.0.0.1", port)
    with (
        session.noted(cache, Session(here, None)),
        session.noted(cache, Session(here, None, "gpu1")),
    ):
        with pytest.raises(UsageError, match="several hosts are up: gpu1, testbed"):
            session.find(cache)
        assert session.find(cache, "gpu1")["name"] == "gpu1"
        with pytest.raises(UsageError, match="no host 'gpu2'") as caught:
            session.find(cache, "gpu2")
    assert "'gpu1'" in str(caught.value.hint)


# --- locks -----------------------------------------------------------------------------------


def test_who_holds_a_lock_is_named(cache: Cache, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from nearmetal.core.cache import Cache\n"
    script += "with Cache(Path(sys.argv[1])).lock('testbed'): print('has it', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(cache.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UsageError, match=f"'testbed' is in use by process {holder.pid} "):
            cache.lock("testbed", wait=False).__enter__()
    finally:
        holder.communicate(b"\n", 10)
    with cache.lock("testbed", wait=False):
        pass


def test_a_process_in_words() -> None:
    line = ["sh", "-c", "sleep 60; :", "/x/bin/nearmetal", "run", "--only", "a b"]
    with subprocess.Popen(line) as child:
        try:
            while "sleep" not in process(str(child.pid)) and "run" not in process(str(child.pid)):
                pass
            assert process(str(child.pid)) == f"process {child.pid} (nearmetal run --only 'a b')"
        finally:
            child.kill()
    assert process("") == "another process"
    assert process(str(child.pid)) == f"process {child.pid}"


# --- a command -------------------------------------------------------------------------------


def test_output_comes_as_it_is_printed_and_the_status_at_the_end() -> None:
    out, err = io.BytesIO(), io.BytesIO()
    shell = fakes.piped("guest")
    status = shell.stream("printf one; echo two >&2; read x; echo $x; exit 7", out, err, _lines())
    assert (status, out.getvalue(), err.getvalue()) == (7, b"one3\n", b"two\n")


def _lines() -> io.BytesIO:
    return io.BytesIO(b"3\n")


def test_a_machine_that_dies_ends_a_command() -> None:
    shell = fakes.piped("guest")

    def dead() -> None:
        raise MeasurementError("the kernel died")

    shell.watch = dead
    timer = threading.Timer(20, lambda: client_of(shell).channels[0].close())
    timer.start()
    try:
        with pytest.raises(MeasurementError, match="the kernel died"):
            shell.stream("sleep 60", io.BytesIO(), io.BytesIO())
    finally:
        timer.cancel()
    assert client_of(shell).channels[0].closed


def test_a_connection_that_breaks_ends_a_command() -> None:
    shell = fakes.piped("guest")

    def cut() -> None:
        channel = client_of(shell).channels[0]
        channel.broken = True
        channel.closed = True

    shell.watch = cut
    with pytest.raises(MeasurementError, match="the connection broke in 'sleep 60'"):
        shell.stream("sleep 60", io.BytesIO(), io.BytesIO())


def client_of(shell: Any) -> fakes.PipeClient:
    return cast(fakes.PipeClient, shell._client)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> fakes.FakeLab:
    from nearmetal.core.settings import Settings

    settings = Settings(cache.root, cache.root, cache.root)
    found = fakes.FakeLab(settings, cache, equipment=plan.equipment_of("amd"))
    fakes.install(monkeypatch, found)
    monkeypatch.setattr(bootcmd, "Lab", found)
    monkeypatch.setattr(sys, "stdin", None)
    return found


def boot(cache: Cache, *words: str) -> int:
    where = ["--cache-dir", str(cache.root), "--results-dir", str(cache.root / "results")]
    return main(["boot", *where, *words])


def test_boot_runs_a_command_in_the_guest(
    lab: fakes.FakeLab, cache: Cache, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert boot(cache, "--", "sh", "-c", "echo 'a  b'; exit 5") == 5
    assert boot(cache, "--", "echo one | tr n N; exit 3") == 3
    assert boot(cache, "--no-guest", "--", "true") == 0
    assert capfdbinary.readouterr().out == b"a  b\noNe\n"
    assert lab.booted == ["vanilla", "vanilla"] * 2 + ["vanilla"]
    assert not [*(cache.root / "sessions").iterdir()]


def test_boot_of_another_variant_and_series(lab: fakes.FakeLab, cache: Cache) -> None:
    assert boot(cache, "--variant", "on", "--series", "pci-ecam", "--", "true") == 0
    assert lab.booted == ["patched", "on-pci-ecam"]


def test_a_second_boot_is_refused_before_anything_is_built(
    lab: fakes.FakeLab, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def taken(self: Cache, name: str, *, wait: bool = True) -> Iterator[None]:
        assert (name, wait) == ("testbed", False)
        raise UsageError("'testbed' is in use by process 1")
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "lock", taken)
        assert boot(cache) == 2
    assert "in use by process 1" in capsys.readouterr().err
    assert lab.booted == []


def test_boot_ends_when_its_host_dies_and_ssh_says_so(
    lab: fakes.FakeLab, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead() -> None:
        raise MeasurementError("the emulated host ended by itself")

    plain = fakes.guest

    def dying(host: Any, label: str = "guest") -> Any:
        up = plain(host, label)
        up.shell.watch = dead
        return up

    monkeypatch.setattr(fakes, "guest", dying)
    assert boot(cache) == 1
    with pytest.raises(UsageError, match="is gone: testbed: the emulated host ended by itself"):
        session.find(cache)


def test_a_server_is_reached_before_anything_is_built(
    lab: fakes.FakeLab, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that refuses the connection is not asked again."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        inventory = tmp_path / "inventory.yaml"
        port = silent.getsockname()[1]
        inventory.write_text(f"hosts:\n  gpu1:\n    address: 127.0.0.1\n    port: {port}\n")
        assert boot(cache, "--host", "gpu1", "--inventory", str(inventory)) == 3
    assert "refuses the connection" in capsys.readouterr().err
    assert lab.booted == []


# --- what a run measures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--series", "direct-p2"], "no series 'direct-p2' to switch on", "'direct-p2p'"),
        (["--series", "pci-ecam,direct-p3p"], "no series 'direct-p3p'", "'direct-p2p'"),
        (["--series", "pci-ecam", "--variant", "vanilla,off"], "vanilla and off", "--variant on"),
        (["--variant", "vanilla,of"], "there is no variant 'of'", "'off'"),
        (["--only", "lspci,vmexi"], "there is no test 'vmexi'", "'vmexit'"),
    ],
)
def test_names_in_lists(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--cache-dir", str(tmp_path), "--results-dir", str(tmp_path)]
    assert main(["run", *where, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said


def test_a_draft_cannot_be_switched_on(tmp_path: Path) -> None:
    import dataclasses

    from nearmetal.patches.series import load_series

    repo = Path(__file__).parents[2]
    every = [
        dataclasses.replace(one, draft=one.name == "pci-config-live")
        for one in load_series(repo / "patches", known=plan.known())
    ]
    settings = Settings(repo, tmp_path, tmp_path)
    with pytest.raises(UsageError, match="is a draft"):
        execute.chosen(settings, every, (), ["pci-config-live"])


def test_of_a_kernel_of_the_user_s_vanilla_alone_is_the_default(tmp_path: Path) -> None:
    import dataclasses

    from nearmetal.core import settings as places
    from nearmetal.core.settings import Settings
    from nearmetal.patches.series import load_series

    repo = places.repository()
    conf = Settings(repo, tmp_path, tmp_path)
    every = load_series(repo / "patches", known=plan.known())
    own = dataclasses.replace(conf, host_kernel=tmp_path)

    def chosen(settings: Settings, *more: Any) -> list[str]:
        return [one.label for one in execute.chosen(settings, every, *more)]

    assert chosen(own, ()) == ["vanilla"]
    assert chosen(own, (), ["pci-ecam"]) == ["vanilla", "on-pci-ecam"]
    assert chosen(own, ("off",)) == ["off"]
    assert chosen(conf, (), ["pci-ecam"]) == ["vanilla", "off", "on-pci-ecam"]
    assert len(chosen(conf, ())) > 4
