# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds: kernels, QEMU, the Debian image, the first file system; each keyed by what went in.

Nothing here knows of machines or measurements. Patched variants come from the same
functions with the patches' files in the ingredients.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core import proc
from ..core.cache import Cache, Stored, sha256_file, sha256_tree
from ..core.errors import EnvironmentBroken
from ..core.kconfig import lost_options
from ..core.settings import Settings
from ..patches.series import series_options
from ..sources import debian
from ..sources.archive import Source

_BUILD_DEADLINE_S = 2 * 3600.0

QEMU_CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-slirp",
    "--enable-virtfs",
    "--enable-attr",
    "--enable-plugins",
    "--disable-fdt",
    "--enable-trace-backends=log",
    "--disable-install-blobs",
    "--disable-docs",
    "--disable-werror",
    "--prefix=/usr",
)
"""One configuration for the emulator and for the host's QEMU: unpatched they are one build."""

QEMU_PYTHON = ("meson>=1.5,<2", "ninja", "pycotap>=1.1", "setuptools")


BOCHS_CONFIGURE = (
    "--enable-x86-64",
    "--enable-cpu-level=6",
    "--enable-vmx=2",
    "--enable-svm",
    "--enable-avx",
    "--enable-evex",
    "--enable-amx",
    "--enable-cet",
    "--enable-uintr",
    "--enable-protection-keys",
    "--enable-perfmon",
    "--enable-memtype",
    "--enable-monitor-mwait",
    "--enable-configurable-msrs",
    "--enable-all-optimizations",
    "--enable-pci",
    "--enable-e1000",
    "--disable-docbook",
    "--with-nogui",
)
"""Intel's CPUs as Linux wants them, PCI, a network card; one CPU, no window."""


class BuildFailed(EnvironmentBroken):
    """A tree does not build; the detail is the compiler's own error."""


@dataclass(frozen=True)
class Kernel:
    """A built kernel: the image, and its modules as a tree below ``modules``/lib/modules.

    ``sha256`` is over both.
    """

    image: Path
    modules: Path
    release: str
    sha256: str
    fresh: bool


@dataclass(frozen=True)
class Qemu:
    """A built QEMU: the program and the folder of its firmware (for ``-L``)."""

    program: Path
    firmware: Path
    version: str
    sha256: str
    fresh: bool


@dataclass(frozen=True)
class Bochs:
    """A built Bochs: the program, and the BIOS and VGA BIOS that come with its source."""

    program: Path
    bios: Path
    vga_bios: Path
    version: str
    sha256: str
    fresh: bool


@dataclass(frozen=True)
class Image:
    """The Debian root file system (squashfs), the same for host and guest."""

    path: Path
    sha256: str
    fresh: bool


_ERROR = re.compile(
    r"error:|ERROR|undefined reference"
    # what a shell, make or an interpreter says of a program that is not installed
    r"|: not found$|command not found|Command not found|No such file or directory"
)
_TOOL_FAILED = re.compile(r"\*\*\* |FAILED:|Error \d")


def first_errors(log: str, most: int = 12) -> str:
    """The lines of a build's log that say what is wrong: errors first, else the end.

    make and ninja only say that something failed; where nothing else in the log is known
    to be an error, the lines before them are shown, where the tool said why.
    """
    lines = log.splitlines()
    failed = [index for index, line in enumerate(lines) if _TOOL_FAILED.search(line)]
    causes = [index for index, line in enumerate(lines) if _ERROR.search(line)]
    if not failed and not causes:
        return proc.tail(log, most)
    if not causes:
        causes = list(range(max(0, failed[0] - 3), failed[0]))
    shown = sorted({*causes[: most - 1], *failed[:1]}) if failed else causes[:most]
    return "\n".join(lines[index] for index in shown)


def ccache(cache: Cache, work: Path) -> dict[str, str]:
    """ccache for a build below ``work``: paths relative to it, so that variants share hits."""
    return {
        "CCACHE_DIR": str(cache.root / "ccache"),
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_DEPEND": "1",
        "CCACHE_COMPILERCHECK": "content",
        "CCACHE_MAXSIZE": "5G",
    }


def _compiler() -> str:
    return proc.run(["gcc", "-dumpfullversion"], deadline_s=30).stdout.strip()


def _apply(patches: Sequence[Path], tree: Path) -> None:
    for patch in patches:
        proc.run(
            ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "-d", tree, "-i", patch],
            deadline_s=120,
            hint=f"{patch.name} does not apply; see 'nearmetal validate'",
        )


def kernel(
    settings: Settings,
    cache: Cache,
    source: Source,
    *,
    patches: Sequence[Path] = (),
    fragments: Sequence[Path] | None = None,
) -> Kernel:
    """Build a kernel: allnoconfig with the fragments laid over it.

    Options that a series adds are in a fragment beside its patches (series.SERIES_OPTIONS).

    Raises BuildFailed with the compiler's error, or with the options that the
    configuration dropped silently (a dependency that is missing).
    """
    if fragments is None:
        fragments = [settings.repo / "guest-images" / "kernel" / "base.config"]
    wanted = "".join(path.read_text() for path in (*fragments, *series_options(patches)))

    def build(work: Path) -> dict[str, Any]:
        src, out = work / "src", work / "out"
        proc.run(["cp", "-al", source.folder, src], deadline_s=1200)
        _apply(patches, src)
        out.mkdir()
        (work / "fragment").write_text(wanted)
        env = {
            **ccache(cache, work),
            "KCONFIG_ALLCONFIG": str(work / "fragment"),
            "KBUILD_BUILD_USER": "nearmetal",
            "KBUILD_BUILD_HOST": "nearmetal",
            "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
            "KBUILD_BUILD_VERSION": "1",
        }
        make = ["make", "-s", "-C", str(src), f"O={out}", "CC=ccache gcc", "HOSTCC=ccache gcc"]
        log = cache.root / "tmp" / f"{work.name}.log"
        try:
            proc.run([*make, "allnoconfig"], deadline_s=600, env=env, log=log, tree=True)
            lost = lost_options(wanted, (out / ".config").read_text())
            if lost:
                raise BuildFailed(
                    f"the kernel configuration drops {', '.join(lost)}",
                    hint="a dependency is missing in guest-images/kernel; see the Kconfig",
                )
            jobs = f"-j{settings.jobs}"
            proc.run(
                [*make, jobs, "bzImage", "modules"],
                deadline_s=_BUILD_DEADLINE_S,
                env=env,
                log=log,
                tree=True,
            )
            proc.run(
                [*make, "modules_install", f"INSTALL_MOD_PATH={work / 'modules'}"],
                deadline_s=600,
                env=env,
                log=log,
                tree=True,
            )
        except proc.CommandFailed as error:
            raise BuildFailed(
                f"Linux {source.version} does not build: {error.message}",
                detail=first_errors(error.output),
                hint=f"the whole log is {log}",
            ) from None
        release = (out / "include" / "config" / "kernel.release").read_text().strip()
        shutil.copy(out / "arch" / "x86" / "boot" / "bzImage", work / "bzImage")
        shutil.copy(out / ".config", work / "config")
        for link in (work / "modules" / "lib" / "modules" / release).glob("*"):
            if link.is_symlink():
                link.unlink()
        shutil.rmtree(src)
        shutil.rmtree(out)
        log.unlink()
        return {"release": release, "sha256": sha256_file(work / "bzImage")}

    ingredients = {
        "source": source.ingredients(),
        "patches": [sha256_file(path) for path in patches],
        "fragment": wanted,
        "compiler": _compiler(),
        "recipe": 1,
    }
    label = f"building Linux {source.version}" + (
        f" with {len(patches)} patches" if patches else ""
    )
    done = cache.make("kernel", ingredients, build, what=label)
    modules = done.path / "modules"
    # KVM is a module: a patch in it leaves the image as it was, to the byte
    both = {"image": done.meta["sha256"], "modules": sha256_tree(modules)}
    digest = hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()
    return Kernel(done.path / "bzImage", modules, done.meta["release"], digest, done.fresh)


OVMF_CODE, OVMF_VARIABLES = "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"
_OVMF = Path("/usr/share/OVMF")


def ovmf(cache: Cache) -> Path:
    """The folder of UEFI firmware for guests, in the cache's store, where an emulated host sees it.

    Raises EnvironmentBroken without Debian's package ovmf.
    """
    names = (OVMF_CODE, OVMF_VARIABLES)
    if not all((_OVMF / name).exists() for name in names):
        raise EnvironmentBroken(
            "there is no UEFI firmware for guests", hint="as root: apt-get install ovmf"
        )

    def build(work: Path) -> None:
        for name in names:
            shutil.copy(_OVMF / name, work / name)

    ingredients = {name: sha256_file(_OVMF / name) for name in names}
    return cache.make("ovmf", ingredients, build, what="copying UEFI firmware").path


def kvm_selftests(
    settings: Settings,
    cache: Cache,
    source: Source,
    programs: Sequence[str],
    *,
    patches: Sequence[Path] = (),
) -> Path:
    """The folder of KVM's selftests (tools/testing/selftests/kvm) of a tree, linked statically.

    ``programs`` are names as in its Makefile, such as ``x86/userspace_io_test``; they lie in
    the folder by their last part. Raises BuildFailed.
    """
    return _selftests(settings, cache, source, "kvm", programs, patches)


def vfio_selftests(
    settings: Settings,
    cache: Cache,
    source: Source,
    programs: Sequence[str],
    *,
    patches: Sequence[Path] = (),
) -> Path:
    """The same of VFIO's selftests (tools/testing/selftests/vfio)."""
    return _selftests(settings, cache, source, "vfio", programs, patches)


def iommufd_selftests(
    settings: Settings,
    cache: Cache,
    source: Source,
    programs: Sequence[str],
    *,
    patches: Sequence[Path] = (),
) -> Path:
    """The same of iommufd's selftests (tools/testing/selftests/iommu)."""
    return _selftests(settings, cache, source, "iommu", programs, patches)


def _selftests(
    settings: Settings,
    cache: Cache,
    source: Source,
    part: str,
    programs: Sequence[str],
    patches: Sequence[Path],
) -> Path:
    def build(work: Path) -> None:
        src, out = work / "src", work / "out"
        proc.run(["cp", "-al", source.folder, src], deadline_s=1200)
        _apply(patches, src)
        out.mkdir()
        env = ccache(cache, work)
        log = cache.root / "tmp" / f"{work.name}.log"
        headers: list[str | Path] = [
            "make",
            "-s",
            "-C",
            src,
            "headers_install",
            f"INSTALL_HDR_PATH={work / 'usr'}",
        ]
        tests: list[str | Path] = [
            *("make", "-s", f"-j{settings.jobs}", "-C", src / "tools/testing/selftests" / part),
            *("CC=ccache gcc", "LDFLAGS=-static -pthread", f"OUTPUT={out}"),
            f"KHDR_INCLUDES=-isystem {work / 'usr' / 'include'}",
            *(str(out / program) for program in programs),
        ]
        try:
            for words in (headers, tests):
                proc.run(words, deadline_s=1800, env=env, log=log, tree=True)
        except proc.CommandFailed as error:
            raise BuildFailed(
                f"the {part.upper()} selftests of Linux {source.version} do not build:"
                f" {error.message}",
                detail=first_errors(error.output),
                hint=f"the whole log is {log}",
            ) from None
        for program in programs:
            shutil.copy(out / program, work / Path(program).name)
        for folder in (src, out, work / "usr"):
            shutil.rmtree(folder)
        log.unlink()

    ingredients = {
        "source": source.ingredients(),
        "patches": [sha256_file(path) for path in patches],
        "programs": list(programs),
        "compiler": _compiler(),
        "recipe": 1,
    }
    # what there was before there were others is found again by its old key
    if part != "kvm":
        ingredients["part"] = part
    what = f"building {part.upper()}'s selftests"
    return cache.make("selftests", ingredients, build, what=what).path


def qemu_python(cache: Cache) -> Path:
    """The Python environment that QEMU's build takes meson, ninja and pycotap from."""
    import sys

    def build(work: Path) -> None:
        # a virtual environment cannot be moved: it is made where it will lie
        final = cache.root / "venv" / "qemu-build"
        if final.exists():
            shutil.rmtree(final)
        proc.run([sys.executable, "-m", "venv", final], deadline_s=300)
        proc.run(
            [final / "bin" / "python", "-m", "pip", "install", "-qq", *QEMU_PYTHON],
            deadline_s=900,
            hint="check the network, then run again",
        )

    ingredients = {"packages": QEMU_PYTHON, "python": platform.python_version()}
    final = cache.root / "venv" / "qemu-build" / "bin" / "python"
    done = cache.make("buildenv", ingredients, build, what="installing QEMU's build tools")
    if not final.exists():
        shutil.rmtree(done.path)
        cache.make("buildenv", ingredients, build, what="installing QEMU's build tools")
    return final


def qemu(settings: Settings, cache: Cache, source: Source, *, patches: Sequence[Path] = ()) -> Qemu:
    """Build QEMU's x86_64 system emulator, KVM and TCG. Raises BuildFailed."""

    def build(work: Path) -> dict[str, Any]:
        src, out = work / "src", work / "out"
        proc.run(["cp", "-al", source.folder, src], deadline_s=1200)
        _apply(patches, src)
        out.mkdir()
        python = qemu_python(cache)
        env = {**ccache(cache, work), "PATH": f"{python.parent}:{os.environ['PATH']}"}
        log = cache.root / "tmp" / f"{work.name}.log"
        try:
            proc.run(
                [src / "configure", f"--python={python}", "--cc=ccache gcc", *QEMU_CONFIGURE],
                deadline_s=900,
                cwd=out,
                env=env,
                log=log,
                tree=True,
            )
            proc.run(
                ["ninja", f"-j{settings.jobs}", "qemu-system-x86_64"],
                deadline_s=_BUILD_DEADLINE_S,
                cwd=out,
                env=env,
                log=log,
                tree=True,
            )
            proc.run(
                ["make", "-s", "-C", "pc-bios/optionrom", "all"],
                deadline_s=300,
                cwd=out,
                env=env,
                log=log,
            )
        except proc.CommandFailed as error:
            raise BuildFailed(
                f"QEMU {source.version} does not build: {error.message}",
                detail=first_errors(error.output),
                hint=f"the whole log is {log}",
            ) from None
        shutil.copy(out / "qemu-system-x86_64", work / "qemu-system-x86_64")
        proc.run(["strip", "--strip-debug", work / "qemu-system-x86_64"], deadline_s=60)
        firmware = work / "firmware"
        firmware.mkdir()
        for name in ("kvmvapic.bin", "linuxboot_dma.bin", "multiboot_dma.bin"):
            shutil.copy(out / "pc-bios" / "optionrom" / name, firmware / name)
        for name in ("bios-256k.bin", "bios.bin"):
            shutil.copy(Path("/usr/share/seabios") / name, firmware / name)
        shutil.rmtree(src)
        shutil.rmtree(out)
        log.unlink()
        return {"sha256": sha256_file(work / "qemu-system-x86_64")}

    ingredients = {
        "source": source.ingredients(),
        "patches": [sha256_file(path) for path in patches],
        "configure": QEMU_CONFIGURE,
        "compiler": _compiler(),
        "seabios": sha256_file(Path("/usr/share/seabios/bios-256k.bin")),
        "recipe": 1,
    }
    label = f"building QEMU {source.version}" + (f" with {len(patches)} patches" if patches else "")
    done = cache.make("qemu", ingredients, build, what=label)
    return Qemu(
        done.path / "qemu-system-x86_64",
        done.path / "firmware",
        source.version,
        done.meta["sha256"],
        done.fresh,
    )


def bochs(
    settings: Settings, cache: Cache, source: Source, *, patches: Sequence[Path] = ()
) -> Bochs:
    """Build Bochs, the emulator of the ``intel`` testbed. Raises BuildFailed."""

    def build(work: Path) -> dict[str, Any]:
        src, out = work / "src", work / "out"
        proc.run(["cp", "-al", source.folder, src], deadline_s=1200)
        _apply(patches, src)
        out.mkdir()
        env = {**ccache(cache, work), "CC": "ccache gcc", "CXX": "ccache g++"}
        log = cache.root / "tmp" / f"{work.name}.log"
        try:
            configure: list[str | Path] = [src / "configure", *BOCHS_CONFIGURE]
            proc.run(configure, deadline_s=900, cwd=out, env=env, log=log, tree=True)
            make = ["make", f"-j{settings.jobs}", "bochs"]
            proc.run(make, deadline_s=_BUILD_DEADLINE_S, cwd=out, env=env, log=log, tree=True)
        except proc.CommandFailed as error:
            raise BuildFailed(
                f"Bochs {source.version} does not build: {error.message}",
                detail=first_errors(error.output),
                hint=f"the whole log is {log}",
            ) from None
        shutil.copy(out / "bochs", work / "bochs")
        proc.run(["strip", "--strip-debug", work / "bochs"], deadline_s=60)
        for kind, target in (("bios.bin", "bios.bin"), ("vgabios-cirrus.bin", "vgabios.bin")):
            found = sorted((src / "bios").glob(f"{kind}-*"))
            if not found:
                raise BuildFailed(
                    f"Bochs {source.version} comes without bios/{kind}-*",
                    hint="Bochs 3.0 is what is supported",
                )
            shutil.copy(found[-1], work / target)
        shutil.rmtree(src)
        shutil.rmtree(out)
        log.unlink()
        return {"sha256": sha256_file(work / "bochs")}

    ingredients = {
        "source": source.ingredients(),
        "patches": [sha256_file(path) for path in patches],
        "configure": BOCHS_CONFIGURE,
        "compiler": _compiler(),
        "recipe": 1,
    }
    label = f"building Bochs {source.version}" + (
        f" with {len(patches)} patches" if patches else ""
    )
    done = cache.make("bochs", ingredients, build, what=label)
    return Bochs(
        done.path / "bochs",
        done.path / "bios.bin",
        done.path / "vgabios.bin",
        source.version,
        done.meta["sha256"],
        done.fresh,
    )


def _compile(program: Path, target: Path, *words: str) -> None:
    """One C file of ours to a program or a library; BuildFailed with the first errors."""
    line: list[str | Path] = [
        "gcc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
        target,
        program,
        *words,
    ]
    try:
        proc.run(line, deadline_s=120)
    except proc.CommandFailed as error:
        raise BuildFailed(
            f"{program.name} does not build", detail=first_errors(error.output)
        ) from None


def _plugin_header(source: Source) -> Path:
    """The header that plugins of TCG include."""
    header = source.folder / "include" / "plugins" / "qemu-plugin.h"
    if not header.is_file():
        raise BuildFailed(f"{source} has no qemu-plugin.h", hint="QEMU 11.1.y is what is supported")
    return header


def counter(settings: Settings, cache: Cache, source: Source) -> Path:
    """The emulator's plugin that counts instructions (guest-images/emulator/nm-insns.c).

    It needs only a header of QEMU's, so that a change in it builds no emulator.
    """
    program = settings.repo / "guest-images" / "emulator" / "nm-insns.c"
    header = _plugin_header(source)
    glib = ["pkg-config", "--cflags", "--libs", "glib-2.0"]

    def build(work: Path) -> None:
        try:
            flags = proc.run(glib, deadline_s=30).stdout.split()
        except proc.CommandFailed as error:
            raise BuildFailed(
                f"{program.name} does not build: glib-2.0 is missing", detail=error.output
            ) from None
        _compile(program, work / "nm-insns.so", "-fPIC", "-shared", f"-I{header.parent}", *flags)

    ingredients = {
        "program": sha256_file(program),
        "header": sha256_file(header),
        "compiler": _compiler(),
        "recipe": 1,
    }
    what = "building the emulator's plugin"
    return cache.make("plugin", ingredients, build, what=what).path / "nm-insns.so"


def image(settings: Settings, cache: Cache) -> Image:
    """The Debian image from guest-images/debian.yaml, made by mmdebstrap.

    It runs as root, or in a user namespace where the machine allows that.
    """
    recipe_path = settings.repo / "guest-images" / "debian.yaml"
    recipe = yaml.safe_load(recipe_path.read_text())

    def build(work: Path) -> dict[str, Any]:
        archive = debian.open_archive(cache)
        tar = work / "root.tar"
        excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe["exclude"]]
        log = cache.root / "tmp" / f"{work.name}.log"
        proc.run(
            [
                "mmdebstrap",
                f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
                "--variant=essential",
                "--dpkgopt=force-unsafe-io",
                *excluded,
                f"--include={','.join(recipe['packages'])}",
                "--format=tar",
                recipe["suite"],
                tar,
                archive.sources_file,
            ],
            deadline_s=1800,
            env={"SOURCE_DATE_EPOCH": "1"},
            log=log,
            tree=True,
            hint="check the network; without root user namespaces must be allowed",
        )
        squash = work / "debian.squashfs"
        pack = 'exec tar2sqfs -c zstd -X level=3 -f -q "$1" < "$0"'
        proc.run(["sh", "-c", pack, tar, squash], deadline_s=600, log=log)
        tar.unlink()
        log.unlink()
        return {"sha256": sha256_file(squash)}

    ingredients = {"recipe": recipe, "version": 1}
    done = cache.make("image", ingredients, build, what="making the Debian image")
    return Image(done.path / "debian.squashfs", done.meta["sha256"], done.fresh)


def probes(settings: Settings, cache: Cache) -> Stored:
    """The small static programs of guest-images/probes, for host and guest."""
    folder = settings.repo / "guest-images" / "probes"

    def build(work: Path) -> None:
        for program in sorted(folder.glob("nm-*.c")):
            _compile(program, work / program.stem, "-static")

    ingredients = {"files": sha256_tree(folder), "compiler": _compiler(), "recipe": 1}
    return cache.make("probes", ingredients, build, what="building the probes")


@dataclass(frozen=True)
class Keys:
    """The SSH keys of the cache: one to log in with, one that the machines show."""

    login: Path
    host: Path

    @property
    def host_public(self) -> str:
        """The machines' public key, ``type base64``."""
        return " ".join(self.host.with_suffix(".pub").read_text().split()[:2])


def keys(cache: Cache) -> Keys:
    """The keys, made once a cache."""
    folder = cache.root / "ssh"
    with cache.lock("ssh-keys"):
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("login", "host"):
            path = folder / name
            if not path.with_suffix(".pub").is_file():
                path.unlink(missing_ok=True)
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"nearmetal {name}"]
                proc.run([*words, "-f", path], deadline_s=60)
    return Keys(folder / "login", folder / "host")


def initramfs(settings: Settings, cache: Cache, kernel_: Kernel, role: str, modules: bool) -> Path:
    """The first file system of a machine: busybox, init and the project's own files.

    ``role`` is ``host`` or ``guest`` (guest-images/overlay/<role> is laid over common).
    """
    images = settings.repo / "guest-images"
    key_pair = keys(cache)
    built = probes(settings, cache)
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    layers = [path for name in ("common", role) if (path := images / "overlay" / name).is_dir()]

    def build(work: Path) -> None:
        top = work / "top"
        for name in ("bin", "dev", "proc", "sys", "overlay/usr/bin", "overlay/root/.ssh"):
            (top / name).mkdir(parents=True)
        shutil.copy(busybox, top / "bin" / "busybox")
        shutil.copy(images / "initramfs" / "init", top / "init")
        overlay = top / "overlay"
        for layer in layers:
            shutil.copytree(layer, overlay, dirs_exist_ok=True)
        for program in sorted(built.path.glob("nm-*")):
            shutil.copy(program, overlay / "usr" / "bin" / program.name)
        (overlay / "etc" / "hostname").write_text(f"nearmetal-{role}\n")
        public = key_pair.login.with_suffix(".pub").read_text()
        (overlay / "root" / ".ssh" / "authorized_keys").write_text(public)
        (overlay / "etc" / "ssh").mkdir(parents=True, exist_ok=True)
        shutil.copy(key_pair.host, overlay / "etc" / "ssh" / "ssh_host_ed25519_key")
        if modules:
            shutil.copytree(kernel_.modules, overlay / "usr", dirs_exist_ok=True)
        names = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*")))
        cpio = f"cpio --quiet -o -H newc -R 0:0 | zstd -q -3 -o '{work}/initramfs'"
        proc.run(["sh", "-c", cpio], deadline_s=120, cwd=top, input_text=names)
        shutil.rmtree(top)

    ingredients = {
        "init": sha256_file(images / "initramfs" / "init"),
        "layers": [sha256_tree(layer) for layer in layers],
        "probes": built.key,
        "login": sha256_file(key_pair.login),
        "host": sha256_file(key_pair.host),
        "busybox": sha256_file(busybox),
        "modules": kernel_.sha256 if modules else None,
        "role": role,
        "recipe": 1,
    }
    done = cache.make("initramfs", ingredients, build, what=f"packing the {role}'s initramfs")
    return done.path / "initramfs"
