# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest: a VM that the harness starts on a host, with QMP and SSH through the host.

QMP is QEMU's standard input and output, carried by the SSH channel that runs it: no port
that others on the host could reach. A second channel watches over it: when the harness is
gone, so is the VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from qemu.qmp import ExecuteError, QMPClient, QMPError

from ..builds import Image, Kernel, Keys, Qemu
from ..core import ui
from ..core.errors import EnvironmentBroken, MeasurementError
from .console import UP, Console
from .equipment import ARRANGED
from .host import Host
from .shell import Address, Running, Shell, connect, free_port_on

BOOT_DEADLINE_S = 600.0
"""On a busy machine a guest of the emulated Intel host took 230 s."""
LOGIN_DEADLINE_S = 240.0
ENDING_S = 3.0
"""A QEMU that dies may dump its core first."""
CMDLINE = "console=ttyS0 panic=-1 oops=panic nokaslr quiet loglevel=5"


@dataclass(frozen=True)
class GuestParts:
    """What a guest is made of (paths on this machine) and what it is given.

    ``assigned`` are PCI addresses of the host that are with vfio-pci; they lie below a switch
    in the guest, one a downstream port, in this order.
    """

    qemu: Qemu
    kernel: Kernel
    initramfs: Path
    image: Image
    keys: Keys
    cpus: int = 1
    memory_mib: int = 1024
    cpu: str = "host"
    """The model of the CPUs."""
    assigned: tuple[str, ...] = ()
    iommufd: bool = False
    """Map guest memory by iommufd and not by the type1 container. BARs are mapped for DMA by both;
    with iommufd that takes QEMU 11.1, and a dma-buf of each BAR from the host's kernel."""
    machine: str = ""
    """Further options of the machine."""
    host_addresses: bool = False
    """Whether the CPU has as many address bits as the host's, for BARs at its addresses."""
    accel: Mapping[str, str] = field(default_factory=dict)
    """Properties of the accelerator."""
    arguments: tuple[str, ...] = ()
    """In place of machine, accelerator, CPU, memory and switch: a guest that somebody else has
    written. ``assigned`` are then only taken from their drivers."""
    extra: tuple[str, ...] = ()


def command_line(
    parts: GuestParts,
    *,
    program: str,
    firmware: str,
    kernel: str,
    initramfs: str,
    image: str,
    folder: str,
    name: str,
    port: int,
) -> list[str]:
    """QEMU's command line; the paths are the host's."""  # fmt: skip
    # beside host bridges of its own QEMU takes the last for devices without a bus
    bus = ",bus=pcie.0" if parts.arguments else ""
    line = [
        program,
        *("-L", firmware),
        *("-name", f"guest={name}"),
        *(parts.arguments or _own_machine(parts)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", "stdio,id=qmp,signal=off", "-qmp", "chardev:qmp"),
        *("-serial", f"file:{folder}/console"),
        *("-pidfile", f"{folder}/pid"),
        *("-kernel", kernel, "-initrd", initramfs, "-append", CMDLINE),
        *("-drive", f"file={image},if=none,id=root,format=raw,readonly=on"),
        *("-device", f"virtio-blk-pci,drive=root,serial=nmroot{bus}"),
        *("-device", f"virtio-rng-pci{bus}"),
        *("-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", f"virtio-net-pci,netdev=net0,romfile={bus}"),
    ]
    if not parts.arguments:
        line += _own_switch(parts)
    return [*line, *parts.extra]


def _own_machine(parts: GuestParts) -> list[str]:
    return [
        *("-machine", ",".join(("q35", parts.machine)) if parts.machine else "q35"),
        *("-accel", ",".join(("kvm", *(f"{key}={value}" for key, value in parts.accel.items())))),
        *("-cpu", f"{parts.cpu},host-phys-bits=on" if parts.host_addresses else parts.cpu),
        *("-smp", str(parts.cpus), "-m", str(parts.memory_mib)),
    ]


def _own_switch(parts: GuestParts) -> list[str]:
    line = [
        *("-device", "pcie-root-port,id=rp0,chassis=10,slot=10"),
        *("-device", "x3130-upstream,id=up0,bus=rp0"),
    ]
    backend = ",iommufd=iommufd0" if parts.iommufd else ""
    if parts.iommufd:
        line += ["-object", "iommufd,id=iommufd0"]
    for number, address in enumerate(parts.assigned):
        port_id = f"dn{number}"
        slot = 11 + number
        line += ["-device", f"xio3130-downstream,id={port_id},bus=up0,chassis={slot},slot={slot}"]
        line += ["-device", f"vfio-pci,host={address},bus={port_id},id=hostdev{number}{backend}"]
    return line


class _Qmp:
    """QMP over an SSH channel: a socket pair and two threads between it and qemu.qmp."""

    def __init__(self, channel: paramiko.Channel, name: str, errors: Path) -> None:
        self._name = name
        self._channel = channel  # QEMU's standard input and output
        ours, theirs = socket.socketpair()
        self._errors = errors
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient(name)
        for work in (self._from_channel, self._to_channel):
            threading.Thread(target=work, args=(ours,), daemon=True, name="qmp-pump").start()
        threading.Thread(target=self._keep_errors, daemon=True, name="qemu-stderr").start()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="qmp-loop").start()
        # greetings of a QEMU that dies at once are told by its own standard error
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        try:
            self._wait(self._client.connect(theirs), 60.0)
        except (QMPError, OSError, TimeoutError):
            raise MeasurementError(
                f"{name}: QEMU did not start", detail=self._last_words()
            ) from None

    def _last_words(self) -> str:
        """How QEMU ended, if it did, and the end of what it said on standard error."""
        end = time.monotonic() + ENDING_S
        while not self._channel.exit_status_ready() and time.monotonic() < end:
            time.sleep(0.05)
        ending = "QEMU is there still"
        if self._channel.exit_status_ready():
            # paramiko knows no "exit-signal" (RFC 4254 section 6.10), and keeps its -1
            status = self._channel.recv_exit_status()
            ending = "a signal ended QEMU" if status < 0 else f"QEMU ended with status {status}"
        said = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        return f"{ending}; it said:\n{said[-2000:] or 'nothing'}"

    def _from_channel(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._channel.recv(1 << 16):
                sock.sendall(data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    def _to_channel(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := sock.recv(1 << 16):
                self._channel.sendall(data)

    def _keep_errors(self) -> None:
        with self._errors.open("ab") as log, contextlib.suppress(OSError):
            while data := self._channel.recv_stderr(1 << 16):
                log.write(data)
                log.flush()

    def _wait(self, work: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, deadline_s), self._loop)
        return future.result(deadline_s + 5)

    def execute(self, command: str, arguments: dict[str, Any] | None, deadline_s: float) -> Any:
        try:
            return self._wait(self._client.execute(command, arguments), deadline_s)
        except (QMPError, OSError, TimeoutError) as error:
            raise MeasurementError(
                f"{self._name}: QMP command {command}: {error or type(error).__name__}",
                # an answer that says no is no trouble of the connection
                detail=None if isinstance(error, ExecuteError) else self._last_words(),
            ) from None

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._wait(self._client.disconnect(), 5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)


class Guest:
    """A VM that is up; ``shell`` is a login in it."""

    def __init__(self, host: Host, name: str, qmp: _Qmp, console: Console) -> None:
        self.host = host
        self.name = name
        self.console = console
        self.boot_retries = 0
        """1 if KVM gave up the first boot."""
        self._qmp = qmp
        self._login: Callable[[], Shell]
        self._alive: Callable[[], None]
        self.shell: Shell

    def login(self) -> None:
        """Log in; for a guest that came up again or arrived by migration."""
        self.shell = self._login()

    def comes_up_again(self, start: int) -> None:
        """Wait for a boot of the same QEMU, behind a position of the console, and log in.

        QEMU must have been told to (QMP: set-action, reboot=reset): else it ends.
        """
        self.console.wait_for(UP, deadline_s=BOOT_DEADLINE_S, alive=self._alive, start=start)
        self.login()

    def qmp(self, command: str, deadline_s: float = 60.0, **arguments: Any) -> Any:
        """A QMP command's answer (docs/interop/qemu-qmp-ref); MeasurementError if refused."""
        return self._qmp.execute(command, arguments or None, deadline_s)

    def has_property(self, path: str, name: str) -> bool:
        """Whether an object of QEMU's has a property (QMP command qom-list)."""
        return any(one["name"] == name for one in self.qmp("qom-list", path=path))

    def has_child(self, path: str, name: str) -> bool:
        """Whether an object of QEMU's has a child: for a device, whether it is still there."""
        return self.has_property(path, name)

    def check(self) -> None:
        """Raise MeasurementError when the guest's or the host's kernel broke."""
        self.console.check()
        self.host.check()


def _follow(running: Running, path: Path) -> None:
    with path.open("ab") as log, contextlib.suppress(OSError):
        while data := running.channel.recv(1 << 16):
            log.write(data)
            log.flush()


class GuestBroke(MeasurementError):
    """KVM gave the guest up (KVM_EXIT_INTERNAL_ERROR): QEMU has stopped it and lives on."""


@contextmanager
def running_guest(host: Host, parts: GuestParts, *, logs: Path, label: str) -> Iterator[Guest]:
    """A guest that is up; it is powered off, or killed, when the context ends.

    On an emulated host a boot that KVM gives up is tried once more: the emulator of SVM is
    suspected (docs/testbed.md). ``Guest.boot_retries`` says so, and the report.
    """
    for attempt in (0, 1):
        with contextlib.ExitStack() as stack:
            try:
                guest = stack.enter_context(_powered_guest(host, parts, logs=logs, label=label))
            except GuestBroke as error:
                if attempt or not host.can(ARRANGED):
                    raise
                ui.warn(f"{error.message}; trying once more")
                ui.say(error.detail or "")
                for path in (_console_log(logs, label), _qemu_log(logs, label)):
                    with contextlib.suppress(FileNotFoundError):
                        path.rename(path.with_name(path.name.replace(label, f"{label}-broke", 1)))
                continue
            guest.boot_retries = attempt
            yield guest
        return


def _console_log(logs: Path, label: str) -> Path:
    return logs / f"guest-{label}-console.log"


def _qemu_log(logs: Path, label: str) -> Path:
    return logs / f"guest-{label}-qemu.log"


@contextmanager
def waiting_guest(host: Host, parts: GuestParts, *, logs: Path, label: str) -> Iterator[Guest]:
    """A QEMU that waits for a migration (QMP: migrate-incoming); then ``Guest.login``."""
    parts = dataclasses.replace(parts, extra=(*parts.extra, "-incoming", "defer"))
    with _powered_guest(host, parts, logs=logs, label=label, boots=False) as guest:
        yield guest


@contextmanager
def _powered_guest(
    host: Host, parts: GuestParts, *, logs: Path, label: str, boots: bool = True
) -> Iterator[Guest]:
    name = f"nearmetal-{os.urandom(4).hex()}"
    folder = f"{host.work}/vm-{name}"
    shell = host.shell
    shell.run(f"mkdir -p {shlex.quote(folder)} && : > {shlex.quote(folder)}/console")
    port = free_port_on(shell, 40022, 40099)
    line = command_line(
        parts,
        program=host.place(parts.qemu.program),
        firmware=host.place(parts.qemu.firmware),
        kernel=host.place(parts.kernel.image),
        initramfs=host.place(parts.initramfs),
        image=host.place(parts.image.path),
        folder=folder,
        name=name,
        port=port,
    )
    console = Console(f"guest ({label})", _console_log(logs, label))
    errors = _qemu_log(logs, label)
    console.path.unlink(missing_ok=True)
    errors.write_text(shlex.join(line) + "\n")
    vm = shell.start(f"exec {shlex.join(line)}")
    watch = shell.start(
        f"cat > /dev/null; kill -KILL $(cat {shlex.quote(folder)}/pid) 2>/dev/null; "
        f"rm -rf {shlex.quote(folder)}"
    )
    follow = shell.start(f"exec tail -c +1 -F {shlex.quote(folder)}/console 2>/dev/null")
    threading.Thread(target=_follow, args=(follow, console.path), daemon=True).start()
    qmp: _Qmp | None = None

    def alive() -> None:
        if vm.ended:
            if shell.watch is not None:
                shell.watch()  # it may have ended because its host did
            said = proc_tail(errors)
            raise MeasurementError(f"{console.name}: QEMU ended by itself", detail=said)
        said = errors.read_text(errors="replace")
        if "\nKVM internal error" in said:
            raise GuestBroke(
                f"{console.name}: KVM gave the guest up",
                detail=said[said.index("\nKVM internal error") + 1 :][:600],
            )

    def watching() -> None:
        console.broken()
        alive()
        if shell.watch is not None:
            shell.watch()

    def login() -> Shell:
        address = Address("127.0.0.1", port, "root", parts.keys.login, parts.keys.host_public)
        try:
            there = connect(
                console.name, address, deadline_s=LOGIN_DEADLINE_S, through=shell, alive=alive
            )
        except EnvironmentBroken as error:
            # it is ours and it is up: that it does not answer is a finding, not the environment
            raise MeasurementError(error.message, detail=console.tail()) from None
        there.watch, there.console = watching, console
        return there

    try:
        with ui.step(f"booting the guest ({label})" if boots else f"starting QEMU ({label})"):
            qmp = _Qmp(vm.channel, console.name, errors)
            guest = Guest(host, name, qmp, console)
            guest._login, guest._alive = login, alive
            if boots:
                console.wait_for(UP, deadline_s=BOOT_DEADLINE_S, alive=alive)
                guest.login()
        yield guest
        guest.check()
    finally:
        if qmp is not None:
            with contextlib.suppress(MeasurementError):
                qmp.execute("quit", None, 10.0)
            qmp.close()
        end = time.monotonic() + 5
        while not vm.ended and time.monotonic() < end:
            time.sleep(0.05)
        watch.close()
        follow.close()
        vm.close()


def proc_tail(path: Path, lines: int = 10) -> str:
    """The last lines of a file."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
