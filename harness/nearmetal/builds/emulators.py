# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU, one build for the emulated host and for guests, its plugin; and Bochs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import proc
from ..core.cache import Cache, sha256_file
from ..core.settings import Settings
from ..sources.archive import Source
from . import recipe
from .recipe import BuildFailed

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

OPTION_ROMS = ("kvmvapic.bin", "linuxboot_dma.bin", "multiboot_dma.bin")
BIOSES = ("bios-256k.bin", "bios.bin")
SEABIOS = Path("/usr/share/seabios")
"""Where Debian's package has the BIOS that QEMU's tree from Debian lacks."""

QEMU_PYTHON = ("meson>=1.5,<2", "ninja", "pycotap>=1.1", "setuptools")


@dataclass(frozen=True)
class Qemu:
    """A built QEMU: the program and the folder of its firmware (for ``-L``)."""

    program: Path
    firmware: Path
    version: str
    sha256: str
    fresh: bool


def qemu_python(cache: Cache) -> Path:
    """The Python environment that QEMU's build takes meson, ninja and pycotap from."""

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
    what = f"QEMU {source.version}"

    def build(work: Path) -> dict[str, Any]:
        with recipe.workshop(cache, work, source, patches, what=what) as shop:
            _build_qemu(settings, qemu_python(cache), shop)
            shutil.copy(shop.out / "qemu-system-x86_64", work / "qemu-system-x86_64")
            proc.run(["strip", "--strip-debug", work / "qemu-system-x86_64"], deadline_s=60)
            firmware = work / "firmware"
            firmware.mkdir()
            for name in OPTION_ROMS:
                shutil.copy(shop.out / "pc-bios" / "optionrom" / name, firmware / name)
            for name in BIOSES:
                shutil.copy(SEABIOS / name, firmware / name)
        return {"sha256": sha256_file(work / "qemu-system-x86_64")}

    ingredients = {
        "source": source.ingredients(),
        "patches": recipe.digests(patches),
        "configure": QEMU_CONFIGURE,
        "compiler": recipe.compiler(),
        "seabios": sha256_file(SEABIOS / "bios-256k.bin"),
        "recipe": 1,
    }
    done = cache.make("qemu", ingredients, build, what=recipe.label(what, patches))
    return Qemu(
        done.path / "qemu-system-x86_64",
        done.path / "firmware",
        source.version,
        done.meta["sha256"],
        done.fresh,
    )


def _build_qemu(settings: Settings, python: Path, shop: recipe.Workshop) -> None:
    configure_qemu(python, shop)
    make_qemu(settings, python, shop)


def configure_qemu(python: Path, shop: recipe.Workshop) -> None:
    """Configure QEMU as all of ours are (``QEMU_CONFIGURE``)."""
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    configure: list[str | Path] = [
        shop.src / "configure",
        f"--python={python}",
        "--cc=ccache gcc",
        *QEMU_CONFIGURE,
    ]
    shop.run(configure, deadline_s=900, cwd=shop.out, env=env)


def make_qemu(settings: Settings, python: Path, shop: recipe.Workshop) -> None:
    """Build what is not up to date of the program and its option ROMs."""
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    ninja = ["ninja", f"-j{settings.jobs}", "qemu-system-x86_64"]
    shop.run(ninja, deadline_s=recipe.BUILD_DEADLINE_S, cwd=shop.out, env=env)
    roms = ["make", "-s", "-C", "pc-bios/optionrom", "all"]
    shop.run(roms, deadline_s=300, cwd=shop.out, env=env)


def _plugin_header(source: Source) -> Path:
    """The header that plugins of TCG include."""
    header = source.folder / "include" / "plugins" / "qemu-plugin.h"
    if not header.is_file():
        raise BuildFailed(
            f"{source} has no qemu-plugin.h", hint="QEMU 11.1.y is the supported version"
        )
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
        recipe.compile_file(
            program, work / "nm-insns.so", "-fPIC", "-shared", f"-I{header.parent}", *flags
        )

    ingredients = {
        "program": sha256_file(program),
        "header": sha256_file(header),
        "compiler": recipe.compiler(),
        "recipe": 1,
    }
    what = "building the emulator's plugin"
    return cache.make("plugin", ingredients, build, what=what).path / "nm-insns.so"


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


@dataclass(frozen=True)
class Bochs:
    """A built Bochs: the program, and the BIOS and VGA BIOS that come with its source."""

    program: Path
    bios: Path
    vga_bios: Path
    version: str
    sha256: str
    fresh: bool


def bochs(
    settings: Settings, cache: Cache, source: Source, *, patches: Sequence[Path] = ()
) -> Bochs:
    """Build Bochs. Raises BuildFailed."""
    what = f"Bochs {source.version}"

    def build(work: Path) -> dict[str, Any]:
        with recipe.workshop(cache, work, source, patches, what=what) as shop:
            env = {"CC": "ccache gcc", "CXX": "ccache g++"}
            configure: list[str | Path] = [shop.src / "configure", *BOCHS_CONFIGURE]
            shop.run(configure, deadline_s=900, cwd=shop.out, env=env)
            make = ["make", f"-j{settings.jobs}", "bochs"]
            shop.run(make, deadline_s=recipe.BUILD_DEADLINE_S, cwd=shop.out, env=env)
            shutil.copy(shop.out / "bochs", work / "bochs")
            proc.run(["strip", "--strip-debug", work / "bochs"], deadline_s=60)
            for kind, target in (("bios.bin", "bios.bin"), ("vgabios-cirrus.bin", "vgabios.bin")):
                found = sorted((shop.src / "bios").glob(f"{kind}-*"))
                if not found:
                    raise BuildFailed(
                        f"Bochs {source.version} comes without bios/{kind}-*",
                        hint="Bochs 3.0 is the supported version",
                    )
                shutil.copy(found[-1], work / target)
        return {"sha256": sha256_file(work / "bochs")}

    ingredients = {
        "source": source.ingredients(),
        "patches": recipe.digests(patches),
        "configure": BOCHS_CONFIGURE,
        "compiler": recipe.compiler(),
        "recipe": 1,
    }
    done = cache.make("bochs", ingredients, build, what=recipe.label(what, patches))
    return Bochs(
        done.path / "bochs",
        done.path / "bios.bin",
        done.path / "vgabios.bin",
        source.version,
        done.meta["sha256"],
        done.fresh,
    )
