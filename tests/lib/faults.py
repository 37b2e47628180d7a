# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole runs with a fault in them: a toy test, its lab, an SSH server and a mirror on this machine.

``python -m lib.faults TOP BUILD WORDS...`` is such a run in a process of its own, for faults that
need one: a full or read-only file system, a signal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from nearmetal.cli.main import main
from nearmetal.core import settings as places
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.shell import Address, Shell, connect
from nearmetal.measure import registry
from nearmetal.patches.variants import Config
from nearmetal.runs import plan as plans
from nearmetal.sources.debian import Archive, Pinned

from . import fakes

TOY = """
from pathlib import Path

from nearmetal.measure.api import Metric, Test


def measure(bench):
    script = Path(__file__).with_name("measure")
    out = bench.guest.shell.run(f"sh {script} {bench.variant}", deadline_s=5).stdout
    return [bench.row("toy.answer", [int(out)])]


TEST = Test("toy", "A toy", measure, (Metric("toy.answer", "answers", "what a shell says"),),
            order=99, checks=Path(__file__).with_name("toy.yaml"))
"""
CHECKS = """
schema: 1
checks:
  - name: toy.is-42
    expression: minimum("toy.answer") == 42
    expected: "42"
    why: It says so.
"""
SERIES = """
series:
  - name: toy-series
    tree: qemu
    order: 1
    base: "11.1"
    purpose: Does nothing.
    about: Answers by a shell.
    headlines:
      - {metric: toy.answer, label: what a shell is asked for}
    tests: [toy]
    checks: [toy.is-42]
    enable:
      qemu: {toy.on: true}
"""
BUILD = "building the toy"


def prepare(top: Path) -> None:
    """A repository with the toy, as somebody's distribution has it."""
    (top / "nm_faults.py").write_text(TOY)
    (top / "toy.yaml").write_text(CHECKS)
    (top / "measure").write_text("echo 42\n")
    info = top / "nm_faults-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nm-faults\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nearmetal.tests]\ntoy = nm_faults:TEST\n")
    patches = top / "patches" / "qemu" / "toy-series"
    patches.mkdir(parents=True)
    (patches / "0001-toy.patch").touch()
    (top / "patches" / "series.yaml").write_text(SERIES)


@dataclasses.dataclass(frozen=True)
class BuildingLab(fakes.FakeLab):
    """A lab that makes one thing in the cache, by ``work``."""

    work: Callable[[Path], None] = lambda folder: None

    def build(
        self, settings: Settings, cache: Cache, plan: Sequence[Config], *, server: Any = None
    ) -> BuildingLab:
        """Make it."""
        cache.make("toy", {"toy": 1}, self.work, what=BUILD)
        return dataclasses.replace(self, settings=settings, cache=cache, server=server)


def whole(folder: Path) -> None:
    """A build of 64 KiB."""
    (folder / "thing").write_bytes(bytes(1 << 16))


def large(folder: Path) -> None:
    """A build of 4 MiB, in a process as compilers are."""
    from nearmetal.core import proc

    proc.run(["dd", "if=/dev/zero", f"of={folder / 'thing'}", "bs=64k", "count=64"], deadline_s=60)


def large_here(folder: Path) -> None:
    """The same, by the harness itself."""
    (folder / "thing").write_bytes(bytes(1 << 22))


def slow(folder: Path) -> None:
    """A build that has begun, and goes on until it is killed."""
    (folder / "half").touch()
    print("building", flush=True)
    time.sleep(60)


def run(top: Path, *words: str, work: Callable[[Path], None] = whole) -> int:
    """``nearmetal run`` of the toy with these options; the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(top)
        registry.forget()
        patch.setattr(places, "repository", lambda: top)
        nowhere = Settings(top, top / "cache", top / "results")
        lab = BuildingLab(
            nowhere, Cache(top / "cache"), equipment=plans.equipment_of("amd"), work=work
        )
        fakes.install(patch, lab)
        while [*(top / "results").glob(time.strftime("%Y%m%d-%H%M%S-*", time.gmtime()))]:
            time.sleep(0.05)  # a run's name has the second and the process
        where = ["--cache-dir", str(top / "cache"), "--results-dir", str(top / "results")]
        try:
            return main(["run", *where, "--only", "toy", *words])
        finally:
            sys.modules.pop("nm_faults", None)
            registry.forget()


def line(top: Path, work: Callable[[Path], None] = whole, *words: str) -> list[str]:
    """The command line of such a run in a process of its own."""
    return [sys.executable, "-m", "lib.faults", str(top), work.__name__, *words]


def environment() -> dict[str, str]:
    """What such a process needs."""
    tests = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{tests.parent / 'harness'}:{tests}"}


def mounted(script: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace, after a script of mounts; skip where none is allowed."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    space = ["unshare", "--mount", *user]
    try:
        subprocess.run(
            [*space, "mount", "-t", "tmpfs", "none", "/mnt"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespace is allowed here")
    return subprocess.run(
        [*space, "sh", "-ec", f'{script}\n"$@" || echo "status $?"', "sh", *command],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        timeout=120,
    )


# --- SSH -------------------------------------------------------------------------------------


class SshServer(paramiko.ServerInterface):
    """An sshd on this machine that lets one key in; its sessions are processes here."""

    def __init__(self, folder: Path) -> None:
        self.key_file = folder / "login"
        self.key = paramiko.RSAKey.generate(2048)
        self.key.write_private_key_file(str(self.key_file))
        self.host_key = paramiko.ECDSAKey.generate()
        self.transports: list[paramiko.Transport] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True, name="sshd").start()

    @property
    def address(self) -> Address:
        """Where it is, and who may log in."""
        shown = f"{self.host_key.get_name()} {self.host_key.get_base64()}"
        return Address("127.0.0.1", self.port, "root", self.key_file, shown)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                transport = paramiko.Transport(self.listener.accept()[0])
                transport.add_server_key(self.host_key)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=self)
                self.transports.append(transport)

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        """Let the one key in."""
        return AUTH_SUCCESSFUL if key == self.key else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        """Keys alone."""
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """Sessions."""
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        """Run it here."""

        def work() -> None:
            done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
            with contextlib.suppress(OSError, EOFError):
                channel.sendall(done.stdout)
                channel.sendall_stderr(done.stderr)
                channel.send_exit_status(done.returncode)
                channel.close()

        threading.Thread(target=work, daemon=True, name="exec").start()
        return True

    def cut(self) -> None:
        """Every connection is gone, and nobody listens any more."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for transport in self.transports:
            transport.close()

    def shell(self, name: str = "guest") -> Shell:
        """Logged in."""
        return connect(name, self.address, deadline_s=10)


# --- a mirror --------------------------------------------------------------------------------


@contextlib.contextmanager
def mirror(answer: bytes, length: int) -> Iterator[str]:
    """A web server that promises ``length`` bytes and sends ``answer``: its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(answer)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def download(top: Path, address: str, sha256: str) -> Callable[[Path], None]:
    """A build that fetches a file of a mirror by apt."""
    folder = top / "apt"
    folder.mkdir()
    archive = Archive(folder)
    archive.sources_file.write_text(f"Types: deb\nURIs: {address}\n")
    (folder / "apt.conf").write_text(
        'APT::Sandbox::User "root";\nAcquire::http::Proxy::127.0.0.1 "DIRECT";\n'
        'Acquire::Retries "0";\n'
    )

    def work(target: Path) -> None:
        archive.fetch_pinned(Pinned("pool/a.tar", "1", sha256), target)

    return work


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), *sys.argv[3:], work=globals()[sys.argv[2]]))
