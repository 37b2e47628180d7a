# SPDX-License-Identifier: GPL-2.0-or-later
"""What all emulated hosts have in common: a process, a console, a boot, an autopsy."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...builds import Bochs, Image, Kernel, Keys, Qemu
from ...core import ui
from ...core.cache import Cache
from ...core.errors import EnvironmentBroken, MeasurementError
from ...core.proc import guarded
from ...core.settings import Settings
from ...patches.series import TreeName
from ...sources.archive import Source
from ..console import UP, Console
from ..equipment import Equipment
from ..host import Host, reach
from ..shell import Address

BOOT_DEADLINE_S = 600.0
"""A quiet machine takes 30 to 60 s; a host that dies ends the wait at once."""


@dataclass(frozen=True)
class Made:
    """A built emulator: what it is, from which source, and its plugin that counts instructions."""

    build: Qemu | Bochs
    source: Source
    counter: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """What an emulated host is made of, and how it is to be set up.

    ``things`` are files and folders of the store that it is to see; ``iommu`` says whether Linux
    turns the IOMMU on (it is there in any case), ``ats`` whether the initiator has ATS; ``extra``
    are further words of the emulator's command line.
    """

    made: Made
    kernel: Kernel
    initramfs: Path
    image: Image
    keys: Keys
    store: Path
    things: tuple[Path, ...] = ()
    iommu: bool = True
    ats: bool = False
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Emulator:
    """An emulated host: how it is built and switched on, and what it can do.

    ``tree`` has its patches. ``has`` are capabilities (machines.equipment), ``lacks`` the reasons
    for those that it has not.
    """

    name: str
    tree: TreeName
    has: frozenset[str]
    lacks: Mapping[str, str]
    build: Callable[[Settings, Cache, Sequence[Path]], Made]
    machine: Callable[[Wanted], Machine]


class Machine(Protocol):
    """The parts of an emulated host of either kind, to be switched on."""

    @property
    def keys(self) -> Keys:
        """The SSH keys that it was given."""

    @property
    def store(self) -> Path:
        """The cache's store."""

    @property
    def equipment(self) -> Equipment:
        """What the host has, as far as it is known before it is up."""

    def look(self, host: Host) -> Equipment:
        """The same, with what only the host itself can tell."""

    def power_on(
        self, *, console: Path, scratch: Path, emulator_log: Path
    ) -> AbstractContextManager[Testbed]:
        """Start the emulator; it is killed when the context ends or the harness dies."""


class Testbed:
    """A running emulator; a context manager owns it."""

    def __init__(
        self,
        parts: Machine,
        process: subprocess.Popen[bytes],
        console: Console,
        port: int,
        instructions: Path | None = None,
        shown: frozenset[Path] | None = None,
        monitor: Path | None = None,
    ) -> None:
        self.parts = parts
        self._monitor = monitor
        """Where the emulator answers to what is written to its standard input (QMP)."""
        self.instructions = instructions
        self.process = process
        self.console = console
        self.port = port
        self.shown = shown
        """What of the store the host sees; None: all of it."""

    def alive(self) -> None:
        """Raise MeasurementError when the emulator has ended."""
        status = self.process.poll()
        if status is not None:
            raise MeasurementError(
                f"the emulated host ended by itself (status {status})",
                detail=self.console.tail(),
                hint="was it killed, or out of memory? see dmesg, and the run's emulator.log",
            )

    def watch(self) -> None:
        """Raise MeasurementError when the emulator has ended or the host's kernel died."""
        self.console.broken()
        self.alive()

    def autopsy(self) -> str:
        """What the emulated CPUs are at, for an error that says that the host does not answer.

        A host may hang without a word on its console. Two looks tell one that runs in circles
        from one that waits for an interrupt, and an emulator that hangs itself answers neither.
        """
        if self._monitor is None or self.process.stdin is None or self.process.poll() is not None:
            return ""
        begin = self._monitor.stat().st_size
        with contextlib.suppress(OSError):
            for command in _AUTOPSY:
                self.process.stdin.write(json.dumps(command).encode() + b"\n")
                self.process.stdin.flush()
                time.sleep(_AUTOPSY_PAUSE_S)
        with self._monitor.open("rb") as stream:
            stream.seek(begin)
            said = stream.read().decode(errors="replace")
        found = read_autopsy(said)
        if found == [SILENT]:
            found += threads(self.process.pid)
        return "\n".join(("the emulator's monitor:", *found))

    @property
    def address(self) -> Address:
        """Where the host's sshd is reached."""
        return Address(
            "127.0.0.1", self.port, "root", self.parts.keys.login, self.parts.keys.host_public
        )


_REGISTERS = {
    "execute": "human-monitor-command",
    "arguments": {"command-line": "info registers -a"},
}
_LAPICS = tuple(
    {
        "execute": "human-monitor-command",
        "arguments": {"command-line": f"info lapic {number}"},
    }
    for number in range(4)
)
"""One that is not there is told, and left out."""
_AUTOPSY = ({"execute": "qmp_capabilities"}, _REGISTERS, *_LAPICS, _REGISTERS)
_AUTOPSY_PAUSE_S = 0.5
SILENT = "it does not answer"


def read_autopsy(said: str) -> list[str]:
    """Of the monitor's answers, a line for each CPU and look: where it is, and whether it halts.

    ``info registers`` prints CPU#, RIP or EIP, CPL and HLT (QEMU, target/i386/cpu-dump.c), ``info
    lapic`` the interrupts in service and those requested (target/i386/cpu-apic.c): a CPU that halts
    with one requested has not been told.
    """
    found = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            text = answer.get("return") if isinstance(answer, dict) else None
            text = text if isinstance(text, str) else ""
            if apic := re.search(r"local APIC state for (CPU) (\d+)", text):
                rows = re.findall(r"^(ISR|IRR)\s+(.*?)\s*$", text, re.M)
                words = " ".join(f"{name}={' '.join(which.split())}" for name, which in rows)
                found.append(f"CPU#{apic[2]} {words}")
                continue
            for part in re.split(r"(?=CPU#\d)", text):
                words_ = re.findall(r"CPU#\d+|[RE]IP=\w+|(?:RFL|EFL)=\w+|CPL=\d|HLT=\d", part)
                found += [" ".join(words_)] if words_ else []
    return found or [SILENT]


def threads(pid: int) -> list[str]:
    """What each thread of a program waits for, and, where gdb is installed, its backtrace."""
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            waits = (task / "wchan").read_text().strip()
            found.append(f"thread {task.name} {name}: {state} {waits if waits != '0' else ''}")
    if shutil.which("gdb"):
        line = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all backtrace 8"]
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            done = subprocess.run(
                line, capture_output=True, text=True, timeout=60, check=False, errors="replace"
            )
            found += [row for row in done.stdout.splitlines() if row.startswith(("Thread", "#"))]
    return [row.rstrip() for row in found]


def free_port() -> int:
    """A TCP port of the loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def emulating(
    line: Sequence[str], *, scratch: Path, emulator_log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an emulator; it is killed when the context ends or the harness dies.

    Then ``scratch`` is removed. Its standard input is a pipe, its output is added to the log.
    """
    try:
        with emulator_log.open("ab") as log:
            log.write((" ".join(line) + "\n").encode())
            log.flush()
            process = subprocess.Popen(
                guarded(line),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def wait_up(testbed: Testbed) -> Host:
    """Wait for the emulated host's boot and log in to it."""
    try:
        testbed.console.wait_for(UP, deadline_s=BOOT_DEADLINE_S, alive=testbed.alive)
    except MeasurementError as error:
        raise BootFailed(error.message, detail=error.detail, hint=error.hint) from None
    try:
        host = reach(
            "testbed",
            testbed.address,
            deadline_s=180,
            work="/run/nearmetal",
            store=testbed.parts.store,
            equipment=testbed.parts.equipment,
        )
    except EnvironmentBroken as error:
        raise BootFailed(error.message, detail=testbed.console.tail(), hint=error.hint) from None
    host.shell.watch, host.shell.console = testbed.watch, testbed.console
    host.shell.autopsy = testbed.autopsy
    host.shown = testbed.shown
    host.equipment = testbed.parts.look(host)
    host.instructions = testbed.instructions
    return host


class BootFailed(MeasurementError):
    """The emulated host did not come up; one more try is allowed, and reported."""


@contextmanager
def running_host(
    parts: Machine, *, logs: Path, scratch: Path
) -> Iterator[tuple[Host, Testbed, int]]:
    """An emulated host that is up: (host, testbed, boots that were tried again: 0 or 1)."""
    retries = 0
    while True:
        name = "host-console.log" if not retries else "host-console-2.log"
        boot = parts.power_on(
            console=logs / name, scratch=scratch, emulator_log=logs / "emulator.log"
        )
        with boot as testbed:
            with ui.step("booting the emulated host"):
                try:
                    host = wait_up(testbed)
                except BootFailed as error:
                    if retries:
                        raise
                    ui.warn(f"{error.message}; trying once more")
                    retries += 1
                    continue
            try:
                yield host, testbed, retries
            finally:
                host.shell.close()
            return
