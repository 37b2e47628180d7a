# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels and QEMU of the user's: trees, built where they lie, and builds as make left them.

A tree is built alone, without our patches, in a build folder of its own below the cache
(``own/``), which is kept: after an edit make and ninja do no more than they must. What comes out
is copied into the store, keyed by its bytes, since hosts see the store and nothing else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core import proc, ui
from ..core.cache import Cache, sha256_file, sha256_tree
from ..core.errors import UsageError
from ..core.kconfig import lost_options
from ..core.settings import Settings
from . import emulators, linux, recipe
from .emulators import Qemu
from .images import Image
from .linux import Kernel
from .recipe import BuildFailed

Role = Literal["host", "guest"]

_STAMP = "nearmetal.stamp"
"""In a kept build folder: what it was configured with. Its time is that of the last use."""
MODULES_MIB = 256
"""The host's first file system has the modules, and lies in its memory."""
IMAGE_DEADLINE_S = 120.0
_NAMED = 12


@contextmanager
def _kept(cache: Cache, tree: Path, kind: str, what: str) -> Iterator[recipe.Workshop]:
    """The build folder of a tree, kept between runs; the log of its last build lies in it."""
    name = f"{kind}-{tree.name}-{hashlib.sha256(str(tree).encode()).hexdigest()[:8]}"
    folder = cache.root / "own" / name
    with cache.lock(f"own-{name}"):
        (folder / "out").mkdir(parents=True, exist_ok=True)
        log = folder / "build.log"
        with recipe.telling(what, log):
            yield recipe.Workshop(tree, folder / "out", recipe.ccache(cache, tree), log)


def _tree(tree: Path, option: str, marker: str, name: str) -> Path:
    if not (tree / marker).is_file():
        raise UsageError(
            f"{tree} is not a {name} tree: it has no {marker}",
            hint=f"give {option} a git tree, a folder of sources or a tarball",
        )
    return tree.resolve()


def origin(tree: Path) -> str:
    """A tree of the user's in words: its commit and whether it has changes, or its folder."""
    if (tree / ".git").exists():
        git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
        done = proc.run([*git, "--exclude=*"], deadline_s=300, check=False)
        if done.status == 0:
            return f"tree {tree.name} {done.stdout.strip()}"
    return f"folder {tree.name}"


# --- Linux -----------------------------------------------------------------------------------


def kernel_of_tree(settings: Settings, cache: Cache, tree: Path) -> tuple[Kernel, str]:
    """A kernel of the user's tree as it stands, and what it was built from.

    It has the configuration of all our kernels. Raises UsageError for what is no tree, or one that
    was built where it lies; BuildFailed with the compiler's error.
    """
    tree = _tree(tree, "--linux-tree", "Kconfig", "linux")
    # what the kernel's Makefile asks before it builds elsewhere ("The source tree is not clean")
    dirty = (".config", "include/config", "arch/x86/include/generated")
    if any((tree / one).exists() for one in dirty):
        raise UsageError(
            f"{tree} was built where it lies, and then make builds it nowhere else",
            hint=f"measure that build: --host-kernel {tree} --guest-kernel {tree}; or clean the"
            f" tree: make -C {tree} mrproper",
        )
    wanted = linux.base_fragment(settings).read_text()
    what = f"building {tree}"
    with _kept(cache, tree, "linux", f"the kernel in {tree}") as shop, ui.step(what):
        out, modules = shop.out, shop.out.parent / "modules"
        make = [*linux.make_line(shop), "LOCALVERSION="]
        stamp = shop.out.parent / _STAMP
        if not (out / ".config").is_file() or _read(stamp) != wanted:
            stamp.unlink(missing_ok=True)
            fragment = shop.out.parent / "fragment"
            fragment.write_text(wanted)
            env = {"KCONFIG_ALLCONFIG": str(fragment), **linux.STAMPS}
            shop.run([*make, "allnoconfig"], deadline_s=600, env=env)
            _check_kept(out, wanted)
        words = [*make, f"-j{settings.jobs}", "bzImage", "modules"]
        shop.run(words, deadline_s=recipe.BUILD_DEADLINE_S, env=linux.STAMPS)
        # a changed Kconfig is read by this make, and not before
        _check_kept(out, wanted)
        stamp.write_text(wanted)
        release = _install(shop.run, make, out, modules)
        source = origin(tree)
        return _into_store(cache, out, modules, release, source), source


def _check_kept(out: Path, wanted: str) -> None:
    """Raise BuildFailed with the options of ours that a tree's configuration drops."""
    if lost := lost_options(wanted, (out / ".config").read_text()):
        raise BuildFailed(
            f"this tree's configuration drops {', '.join(lost)}",
            hint="the harness needs them; is the tree older than Linux 7.3?",
        )


def kernel_of_build(
    settings: Settings, cache: Cache, folder: Path, role: Role
) -> tuple[Kernel, str]:
    """The kernel that the user built in a folder, and a name for it.

    Of a guest's only the image is taken. Nothing is written to the folder but what ``make
    modules_install`` writes. Raises UsageError for what is missing, of files or of the
    configuration; all options that are missing are named.
    """
    option = f"--{role}-kernel"
    folder = folder.resolve()
    config, image = folder / ".config", folder / "arch" / "x86" / "boot" / "bzImage"
    release_file = folder / "include" / "config" / "kernel.release"
    if not config.is_file():
        raise UsageError(
            f"{option} {folder}: no kernel was built there: it has no .config",
            hint="name the folder that make wrote to: the tree, or what O= says",
        )
    for path, target in ((image, "bzImage"), (release_file, "bzImage")):
        if not path.is_file():
            raise UsageError(
                f"{option} {folder}: there is no {path.relative_to(folder)}",
                hint=f"build it: make -C {folder} {target}",
            )
    check_options(settings, config.read_text(), f"{option} {folder}", role, folder)
    source = f"build {folder.name}"
    if role == "guest":
        release = release_file.read_text().strip()
        return _into_store(cache, folder, None, release, source), source
    if not (folder / "modules.order").is_file():
        raise UsageError(
            f"{option} {folder}: the modules were not built, and KVM is one",
            hint=f"build them: make -C {folder} modules",
        )
    with (
        _kept(cache, folder, "build", f"installing the modules of {folder}") as shop,
        ui.step(f"installing the modules of {folder}"),
    ):
        modules = shop.out.parent / "modules"
        (shop.out.parent / _STAMP).touch()
        release = _install(shop.run, ["make", "-s", "-C", str(folder)], folder, modules)
        return _into_store(cache, folder, modules, release, source), source


def _install(run: Any, make: list[str], out: Path, modules: Path) -> str:
    """Install modules, stripped, into a folder that is made anew; the kernel's release."""
    shutil.rmtree(modules, ignore_errors=True)
    words = [*make, "modules_install", f"INSTALL_MOD_PATH={modules}", "INSTALL_MOD_STRIP=1"]
    run(words, deadline_s=900, env=linux.STAMPS)
    release = (out / "include" / "config" / "kernel.release").read_text().strip()
    if not (modules / "lib" / "modules" / release / "modules.dep").is_file():
        raise UsageError(
            f"modules_install made no modules of the release {release} of {out}",
            hint="build image and modules together: make bzImage modules",
        )
    linux.unlink_build_links(modules, release)
    size = sum(one.stat().st_size for one in modules.rglob("*.ko*")) >> 20
    if size > MODULES_MIB:
        raise UsageError(
            f"the modules in {out} take {size} MiB; the emulated host has room for {MODULES_MIB}",
            hint="configure fewer of them, such as by make localmodconfig",
        )
    return release


def _into_store(cache: Cache, out: Path, modules: Path | None, release: str, source: str) -> Kernel:
    image = out / "arch" / "x86" / "boot" / "bzImage"
    both = {"image": sha256_file(image), "modules": sha256_tree(modules) if modules else ""}

    def copy(work: Path) -> dict[str, Any]:
        shutil.copy(image, work / "bzImage")
        shutil.copy(out / ".config", work / "config")
        if modules is None:
            (work / "modules").mkdir()
        else:
            shutil.copytree(modules, work / "modules", symlinks=True)
        return {"release": release, "sha256": both["image"]}

    ingredients = {"own": both, "release": release}
    return linux.stored(cache.make("kernel", ingredients, copy, what=f"keeping {source}"))


_PREFERENCES = frozenset(
    re.findall(
        r"\w+",
        """
    VMAP_STACK NR_CPUS X86_X2APIC HYPERVISOR_GUEST PARAVIRT KVM_GUEST HIGH_RES_TIMERS NO_HZ_IDLE
    HZ_250 PREEMPT_LAZY HPET_TIMER MTRR X86_PAT RANDOMIZE_BASE CPU_MITIGATIONS PM NUMA ACPI_NUMA
    X86_64_ACPI_NUMA ACPI_HOTPLUG_MEMORY PRINTK_TIME BUG BUG_ON_DATA_CORRUPTION KALLSYMS
    IKCONFIG IKCONFIG_PROC COREDUMP ELF_CORE SYSVIPC FHANDLE INOTIFY_USER CGROUPS NAMESPACES
    SECCOMP SECCOMP_FILTER DEVPORT MEMBARRIER RSEQ IO_URING AIO TRANSPARENT_HUGEPAGE HUGETLBFS
    COMPACTION HW_RANDOM HW_RANDOM_VIRTIO RTC_CLASS RD_GZIP KERNEL_LZ4 MAGIC_SYSRQ
    SQUASHFS_XATTR TMPFS_XATTR VIRTIO_MENU VIRTIO_CONSOLE NET_CORE PACKET PCIEAER PCIE_DPC
    PCI_QUIRKS PCI_IOV PCI_ATS KVM_SMM KVM_HYPERV KVM_IOAPIC PERF_EVENTS_INTEL_UNCORE
    PERF_EVENTS_AMD_UNCORE ENABLE_DEFAULT_TRACERS DEBUG_KERNEL DEBUG_BUGVERBOSE PANIC_TIMEOUT
    SOFTLOCKUP_DETECTOR DETECT_HUNG_TASK UNWINDER_FRAME_POINTER SYNC_FILE VFIO_GROUP
    VFIO_CONTAINER AMD_IOMMU
        """,
    )
)
"""Options that figures or comfort depend on; a host or a guest works without them."""
_OF_HOSTS = re.compile(
    r"VIRTUALIZATION|KVM(_(INTEL|AMD))?|IOMMU\w*|IRQ_REMAP|INTEL_IOMMU|VFIO\w*|FTRACE"
    r"|HIST_TRIGGERS|SYNTH_EVENTS|NETWORK_FILESYSTEMS|NET_9P\w*|9P_FS|PERF_EVENTS|MODULE\w*"
)
"""Options that a guest need not have."""
_AS_MODULES = re.compile(r"VFIO\w*|IOMMUFD")
"""Options that may be modules on a host: the harness loads them."""
_UNWANTED = ("JUMP_LABEL",)
"""Options that ours are without: text patching races with TCG's threads, it is suspected."""
_OF_BOCHS = frozenset(("ETHERNET", "NET_VENDOR_INTEL", "E1000", "BLK_DEV_LOOP"))
"""Options that the emulated Intel host alone needs."""


@dataclass(frozen=True)
class Options:
    """How a configuration differs from ours: what is missing, and what merely differs."""

    missing: tuple[str, ...]
    other: tuple[str, ...]


def options(wanted: str, config: str, role: Role, testbed: str) -> Options:
    """Hold a .config against a fragment of ours; each as ``CONFIG_X=y (is m)``."""
    values = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", config, re.M))
    missing: list[str] = []
    other: list[str] = []
    for line in lost_options(wanted, config):
        name, _, value = line.removeprefix("CONFIG_").partition("=")
        have = values.get(name)
        text = f"{line} (is {have})" if have else line
        if role == "host" and have == "m" and value == "y" and _AS_MODULES.fullmatch(name):
            continue
        if role == "guest" and _OF_HOSTS.fullmatch(name):
            continue
        if name in _OF_BOCHS and testbed != "intel":
            continue
        (other if name in _PREFERENCES or value == "n" else missing).append(text)
    if role == "host":
        other += [f"CONFIG_{name}=n (is y)" for name in _UNWANTED if values.get(name) == "y"]
    return Options(tuple(missing), tuple(other))


def check_options(settings: Settings, config: str, named: str, role: Role, folder: Path) -> None:
    """Raise UsageError for options that a configuration lacks; tell those that differ."""
    fragment = linux.base_fragment(settings)
    found = options(fragment.read_text(), config, role, settings.testbed)
    if found.missing:
        raise UsageError(
            f"{named}: its configuration lacks {', '.join(found.missing)}",
            hint=f"in the source: scripts/kconfig/merge_config.sh -O {folder} {folder}/.config"
            f" {fragment}; then make again",
        )
    if found.other:
        more = len(found.other) - _NAMED
        text = ", ".join(found.other[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        ui.warn(f"{named}: figures may differ by its configuration, which lacks {text}")


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


# --- QEMU ------------------------------------------------------------------------------------


def qemu_of_tree(settings: Settings, cache: Cache, tree: Path, image: Image) -> tuple[Qemu, str]:
    """QEMU of the user's tree as it stands, configured as ours, and what it was built from."""
    tree = _tree(tree, "--qemu-tree", "configure", "qemu")
    with _kept(cache, tree, "qemu", f"QEMU in {tree}") as shop, ui.step(f"building {tree}"):
        python = emulators.qemu_python(cache)
        stamp = shop.out.parent / _STAMP
        wanted = "\n".join((*emulators.QEMU_CONFIGURE, str(python)))
        if not (shop.out / "build.ninja").is_file() or _read(stamp) != wanted:
            emulators.configure_qemu(python, shop)
        stamp.write_text(wanted)
        emulators.make_qemu(settings, python, shop)
        return _qemu(cache, shop.out, image, origin(tree), f"--qemu-tree {tree}"), origin(tree)


def qemu_of_build(cache: Cache, folder: Path, image: Image) -> tuple[Qemu, str]:
    """The QEMU that the user built in a folder, with its firmware. Raises UsageError."""
    folder = folder.resolve()
    if not (folder / "qemu-system-x86_64").is_file():
        raise UsageError(
            f"--qemu-build {folder}: there is no qemu-system-x86_64",
            hint="name QEMU's build folder; configure it with --target-list=x86_64-softmmu",
        )
    source = f"build {folder.name}"
    return _qemu(cache, folder, image, source, f"--qemu-build {folder}"), source


def _qemu(cache: Cache, out: Path, image: Image, source: str, named: str) -> Qemu:
    program = out / "qemu-system-x86_64"
    files = _firmware(out, named)
    if lacking := missing_libraries(program, image):
        raise UsageError(
            f"{named}: it is linked against {', '.join(lacking)}, which the host's image lacks",
            hint=f"configure it as ours: {' '.join(emulators.QEMU_CONFIGURE)}",
        )
    ingredients = {
        "own": sha256_file(program),
        "firmware": {path.name: sha256_file(path) for path in files},
    }

    def copy(work: Path) -> dict[str, Any]:
        shutil.copy(program, work / program.name)
        proc.run(["strip", "--strip-debug", work / program.name], deadline_s=120)
        (work / "firmware").mkdir()
        for path in files:
            shutil.copy(path, work / "firmware" / path.name)
        return {"sha256": sha256_file(work / program.name)}

    done = cache.make("qemu", ingredients, copy, what=f"keeping {source}")
    return Qemu(
        done.path / program.name, done.path / "firmware", source, done.meta["sha256"], done.fresh
    )


def _firmware(out: Path, named: str) -> list[Path]:
    """The firmware of a build folder: what it built, what its source has, SeaBIOS from Debian."""
    bios = out / "pc-bios"
    found, lacking = [], []
    for name in (*emulators.OPTION_ROMS, *emulators.BIOSES):
        places = [bios / "optionrom" / name, bios / name]
        if name in emulators.BIOSES:
            places.append(emulators.SEABIOS / name)
        path = next((one for one in places if one.is_file()), None)
        if path is None:
            lacking.append(name)
        else:
            found.append(path)
    if lacking:
        raise UsageError(
            f"{named}: its pc-bios lacks {', '.join(lacking)}",
            hint=f"make -C {bios / 'optionrom'} all; the BIOSes are in Debian's package seabios",
        )
    return found


def missing_libraries(program: Path, image: Image) -> list[str]:
    """The shared libraries that a program is linked against and the image lacks (DT_NEEDED)."""
    said = proc.run(["readelf", "-d", program], deadline_s=60).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    listing = proc.run(["rdsquashfs", "--describe", image.path], deadline_s=IMAGE_DEADLINE_S).stdout
    there = {Path(line.split()[1]).name for line in listing.splitlines() if len(line.split()) > 1}
    return [name for name in needed if name not in there]
