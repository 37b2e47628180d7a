# SPDX-License-Identifier: GPL-2.0-or-later
"""A host: the machine whose KVM is under test, reached over SSH, emulated or real."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..core import ui
from ..core.errors import EnvironmentBroken, MeasurementError, UsageError
from ..core.model import Provenance
from .console import find_splats
from .equipment import Equipment, GuestShape
from .shell import Address, Running, Shell, connect, digest_of

STORE_ON_TESTBED = "/srv/nearmetal"
"""Where the testbed mounts the cache's store (9p, read-only)."""


@dataclass(frozen=True)
class Facts:
    """What a host says of itself."""

    kernel: str
    cpu: str
    vendor: str
    product: str
    emulated: bool
    kvm_module: str
    memory_mib: int

    @property
    def provenance(self) -> Provenance:
        """``hardware`` only if nothing on the host says otherwise."""
        return "emulated" if self.emulated else "hardware"


_EMULATED_MAKERS = ("qemu", "bochs", "vmware", "innotek", "xen", "microsoft corporation", "kvm")


def parse_facts(text: str) -> Facts:
    """The answer to the probe of ``Host.facts``: one ``key=value`` a line."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    flags = values.get("flags", "").split()
    maker = f"{values.get('vendor', '')} {values.get('product', '')}".lower()
    emulated = "hypervisor" in flags or any(word in maker for word in _EMULATED_MAKERS)
    module = "kvm_amd" if "svm" in flags else "kvm_intel" if "vmx" in flags else ""
    return Facts(
        kernel=values.get("kernel", "?"),
        cpu=values.get("cpu", "?"),
        vendor=values.get("vendor", "?"),
        product=values.get("product", "?"),
        emulated=emulated,
        kvm_module=module,
        memory_mib=int(values.get("memory", "0") or 0) // 1024,
    )


_FACTS = r"""
echo "kernel=$(uname -r)"
echo "cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
echo "flags=$(sed -n 's/^flags[^:]*: //p' /proc/cpuinfo | head -n 1)"
echo "vendor=$(cat /sys/class/dmi/id/sys_vendor 2>/dev/null)"
echo "product=$(cat /sys/class/dmi/id/product_name 2>/dev/null)"
echo "memory=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
"""


@dataclass
class Host:
    """A host that is up. ``store`` is the cache's store where the host sees it as it is."""

    shell: Shell
    facts: Facts
    work: str
    store: Path | None = None
    shown: frozenset[Path] | None = None
    """The things of the store that the host sees, where it does not see all of them."""
    instructions: Path | None = None
    """The log of the emulator's plugin that counts instructions; None where nothing counts them."""
    equipment: Equipment = field(default_factory=Equipment)
    shape: GuestShape = field(default_factory=GuestShape)
    """What was asked for of its guests."""
    boot_retries: int = 0
    """1 if an emulated one took a second boot."""
    _kvm_parameters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    _log_seen: int = 0
    _claim: Running | None = None

    @property
    def name(self) -> str:
        """The host's name in the report."""
        return self.shell.name

    @property
    def p2p(self) -> Mapping[str, str]:
        """PCI addresses for the p2p test, ``peer`` and ``disk``."""
        return self.equipment.p2p

    @property
    def cascade(self) -> Mapping[str, str]:
        """The same for a pair whose peer is one switch deeper; empty where the host has none."""
        return self.equipment.cascade

    @property
    def functions(self) -> Mapping[str, str]:
        """PCI addresses of functions that have a driver of their own for guests, by name."""
        return self.equipment.functions

    @property
    def assigned(self) -> list[str]:
        """PCI addresses of all functions that a guest gets."""
        return self.equipment.assigned

    def can(self, capability: str) -> bool:
        """Whether it has a capability (machines.equipment)."""
        return capability in self.equipment.has

    def place(self, path: Path) -> str:
        """The file's path on the host; copied there, once, unless the host sees the store."""
        if self.store is not None and path.is_relative_to(self.store) and self._shows(path):
            return f"{STORE_ON_TESTBED}/{path.relative_to(self.store)}"
        if path.is_dir():
            folder = ""
            for part in sorted(path.iterdir()):
                folder = str(Path(self.place_as(part, f"{path.name}-{_names(path)}")).parent)
            return folder
        return self.place_as(path, digest_of(path))

    def _shows(self, path: Path) -> bool:
        return self.shown is None or not self.shown.isdisjoint((path, *path.parents))

    def place_as(self, path: Path, folder: str) -> str:
        """Copy a file into a folder of the host's work directory unless it is there whole."""
        target = f"{self.work}/store/{folder}/{path.name}"
        quoted = shlex.quote(target)
        if self.shell.run(f"test -f {quoted}", check=False).status == 0:
            return target
        size = path.stat().st_size
        with ui.step(f"copying {path.name} ({size >> 20} MiB) to {self.name}") as current:
            self.shell.run(f"mkdir -p {shlex.quote(str(Path(target).parent))}")

            def progress(done: int, total: int) -> None:
                current.status = f"({done * 100 // max(total, 1)} %)"

            self.shell.put(path, f"{target}.part", progress)
            self.shell.run(f"mv {quoted}.part {quoted}")
        return target

    def load_kvm(self, parameters: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Load KVM with module parameters; what is loaded with the same ones is left alone.

        Raises MeasurementError when KVM has not taken a parameter, as it does quietly where the
        hardware lacks what it is for.
        """
        module = self.facts.kvm_module
        if not module:
            raise EnvironmentBroken(
                f"{self.name}: the CPU supports neither SVM nor VMX",
                hint="enable virtualization in the firmware, or use the testbed",
            )
        wanted = {
            name: values for name, values in (parameters or {}).items() if name in ("kvm", module)
        }
        loaded = self.shell.run(f"test -d /sys/module/{module}", check=False).status == 0
        if loaded and wanted == self._kvm_parameters:
            return
        if loaded:
            self.shell.run(f"modprobe -r {module} kvm", deadline_s=60)
        for name in ("kvm", module):
            self.shell.run(_modprobe(name, wanted.get(name, {})), deadline_s=120)
        self._kvm_parameters = wanted
        for name, values in wanted.items():
            self._check_taken(name, values)

    def _check_taken(self, module: str, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            path = f"/sys/module/{module}/parameters/{key}"
            taken = self.shell.run(f"cat {shlex.quote(path)}", check=False).stdout.strip()
            if taken != value:
                raise MeasurementError(
                    f"{self.name}: {module} rejected {key}={value}"
                    f" (reads back {taken or 'nothing'})",
                    hint="the host's hardware or kernel does not support it",
                )

    @contextmanager
    def parameters(self, wanted: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
        """Parameters of modules other than KVM's, as long as the context lasts.

        They are set by sysfs, where the module is, loaded or built in. A module with one that can
        only be set when it is loaded is loaded anew, and is as it was at the end.
        """
        before: dict[str, str] = {}
        undo: list[str] = []
        try:
            for module, values in wanted.items():
                if module in ("kvm", "kvm_amd", "kvm_intel"):
                    continue
                there = self.shell.run(f"test -d /sys/module/{module}", check=False).status == 0
                self.shell.run(f"modprobe {shlex.quote(module)} 2>/dev/null", check=False)
                paths = {key: f"/sys/module/{module}/parameters/{key}" for key in values}
                # value and mode of each; those that are missing are told below
                looks = 'for f in "$@"; do echo "$(stat -c %a "$f") $(cat "$f")"; done 2>/dev/null'
                found = self.shell.run(f"set -- {shlex.join(paths.values())}; {looks}").stdout
                had = dict(zip(values, found.splitlines(), strict=True))
                if any(line.startswith("4") for line in had.values()):
                    old = {key: line.partition(" ")[2] for key, line in had.items()}
                    remove = f"modprobe -r {shlex.quote(module)}"
                    undo.append(f"{remove} && {_modprobe(module, old)}" if there else remove)
                    self.shell.run(f"{remove} && {_modprobe(module, values)}")
                    self._check_taken(module, values)
                    continue
                for key, value in values.items():
                    quoted = shlex.quote(paths[key])
                    done = self.shell.run(
                        f"cat {quoted} && echo {shlex.quote(value)} > {quoted}", check=False
                    )
                    if done.status:
                        raise MeasurementError(
                            f"{self.name}: the kernel has no parameter {module}.{key}",
                            hint="boot a kernel with the patches of the series",
                        )
                    before[paths[key]] = done.stdout.strip()
            yield
        finally:
            for path, value in before.items():
                with contextlib.suppress(MeasurementError):
                    self.shell.run(f"echo {shlex.quote(value)} > {shlex.quote(path)}")
            for command in undo:
                self.shell.run(command, check=False)

    def bind_vfio(self, address: str, driver: str = "vfio-pci") -> str:
        """Give a PCI function to vfio-pci, or to another driver for guests.

        Returns the driver that had it (or nothing).
        """
        device = f"/sys/bus/pci/devices/{address}"
        script = f"""
modprobe {driver} 2>/dev/null
test -d {device} || {{ echo "no function {address}" >&2; exit 1; }}
old=$(basename "$(readlink {device}/driver 2>/dev/null)" 2>/dev/null)
if [ "$old" != {driver} ]; then
  echo {driver} > {device}/driver_override
  [ -n "$old" ] && echo {address} > {device}/driver/unbind
  echo {address} > /sys/bus/pci/drivers_probe
fi
[ "$(basename "$(readlink {device}/driver)")" = {driver} ] || {{
  echo "{driver} did not take {address}; is an IOMMU on?" >&2; exit 1; }}
echo "$old"
"""
        return self.shell.run(script, deadline_s=60).stdout.strip()

    def vfio_device(self, name: str, driver: str) -> str:
        """What a function that has a driver of its own for guests is for QEMU (``functions``).

        Its PCI address; or, for a driver of the auxiliary bus, whose name is ``module.driver``,
        the path in sysfs of the function's device on that bus (``auxiliary``).
        """
        return self.auxiliary(name) if "." in driver else self.functions[name]

    def auxiliary(self, name: str) -> str:
        """The path in sysfs of a function's device on the auxiliary bus (``functions``).

        Raises MeasurementError where it has none.
        """
        address = self.functions[name]
        found = self.shell.run(
            f"for one in /sys/bus/pci/devices/{shlex.quote(address)}/*; do "
            '[ "$(readlink -f "$one/subsystem")" = /sys/bus/auxiliary ] && echo "$one"; done',
            check=False,
        ).stdout.split()
        if len(found) != 1:
            raise MeasurementError(
                f"{self.name}: {address} has no device on the auxiliary bus",
                hint="boot a kernel with the patches of the series",
            )
        return f"/sys/bus/auxiliary/devices/{found[0].rpartition('/')[2]}"

    def bind_auxiliary(self, device: str, driver: str) -> bool:
        """Give an auxiliary device to a driver, ``module.driver``; whether it did not have it."""
        script = f"""
old=$(basename "$(readlink {device}/driver 2>/dev/null)" 2>/dev/null)
modprobe {driver.partition(".")[0]} 2>/dev/null
cd /sys/bus/auxiliary/drivers/{driver} || exit 1
[ -e {device}/driver ] || echo {device.rpartition("/")[2]} > bind
[ "$(basename "$(readlink {device}/driver)")" = {driver} ] || {{
  echo "{driver} did not take {device}" >&2; exit 1; }}
echo "$old"
"""
        return self.shell.run(script, deadline_s=60).stdout.strip() != driver

    def unbind_auxiliary(self, device: str, driver: str) -> None:
        """Take an auxiliary device from its driver."""
        name = device.rpartition("/")[2]
        self.shell.run(
            f"echo {name} > /sys/bus/auxiliary/drivers/{driver}/unbind", deadline_s=60, check=False
        )

    def unbind_vfio(self, address: str) -> None:
        """Give the function back to the driver that it matches."""
        device = f"/sys/bus/pci/devices/{address}"
        self.shell.run(
            f"echo > {device}/driver_override; echo {address} > {device}/driver/unbind; "
            f"echo {address} > /sys/bus/pci/drivers_probe",
            deadline_s=60,
            check=False,
        )

    @contextmanager
    def vfio(
        self, addresses: list[str], drivers: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """The functions with vfio-pci for as long as the context lasts.

        ``drivers`` are those of further functions, by name (``vfio_device``).
        """
        wanted = dict.fromkeys(addresses, "vfio-pci")
        wanted |= {self.vfio_device(name, one): one for name, one in (drivers or {}).items()}
        with ExitStack() as undo:
            for device, driver in wanted.items():
                if "." in driver:
                    if self.bind_auxiliary(device, driver):
                        undo.callback(_or_warn, self.unbind_auxiliary, device, driver)
                elif self.bind_vfio(device, driver) != driver:
                    undo.callback(_or_warn, self.unbind_vfio, device)
            yield

    def kernel_log(self, since: int = 0) -> KernelLog:
        """The kernel's messages behind sequence number ``since``."""
        text = self.shell.run(
            "dd if=/dev/kmsg iflag=nonblock bs=8192 status=none 2>/dev/null", check=False
        ).stdout
        log = parse_kmsg(text, since)
        if since and log.lost:
            raise MeasurementError(
                f"{self.name}: {log.lost} messages of the host's kernel were lost",
                hint="boot it with a larger log_buf_len",
            )
        return log

    def check(self) -> None:
        """Raise MeasurementError if the kernel's log holds a splat that was not there before."""
        log = self.kernel_log(self._log_seen)
        self._log_seen = log.last
        splats = find_splats("\n".join(log.lines))
        if splats:
            raise MeasurementError(
                f"{self.name}: the host's kernel says: {splats[0].line}",
                detail="\n".join(splats[0].context),
            )

    def claim(self) -> None:
        """Keep other runs off the host's work directory for as long as we are connected.

        Then end what a killed run has left there: VMs that it started, by their pid files.
        Raises UsageError when somebody else is at work.
        """
        work = shlex.quote(self.work)
        self.shell.run(f"mkdir -p {work}")
        self._claim = self.shell.start(
            f"exec flock --nonblock {work}/lock sh -c 'echo claimed; exec cat > /dev/null'"
        )
        answer = b""
        self._claim.channel.settimeout(30)
        with contextlib.suppress(TimeoutError, OSError):
            answer = self._claim.channel.recv(64)
        if b"claimed" not in answer:
            raise UsageError(
                f"{self.name}: another run is in progress there",
                hint=f"wait for it; it holds {self.work}/lock",
            )
        self.shell.run(
            f"""
for folder in {work}/vm-*; do
  [ -d "$folder" ] || continue
  pid=$(cat "$folder/pid" 2>/dev/null)
  [ -n "$pid" ] && grep -qs 'guest=nearmetal-' "/proc/$pid/cmdline" && kill -KILL "$pid"
  rm -rf "$folder"
done
""",
            check=False,
        )

    def forget_log(self) -> None:
        """From now on only new messages of the kernel count."""
        self._log_seen = self.kernel_log().last


@dataclass(frozen=True)
class KernelLog:
    """Messages of a kernel: their text, the last one's sequence number, how many were lost."""

    lines: tuple[str, ...]
    last: int
    lost: int


def parse_kmsg(text: str, since: int = 0) -> KernelLog:
    """/dev/kmsg's records (Documentation/ABI/testing/dev-kmsg): ``prio,seq,us,flags;text``."""
    lines, last, first = [], since, 0
    for record in re.finditer(r"^\d+,(\d+),(\d+),[^;]*;(.*)$", text, re.M):
        sequence = int(record[1]) + 1
        first = first or sequence
        last = max(last, sequence)
        if sequence > since:
            lines.append(f"[{int(record[2]) / 1e6:12.6f}] {record[3]}")
    return KernelLog(tuple(lines), last, max(0, first - since - 1))


def count_iommu_faults(lines: Iterable[str]) -> int:
    """DMA faults in a kernel's log (drivers/iommu/intel/dmar.c, amd/iommu.c)."""
    return sum(
        1 for line in lines if ("DMAR:" in line and "[DMA " in line) or "IO_PAGE_FAULT" in line
    )


def reported_errors(lines: Iterable[str]) -> list[str]:
    """What a kernel's log says of reported PCIe errors (drivers/pci/pcie/aer.c, err.c)."""
    said = re.compile(r"AER: (?!enabled with IRQ)|PCIe Bus Error|device recovery")
    return [line for line in lines if said.search(line)]


def _or_warn(undo: Callable[..., None], *arguments: str) -> None:
    try:
        undo(*arguments)
    except MeasurementError as error:
        ui.warn(error.message)


def _modprobe(module: str, values: Mapping[str, str]) -> str:
    return shlex.join(["modprobe", module, *(f"{key}={value}" for key, value in values.items())])


def _names(folder: Path) -> str:
    import hashlib

    parts = sorted(digest_of(part) for part in folder.iterdir())
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def ask(shell: Shell) -> Facts:
    """What the host is; nothing is written there. UsageError unless we are root."""
    facts = parse_facts(shell.run(_FACTS, deadline_s=60).stdout)
    if shell.run("id -u").stdout.strip() != "0":
        raise UsageError(
            f"{shell.name}: {shell.address.user} is not root there",
            hint="KVM's tracepoints and vfio need root: give user: root in the inventory",
        )
    return facts


def reach(
    name: str,
    address: Address,
    *,
    deadline_s: float = 60.0,
    work: str | None = None,
    store: Path | None = None,
    equipment: Equipment | None = None,
) -> Host:
    """Log in to a host, ask it what it is, and claim it; ``equipment`` is known of it already."""
    shell = connect(name, address, deadline_s=deadline_s)
    facts = ask(shell)
    if work is None:
        home = shell.run("echo $HOME").stdout.strip()
        work = f"{home}/.cache/nearmetal"
    host = Host(shell, facts, work, store, equipment=equipment or Equipment())
    try:
        host.claim()
    except BaseException:
        shell.close()
        raise
    return host


def find_function(shell: Shell, vendor: int, device: int) -> str | None:
    """The address of the first PCI function with these IDs that the machine has, if any."""
    script = f"""
for d in /sys/bus/pci/devices/*; do
  read -r vendor < $d/vendor; read -r device < $d/device
  [ "$vendor $device" = "{vendor:#06x} {device:#06x}" ] && echo ${{d##*/}}
done
true
"""
    return next(iter(shell.run(script).stdout.split()), None)
