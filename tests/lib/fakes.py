# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-ins: a shell on this machine, and a lab whose hosts and guests are such shells."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from nearmetal.builds import Qemu
from nearmetal.core.cache import Cache
from nearmetal.core.model import Build
from nearmetal.core.settings import Settings
from nearmetal.machines.equipment import Equipment
from nearmetal.machines.guest import Guest, GuestParts
from nearmetal.machines.host import Facts, Host
from nearmetal.machines.shell import Address, Result, Shell
from nearmetal.patches.variants import Config
from nearmetal.runs import execute
from nearmetal.runs import plan as plans

HERE = Address("127.0.0.1", 1)
FACTS = Facts("7.3", "cpu", "QEMU", "q35", True, "kvm_amd", 4096)


class LocalChannel:
    """What ``Running`` shows of a channel, over a process here."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def recv_ready(self) -> bool:
        return self.process.poll() is not None

    def recv(self, size: int) -> bytes:
        assert self.process.stdout
        return self.process.stdout.read(size)


class LocalRunning:
    def __init__(self, command: str) -> None:
        self.channel = LocalChannel(command)

    @property
    def ended(self) -> bool:
        return self.channel.process.poll() is not None

    def close(self) -> None:
        assert self.channel.process.stdin
        self.channel.process.stdin.close()
        self.channel.process.wait(10)


class PipeChannel:
    """A paramiko channel as far as ``Shell`` uses one, over pipes to a process here."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes]
        self.closed = False
        self.broken = False
        """As a connection that is gone: no exit status will come."""

    def exec_command(self, command: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(["sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe)
        self._ends = {False: False, True: False}

    def _pipe(self, error: bool) -> Any:
        return self.process.stderr if error else self.process.stdout

    def _ready(self, error: bool) -> bool:
        if self._ends[error] or not select.select([self._pipe(error)], [], [], 0)[0]:
            return False
        if self._pipe(error).peek(1):
            return True
        self._ends[error] = True
        return False

    def recv_ready(self) -> bool:
        return self._ready(False)

    def recv_stderr_ready(self) -> bool:
        return self._ready(True)

    def recv(self, size: int) -> bytes:
        return bytes(self._pipe(False).read1(size))

    def recv_stderr(self, size: int) -> bytes:
        return bytes(self._pipe(True).read1(size))

    @property
    def eof_received(self) -> bool:
        return all(self._ends.values())

    def exit_status_ready(self) -> bool:
        return not self.broken and self.process.poll() is not None

    def recv_exit_status(self) -> int:
        return self.process.returncode

    def sendall(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def shutdown_write(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def close(self) -> None:
        self.closed = True
        self.process.kill()
        self.process.wait()


class PipeClient:
    """A paramiko client whose sessions are processes here."""

    def __init__(self) -> None:
        self.channels: list[PipeChannel] = []

    def get_transport(self) -> PipeClient:
        return self

    def is_active(self) -> bool:
        return True

    def open_session(self, timeout: float) -> PipeChannel:
        self.channels.append(PipeChannel())
        return self.channels[-1]


def piped(name: str) -> Shell:
    """The real Shell, over pipes to processes here."""
    return Shell(name, cast(Any, PipeClient()), HERE)


class LocalShell:
    """A Shell whose machine is this one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = HERE
        self.watch: Callable[[], None] | None = None
        self.started: list[LocalRunning] = []

    def stream(
        self, command: str, out: BinaryIO, err: BinaryIO, feed: BinaryIO | None = None
    ) -> int:
        return piped(self.name).stream(command, out, err, feed)

    def run(
        self, command: str, *, deadline_s: float = 60.0, check: bool = True, **_: Any
    ) -> Result:
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=deadline_s, check=check
        )
        return Result(command, done.returncode, done.stdout, done.stderr)

    def read(self, path: str) -> str:
        return Path(path).read_text()

    def start(self, command: str) -> LocalRunning:
        self.started.append(LocalRunning(command))
        return self.started[-1]


class QuietHost(Host):
    """A host that is this machine, and on which nothing is changed."""

    def forget_log(self) -> None:
        """Leave the kernel's log alone."""

    def check(self) -> None:
        """Find nothing in it."""

    def load_kvm(self, parameters: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Load nothing."""

    @contextlib.contextmanager
    def parameters(self, wanted: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
        """Set none."""
        yield

    def place(self, path: Path) -> str:
        """Where it is."""
        return str(path)


def guest(host: Host, label: str = "guest") -> Guest:
    """A guest that is this machine's shell."""
    up = object.__new__(Guest)
    up.host, up.name, up.boot_retries = host, label, 0
    up.shell = cast(Shell, LocalShell(label))
    up.check = lambda: None  # type: ignore[method-assign]
    return up


@dataclasses.dataclass(frozen=True)
class FakeLab:
    """A lab that builds nothing. ``broken`` maps labels of guests to what breaks them.

    ``booted`` takes the labels of all that was up.
    """

    settings: Settings
    cache: Cache
    server: Any = None
    equipment: Equipment | None = None
    fresh: bool = False
    records: tuple[Build, ...] = (Build("image", "vanilla", "debian", "ab" * 32),)
    broken: dict[str, Exception] = dataclasses.field(default_factory=dict)
    hosts_broken: list[Exception] = dataclasses.field(default_factory=list)
    """What breaks every host's boot, if anything."""
    booted: list[str] = dataclasses.field(default_factory=list)
    guests: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What guests were made with, by label: ``parts`` and ``modules``."""
    programs: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Stand-ins for QEMU, by the label of the variant."""

    def build(
        self, settings: Settings, cache: Cache, plan: Sequence[Config], *, server: Any = None
    ) -> FakeLab:
        """The same lab, for these settings."""
        return dataclasses.replace(self, settings=settings, cache=cache, server=server)

    @contextlib.contextmanager
    def host(self, config: Config, logs: Path, **how: Any) -> Iterator[Host]:
        """This machine."""
        words = ["patched" if config.linux_patches else "vanilla"]
        words += [] if how.get("iommu", True) else ["without iommu"]
        words += ["with ats"] if how.get("ats") else []
        name = " ".join(words)
        self.booted.append(name)
        if self.hosts_broken:
            raise self.hosts_broken[0]
        (logs / "host-console.log").write_text("up\n")
        found = self.equipment or plans.equipment_of(self.settings.testbed)
        yield QuietHost(cast(Shell, LocalShell("host")), FACTS, "/nowhere", equipment=found)

    def qemu(self, config: Config) -> Qemu:
        """The program that ``programs`` has for the variant."""
        return Qemu(self.programs[config.label], Path("/nowhere"), "11.1", "ab" * 32, False)

    def guest_parts(self, config: Config, host: Host, assigned: Any = None) -> GuestParts:
        """Parts of nothing."""
        return GuestParts(*(cast(Any, None),) * 5, extra=config.qemu_args)

    @contextlib.contextmanager
    def guest(
        self, host: Host, config: Config, logs: Path, *, label: str, **how: Any
    ) -> Iterator[Guest]:
        """A shell on this machine."""
        self.guests[label] = how
        self._up(label)
        yield guest(host, label)

    def _up(self, label: str) -> None:
        self.booted.append(label)
        if label in self.broken:
            raise self.broken[label]


def install(monkeypatch: pytest.MonkeyPatch, lab: FakeLab) -> None:
    """Runs use this lab, and count no exits."""

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(execute, "Lab", lab)
    monkeypatch.setattr(execute, "counting", nothing)
