# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``intel`` testbed: Bochs emulates a host with VMX and one CPU; KVM runs in it.

Bochs has neither virtio nor 9p. The host boots from a CD: isolinux loads the kernel and an
initramfs that holds the Debian image and those parts of the cache's store that a run needs. The
network is Bochs' e1000 on its own slirp, so that the host is reached over SSH like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ... import builds
from ...builds import Bochs, Image, Kernel, Keys
from ...core import proc
from ...core.cache import Cache, remove
from ...core.errors import EnvironmentBroken
from ...core.settings import Settings
from ...sources.archive import obtain
from ..console import Console
from ..equipment import ARRANGED, INSTRUCTIONS, PCIE, ROUTES, Equipment
from ..host import Host
from .testbed import Emulator, Made, Testbed, Wanted, emulating, free_port

NAME = "intel"
HAS = frozenset({ARRANGED})
LACKS = {
    INSTRUCTIONS: "Bochs has no plugin that counts instructions beside its counters",
    PCIE: "Bochs has no PCI Express",
    ROUTES: "Bochs has no PCI Express",
}

CMDLINE = (
    "console=ttyS0,115200 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable "
    "acpiphp.disable=1 quiet loglevel=5"
)
"""acpiphp: SeaBIOS' tables describe QEMU's PCI hotplug, whose registers read as all ones here:
Linux took the network card for unplugged."""
CPU = "corei7_icelake_u"
"""It has the PMU that the project is for: version 5 with 8 + 4 counters."""
GUEST_MEMORY_MIB = 512

_LOADER = (
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
)
"""isolinux and its core module (Debian's packages isolinux and syslinux-common)."""


@dataclass(frozen=True)
class Parts:
    """What an emulated Intel host is made of.

    ``things`` are files and folders of the store that it is to see, beside the image.
    """

    emulator: Bochs
    kernel: Kernel
    initramfs: Path
    image: Image
    keys: Keys
    store: Path
    things: tuple[Path, ...] = ()
    memory_mib: int = 2048
    ips: int = 50_000_000
    """Instructions in an emulated second."""

    @property
    def equipment(self) -> Equipment:
        """What the host has."""
        return Equipment(testbed=NAME, guest_memory_mib=GUEST_MEMORY_MIB, has=HAS, lacks=LACKS)

    def look(self, host: Host) -> Equipment:
        """The same: it has no functions for guests."""
        return self.equipment

    def power_on(
        self, *, console: Path, scratch: Path, emulator_log: Path
    ) -> AbstractContextManager[Testbed]:
        """Start the emulator (``power_on``)."""
        return power_on(self, console=console, scratch=scratch, emulator_log=emulator_log)

    @property
    def shown(self) -> frozenset[Path]:
        """All that the host sees of the store."""
        return frozenset((self.image.path, *self.things))


def configuration(parts: Parts, *, console: Path, scratch: Path) -> str:
    """The emulator's configuration file."""
    options = {
        "config_interface": "textconfig",
        "display_library": "nogui",
        "romimage": f'file="{parts.emulator.bios}"',
        "vgaromimage": f'file="{parts.emulator.vga_bios}"',
        # Linux reads MSRs before it can take a fault
        "cpu": f"model={CPU}, ips={parts.ips}, ignore_bad_msrs=1, reset_on_triple_fault=0",
        "memory": f"guest={parts.memory_mib}, host={parts.memory_mib}",
        "clock": "sync=none, time0=utc",
        "com1": f'enabled=1, mode=file, dev="{console}"',
        "ata0": "enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        "ata0-master": f'type=cdrom, path="{scratch}/boot.iso", status=inserted',
        "boot": "cdrom",
        "pci": "enabled=1, chipset=i440fx, slot1=e1000",
        "e1000": f'enabled=1, mac=52:54:00:12:34:56, ethmod=slirp, script="{scratch}/slirp.conf"',
        "log": "-",
        "info": "action=ignore",
        "error": "action=ignore",
        "panic": "action=fatal",
    }
    return "".join(f"{name}: {value}\n" for name, value in options.items())


def network(port: int) -> str:
    """The configuration of Bochs' slirp; ``port`` of the loopback leads to the host's sshd."""
    return f"# slirp config\nnet = 10.0.2.0\nhostfwd = tcp:127.0.0.1:{port}-:22\n"


ISOLINUX_CFG = """\
DEFAULT linux
LABEL linux
LINUX /linux
INITRD /initramfs,/store
APPEND {cmdline}
"""


def _pack_store(parts: Parts, scratch: Path) -> Path:
    """The part of the initramfs with files of the store, as guest-images/initramfs/init wants it.

    They lie below /store as they lie in the store; the link /store/root leads to the image.
    """
    top = scratch / "top"
    place = top / "store"
    for thing in sorted(parts.shown):
        target = place / thing.relative_to(parts.store)
        target.parent.mkdir(parents=True, exist_ok=True)
        # hard links: scratch is on the store's file system
        proc.run(["cp", "-al", thing, target], deadline_s=60)
    (place / "root").symlink_to(parts.image.path.relative_to(parts.store))
    names = "\n".join(str(path.relative_to(top)) for path in [place, *sorted(place.rglob("*"))])
    packed = scratch / "store"
    cpio = f"cpio --quiet -o -H newc -R 0:0 -F '{packed}'"
    proc.run(["sh", "-c", cpio], deadline_s=300, cwd=top, input_text=names)
    remove(top)
    return packed


def make_cd(parts: Parts, scratch: Path) -> None:
    """The CD that the host boots from: ``scratch``/boot.iso."""
    if missing := [path for path in _LOADER if not path.is_file()]:
        raise EnvironmentBroken(
            f"there is no {missing[0]}", hint="apt-get install isolinux syslinux-common"
        )
    config = scratch / "isolinux.cfg"
    config.write_text(ISOLINUX_CFG.format(cmdline=CMDLINE))
    packed = _pack_store(parts, scratch)
    binary, core = (scratch / path.name for path in _LOADER)
    for path in _LOADER:
        # xorriso writes the boot information table into it
        shutil.copy(path, scratch / path.name)
    proc.run(
        [
            *("xorriso", "-as", "mkisofs", "-quiet", "-o", scratch / "boot.iso"),
            *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
            *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-graft-points"),
            f"/isolinux/isolinux.bin={binary}",
            f"/isolinux/ldlinux.c32={core}",
            f"/isolinux/isolinux.cfg={config}",
            f"/linux={parts.kernel.image}",
            f"/initramfs={parts.initramfs}",
            f"/store={packed}",
        ],
        deadline_s=600,
        hint="apt-get install xorriso",
    )
    packed.unlink()


@contextmanager
def power_on(
    parts: Parts, *, console: Path, scratch: Path, emulator_log: Path
) -> Iterator[Testbed]:
    """Start the emulator; it is killed when the context ends or the harness dies."""
    scratch.mkdir(parents=True, exist_ok=True)
    make_cd(parts, scratch)
    console.unlink(missing_ok=True)
    port = free_port()
    (scratch / "slirp.conf").write_text(network(port))
    settings = configuration(parts, console=console, scratch=scratch)
    (scratch / "bochsrc").write_text(settings)
    with emulator_log.open("a") as log:
        log.write(settings)
    line = [str(parts.emulator.program), "-q", "-f", str(scratch / "bochsrc")]
    with emulating(line, scratch=scratch, emulator_log=emulator_log) as process:
        yield Testbed(parts, process, Console("host", console), port, shown=parts.shown)


def _build(settings: Settings, cache: Cache, patches: Sequence[Path]) -> Made:
    source = obtain(settings, cache, "bochs")
    return Made(builds.bochs(settings, cache, source, patches=patches), source)


def _machine(wanted: Wanted) -> Parts:
    assert isinstance(wanted.made.build, Bochs)
    return Parts(
        wanted.made.build,
        wanted.kernel,
        wanted.initramfs,
        wanted.image,
        wanted.keys,
        wanted.store,
        wanted.things,
    )


EMULATOR = Emulator(NAME, "testbed-bochs", HAS, LACKS, _build, _machine)
