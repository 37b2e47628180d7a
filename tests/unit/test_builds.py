# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds: what is told when one fails, and options that a kernel drops silently."""

import bz2
from pathlib import Path

import pytest

from nearmetal.builds import first_errors
from nearmetal.core.cache import Cache
from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.core.kconfig import lost_options
from nearmetal.core.settings import Settings
from nearmetal.sources import archive as sources

REPO = Path(__file__).resolve().parents[2]


def test_dropped_options() -> None:
    fragment = "# why\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_D=n\nCONFIG_E=4\n"
    config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\nCONFIG_E=44\n"
    assert lost_options(fragment, config) == ["CONFIG_B=m", "CONFIG_D=n", "CONFIG_E=4"]


def test_peer_to_peer_options_stand_in_the_fragment() -> None:
    text = (REPO / "guest-images/kernel/base.config").read_text()
    for option in ("MEMORY_HOTREMOVE", "ZONE_DEVICE", "PCI_P2PDMA", "VFIO_DEVICE_CDEV", "IOMMUFD"):
        assert f"CONFIG_{option}=y\n" in text


def test_compiler_errors_come_first() -> None:
    log = (
        "  CC      arch/x86/kvm/x86.o\n" * 50
        + "arch/x86/kvm/x86.c:10:2: error: unknown type name 'foo'\n"
        + "make[4]: *** [scripts/Makefile.build:287: arch/x86/kvm/x86.o] Error 1\n"
        + "  CC      mm/slub.o\n" * 50
    )
    told = first_errors(log)
    assert told.splitlines()[0].endswith("unknown type name 'foo'")
    assert len(told.splitlines()) == 2


def test_a_missing_program_is_told() -> None:
    """The end of a build of Linux 7.3.4 without Debian's package lz4, as make -s prints it."""
    log = (
        "  CC      mm/slub.o\n" * 50
        + "/bin/sh: 1: lz4: not found\n"
        + "make[4]: *** [/src/arch/x86/boot/compressed/Makefile:145: arch/x86/boot/compressed/"
        + "vmlinux.bin.lz4] Error 127\n"
        + "make[4]: *** Deleting file 'arch/x86/boot/compressed/vmlinux.bin.lz4'\n"
        + "make[3]: *** [/src/arch/x86/boot/Makefile:96: vmlinux] Error 2\n"
        + "make[2]: *** [/src/arch/x86/Makefile:318: bzImage] Error 2\n"
    )
    told = first_errors(log).splitlines()
    assert told[0] == "/bin/sh: 1: lz4: not found"
    assert "vmlinux.bin.lz4] Error 127" in told[1]


def test_what_stands_before_a_tool_that_failed_is_told() -> None:
    log = "one\ntwo\ngenerator: cannot go on\nmake: *** [Makefile:3: all] Error 1\n"
    assert "generator: cannot go on" in first_errors(log)


def test_without_an_error_line_the_end_is_told() -> None:
    assert first_errors("one\ntwo\nthree\n", most=2) == "two\nthree"


def conf(tmp_path: Path, **more: Path) -> tuple[Settings, Cache]:
    cache = Cache(tmp_path / "cache").open()
    return Settings(REPO, cache.root, tmp_path / "results", **more), cache  # type: ignore[arg-type]


def test_user_s_folder_is_no_tree(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    settings, cache = conf(tmp_path, linux_tree=tmp_path / "tree")
    with pytest.raises(UsageError, match="is not a linux tree"):
        sources.obtain(settings, cache, "linux")


def test_user_s_folder_is_copied_and_recorded(tmp_path: Path) -> None:
    tree = tmp_path / "mine"
    tree.mkdir()
    (tree / "Kconfig").write_text("mainmenu\n")
    settings, cache = conf(tmp_path, linux_tree=tree)
    first = sources.obtain(settings, cache, "linux")
    assert (first.folder / "Kconfig").read_text() == "mainmenu\n"
    (tree / "Kconfig").write_text("changed\n")
    second = sources.obtain(settings, cache, "linux")
    assert first.sha256 != second.sha256
    assert (first.folder / "Kconfig").read_text() == "mainmenu\n"


def test_truncated_archive_of_the_user(tmp_path: Path) -> None:
    archive = tmp_path / "sources" / "qemu-11.1.9.tar.bz2"
    archive.parent.mkdir()
    archive.write_bytes(bz2.compress(b"x" * 100000)[:40])
    settings, cache = conf(tmp_path, source_dir=archive.parent)
    with pytest.raises(EnvironmentBroken, match="tar") as caught:
        sources.obtain(settings, cache, "qemu")
    assert caught.value.hint
    assert cache.entries() == []


def test_newest_archive_of_the_user_is_taken(tmp_path: Path) -> None:
    import tarfile

    folder = tmp_path / "sources"
    folder.mkdir()
    for version in ("11.1.9", "11.1.12"):
        inner = tmp_path / version / f"qemu-{version}"
        (inner / "pc-bios" / "dtb").mkdir(parents=True)
        (inner / "pc-bios" / "dtb" / "bamboo.dts").touch()
        (inner / "pc-bios" / "meson.build").write_text("fds = ['edk2-x86_64-code.fd']\n")
        with tarfile.open(folder / f"qemu-{version}.tar.xz", "w:xz") as tar:
            tar.add(inner, inner.name)
    settings, cache = conf(tmp_path, source_dir=folder)
    source = sources.obtain(settings, cache, "qemu")
    assert source.version == "11.1.12"
    placeholder = source.folder / "pc-bios" / "edk2-x86_64-code.fd.bz2"
    assert bz2.decompress(placeholder.read_bytes()) == b""
    assert (source.folder / "pc-bios" / "dtb" / "bamboo.dtb").is_file()
