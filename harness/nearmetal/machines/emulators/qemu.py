# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``amd`` testbed: QEMU's TCG emulates a host with SVM, PCIe and an IOMMU; KVM runs in it.

The host has an x3130 switch with two NVMe functions below it: ``peer`` with a controller
memory buffer and ``disk``, the initiator. Below another root port is a cascade as on DGX A100: an
initiator below one switch, and a target below a second one, which is below the first. The switches
route DMA by the PCIe rules and count it (testbed series pcie-acs-routing). Beside its CPU with SVM
it has the functions and the counters of an Ice Lake-SP socket's memory controllers (icx-imc). The
IOMMU is VT-d: it is the one that QEMU emulates well enough for vfio-pci. 9p shows the host the
cache's store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ... import builds
from ...builds import Image, Kernel, Keys, Qemu
from ...core.cache import Cache
from ...core.errors import MeasurementError
from ...core.settings import Settings
from ...sources.archive import obtain
from ..console import Console
from ..equipment import ARRANGED, INSTRUCTIONS, PCIE, ROUTES, Equipment
from ..host import Host, find_function
from .testbed import Emulator, Made, Testbed, Wanted, emulating, free_port

NAME = "amd"
HAS = frozenset({ARRANGED, INSTRUCTIONS, PCIE, ROUTES})
MEMORY_CONTROLLER = (0x8086, 0x3451)
"""Vendor and device of the function with Ice Lake-SP's memory controllers (SNR_MC_DEVICE_ID)."""
PEER_SERIAL = "nmpeer"
DISK_SERIAL = "nmdisk"
DEEP_PEER_SERIAL = "nmdeeppeer"
HIGH_DISK_SERIAL = "nmhighdisk"
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
CASCADE = (
    *("-device", "pcie-root-port,id=rpc,chassis=40,slot=40"),
    *("-device", "x3130-upstream,id=outer,bus=rpc,p2p-routing=on"),
    *("-device", "xio3130-downstream,bus=outer,acs=on,id=outer0,port=1,chassis=41,slot=41"),
    *("-device", "xio3130-downstream,bus=outer,acs=on,id=outer1,port=2,chassis=42,slot=42"),
    *("-device", "x3130-upstream,id=inner,bus=outer1,p2p-routing=on"),
    *("-device", "xio3130-downstream,bus=inner,acs=on,id=inner0,port=1,chassis=43,slot=43"),
    *("-device", f"nvme,serial={DEEP_PEER_SERIAL},cmb_size_mb=64,pcie-aer=on,bus=inner0"),
    *("-device", f"nvme,serial={HIGH_DISK_SERIAL},drive=high,pcie-aer=on,bus=outer0"),
)
"""Its functions have AER: what one of them reports is in the host's log."""


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

    @property
    def equipment(self) -> Equipment:
        """What the host has; only when it is up, where its functions are is known."""
        return Equipment(testbed=NAME, has=HAS, lacks={})

    def look(self, host: Host) -> Equipment:
        """What it has, with the addresses of its functions."""
        found = find_function(host.shell, *MEMORY_CONTROLLER)
        pairs = find_p2p(host)
        return dataclasses.replace(
            self.equipment,
            p2p=pairs["p2p"],
            cascade=pairs["cascade"],
            serials=pairs["serials"],
            functions={} if found is None else {"imc": found},
        )

    def power_on(
        self, *, console: Path, scratch: Path, emulator_log: Path
    ) -> AbstractContextManager[Testbed]:
        """Start the emulator (``power_on``)."""
        return power_on(self, console=console, scratch=scratch, emulator_log=emulator_log)


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
        *("-drive", f"file={scratch}/high.raw,if=none,id=high,format=raw,cache=unsafe"),
        *CASCADE,
        *MEMORY_CONTROLLERS,
        *plugin,
        *parts.extra,
    ]


def find_p2p(host: Host) -> dict[str, dict[str, str]]:
    """The two pairs of NVMe functions, by serial (their numbers change from boot to boot).

    The keys are those of ``Equipment``: ``p2p``, ``cascade`` and ``serials``.
    """
    listing = host.shell.run(
        'for c in /sys/class/nvme/nvme*; do [ -e "$c" ] && '
        'echo "$(cat $c/serial) $(basename $(readlink -f $c/device))"; done',
        check=False,
    ).stdout
    names = {
        PEER_SERIAL: ("p2p", "peer"),
        DISK_SERIAL: ("p2p", "disk"),
        DEEP_PEER_SERIAL: ("cascade", "peer"),
        HIGH_DISK_SERIAL: ("cascade", "disk"),
    }
    found: dict[str, dict[str, str]] = {"p2p": {}, "cascade": {}}
    serials: dict[str, str] = {}
    for line in listing.splitlines():
        serial, _, address = line.strip().partition(" ")
        if serial in names:
            pair, name = names[serial]
            found[pair][name] = address.strip()
            serials[address.strip()] = serial
    if any(len(pair) != 2 for pair in found.values()):
        raise MeasurementError(
            "the emulated host does not show its four NVMe functions",
            detail=listing or "no NVMe controller at all",
        )
    return {**found, "serials": serials}


@contextmanager
def power_on(
    parts: Parts, *, console: Path, scratch: Path, emulator_log: Path
) -> Iterator[Testbed]:
    """Start the emulator; it is killed when the context ends or the harness dies."""
    scratch.mkdir(parents=True, exist_ok=True)
    for name in ("disk.raw", "high.raw"):
        with (scratch / name).open("wb") as stream:
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


def _build(settings: Settings, cache: Cache, patches: Sequence[Path]) -> Made:
    source = obtain(settings, cache, "qemu")
    return Made(
        builds.qemu(settings, cache, source, patches=patches),
        source,
        builds.counter(settings, cache, source),
    )


def _machine(wanted: Wanted) -> Parts:
    assert isinstance(wanted.made.build, Qemu)
    return Parts(
        emulator=wanted.made.build,
        kernel=wanted.kernel,
        initramfs=wanted.initramfs,
        image=wanted.image,
        keys=wanted.keys,
        store=wanted.store,
        counter=wanted.made.counter,
        iommu=wanted.iommu,
        ats=wanted.ats,
        extra=wanted.extra,
    )


EMULATOR = Emulator(NAME, "testbed-qemu", HAS, {}, _build, _machine)
