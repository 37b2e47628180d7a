# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``amd`` testbed: QEMU's TCG emulates a host with SVM, PCIe and an IOMMU; KVM runs in it.

The host has an x3130 switch with two NVMe functions below it: ``peer`` with a controller
memory buffer and ``disk``, the initiator. The switch routes their DMA by the PCIe rules and
counts it (testbed series pcie-acs-routing). The IOMMU is VT-d, also beside an AMD CPU: it is the
one that QEMU emulates well enough for vfio-pci. 9p shows the host the cache's store.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...builds.all import Image, Kernel, Keys, Qemu
from ...core import ui
from ...core.errors import EnvironmentBroken, MeasurementError
from ...core.proc import guarded
from ...measure import imc
from ..console import UP, Console
from ..host import Host, reach
from ..shell import Address

BOOT_DEADLINE_S = 600.0
"""A quiet machine takes 30 to 60 s; a host that dies ends the wait at once."""
PEER_SERIAL = "nmpeer"
DISK_SERIAL = "nmdisk"
CMDLINE = (
    "console=ttyS0 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check "
    "intel_iommu={iommu} iommu=nopt quiet loglevel=5"
)
MEMORY_CONTROLLERS = (
    *("-device", "icx-ubox,bus=pcie.0,addr=1e.0,multifunction=on"),
    *("-device", "icx-imc,bus=pcie.0,addr=1e.1"),
)
"""Functions of Ice Lake-SP (testbed series icx-imc); they need no CPU that has them."""
_DOWNSTREAM = "xio3130-downstream,bus=up0,acs=on"


@dataclass(frozen=True)
class Parts:
    """What an emulated host is made of."""

    emulator: Qemu
    kernel: Kernel
    initramfs: Path
    image: Image
    keys: Keys
    store: Path
    counter: Path | None = None
    """The plugin that counts instructions, or None for an emulator without."""
    cpus: int = 2
    memory_mib: int = 6144
    iommu: bool = True
    """Whether Linux turns the IOMMU on; it is there in any case."""
    ats: bool = False
    """Whether the initiator has ATS."""
    extra: tuple[str, ...] = ()
    """Further words of the emulator's command line."""

    def power_on(
        self, *, console: Path, scratch: Path, emulator_log: Path
    ) -> AbstractContextManager[Testbed]:
        """Start the emulator (``power_on``)."""
        return power_on(self, console=console, scratch=scratch, emulator_log=emulator_log)


class Machine(Protocol):
    """The parts of an emulated host of either kind, to be switched on."""

    @property
    def keys(self) -> Keys:
        """The SSH keys that it was given."""

    @property
    def store(self) -> Path:
        """The cache's store."""

    def power_on(
        self, *, console: Path, scratch: Path, emulator_log: Path
    ) -> AbstractContextManager[Testbed]:
        """Start the emulator; it is killed when the context ends or the harness dies."""


def command_line(
    parts: Parts, *, port: int, console: Path, scratch: Path, instructions: Path
) -> list[str]:
    """The emulator's command line; ``port`` on the loopback leads to the host's sshd.

    ``instructions`` is the log of the plugin that counts them.
    """
    nvme = f"{scratch}/disk.raw"
    plugin = ("-plugin", f"{parts.counter},log={instructions}") if parts.counter else ()
    return [
        str(parts.emulator.program),
        *("-L", str(parts.emulator.firmware)),
        *("-name", "nearmetal-testbed"),
        *("-machine", "q35,kernel-irqchip=split"),
        *("-accel", "tcg,thread=multi,tb-size=1024"),
        *("-cpu", "EPYC,+svm,+npt,pmu=on,perfctr-core=on,perfmon-v2=on"),
        *("-smp", str(parts.cpus), "-m", str(parts.memory_mib)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}"),
        *("-chardev", "stdio,id=qmp,signal=off", "-qmp", "chardev:qmp"),
        *("-kernel", str(parts.kernel.image), "-initrd", str(parts.initramfs)),
        *("-append", CMDLINE.format(iommu="on" if parts.iommu else "off")),
        *("-boot", "strict=on"),
        *("-device", "intel-iommu,intremap=on,device-iotlb=on,aw-bits=48"),
        *("-drive", f"file={parts.image.path},if=none,id=root,format=raw,readonly=on"),
        *("-device", "virtio-blk-pci,drive=root,serial=nmroot"),
        *("-device", "virtio-rng-pci"),
        *("-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net0,romfile="),
        *(
            "-fsdev",
            f"local,id=store,path={parts.store},security_model=none,readonly=on,multidevs=remap",
        ),
        *("-device", "virtio-9p-pci,fsdev=store,mount_tag=nmstore"),
        *("-device", "pcie-root-port,id=rp0,chassis=10,slot=10"),
        *("-device", "x3130-upstream,id=up0,bus=rp0,p2p-routing=on"),
        *("-device", f"{_DOWNSTREAM},id=dn0,port=1,chassis=11,slot=11"),
        *("-device", f"{_DOWNSTREAM},id=dn1,port=2,chassis=12,slot=12"),
        *("-device", f"nvme,serial={PEER_SERIAL},cmb_size_mb=64,bus=dn0"),
        *("-drive", f"file={nvme},if=none,id=disk,format=raw,cache=unsafe"),
        *("-device", f"nvme,serial={DISK_SERIAL},drive=disk,bus=dn1{',ats=on' * parts.ats}"),
        # too large for the space below 4 GiB: SeaBIOS then places all 64-bit BARs above, away
        # from where a guest has its own; peer-to-peer that is not translated would come out
        # right by accident otherwise, or lie in a hole of the switch's window
        *("-object", "memory-backend-ram,id=shift,size=1G,share=on"),
        *("-device", "ivshmem-plain,memdev=shift"),
        *plugin,
        *parts.extra,
    ]


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
                f"the emulated host ended by itself (status {status})", detail=self.console.tail()
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
        return "\n".join(("the emulator's monitor:", *read_autopsy(said)))

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
_AUTOPSY = ({"execute": "qmp_capabilities"}, _REGISTERS, _REGISTERS)
_AUTOPSY_PAUSE_S = 1.0


def read_autopsy(said: str) -> list[str]:
    """Of the monitor's answers, a line for each CPU and look: where it is, and whether it halts.

    ``info registers`` prints CPU#, RIP or EIP, CPL and HLT (QEMU, target/i386/cpu-dump.c).
    """
    found = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            text = answer.get("return") if isinstance(answer, dict) else None
            for part in re.split(r"(?=CPU#\d)", text if isinstance(text, str) else ""):
                words = re.findall(r"CPU#\d+|[RE]IP=\w+|(?:RFL|EFL)=\w+|CPL=\d|HLT=\d", part)
                found += [" ".join(words)] if words else []
    return found or ["it does not answer"]


def free_port() -> int:
    """A TCP port of the loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def power_on(
    parts: Parts, *, console: Path, scratch: Path, emulator_log: Path
) -> Iterator[Testbed]:
    """Start the emulator; it is killed when the context ends or the harness dies."""
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "disk.raw").open("wb") as stream:
        stream.truncate(128 << 20)
    console.unlink(missing_ok=True)
    port = free_port()
    counts = console.with_name("instructions.log")
    line = command_line(parts, port=port, console=console, scratch=scratch, instructions=counts)
    log_of_counts = counts if parts.counter else None
    with emulating(line, scratch=scratch, emulator_log=emulator_log) as process:
        yield Testbed(
            parts,
            process,
            Console("host", console),
            port,
            log_of_counts,
            monitor=emulator_log,
        )


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
        )
    except EnvironmentBroken as error:
        raise BootFailed(error.message, detail=testbed.console.tail(), hint=error.hint) from None
    host.shell.watch, host.shell.console = testbed.watch, testbed.console
    host.shell.autopsy = testbed.autopsy
    host.shown = testbed.shown
    if isinstance(testbed.parts, Parts):
        host.p2p = find_p2p(host)
        if function := imc.find(host.shell):
            host.functions = {"imc": function}
    host.instructions = testbed.instructions
    return host


class BootFailed(MeasurementError):
    """The emulated host did not come up; one more try is allowed, and reported."""


def find_p2p(host: Host) -> dict[str, str]:
    """The testbed's two NVMe functions, by serial (their numbers change from boot to boot)."""
    listing = host.shell.run(
        'for c in /sys/class/nvme/nvme*; do [ -e "$c" ] && '
        'echo "$(cat $c/serial) $(basename $(readlink -f $c/device))"; done',
        check=False,
    ).stdout
    names = {PEER_SERIAL: "peer", DISK_SERIAL: "disk"}
    found = {}
    for line in listing.splitlines():
        serial, _, address = line.strip().partition(" ")
        if serial in names:
            found[names[serial]] = address.strip()
    if len(found) != 2:
        raise MeasurementError(
            "the emulated host does not show its two NVMe functions",
            detail=listing or "no NVMe controller at all",
        )
    return found


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
