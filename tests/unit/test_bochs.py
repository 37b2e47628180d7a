# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated Intel host: what Bochs is told, what lies on its CD, what the host sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nearmetal.builds import Bochs, Image, Kernel, Keys
from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.machines.emulators import bochs
from nearmetal.machines.host import Facts, Host
from nearmetal.machines.shell import Shell
from nearmetal.runs import plan as plans


@pytest.fixture
def parts(tmp_path: Path) -> bochs.Parts:
    store = tmp_path / "store"
    for name in (
        "image/1/debian.squashfs",
        "qemu/2/qemu-system-x86_64",
        "qemu/2/firmware/bios.bin",
    ):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text(name)
    for name in ("bzImage", "initramfs", "bochs", "bios.bin", "vgabios.bin"):
        (store / name).write_text(name)
    emulator = Bochs(
        store / "bochs", store / "bios.bin", store / "vgabios.bin", "3.0", "0" * 64, False
    )
    kernel = Kernel(store / "bzImage", store / "modules", "7.3.4", "0" * 64, False)
    return bochs.Parts(
        emulator,
        kernel,
        store / "initramfs",
        Image(store / "image/1/debian.squashfs", "0" * 64, False),
        Keys(store / "login", store / "host"),
        store,
        (store / "qemu/2/qemu-system-x86_64", store / "qemu/2/firmware"),
    )


def test_configuration_names_what_the_host_is_made_of(parts: bochs.Parts, tmp_path: Path) -> None:
    text = bochs.configuration(parts, console=tmp_path / "console", scratch=tmp_path)
    options = dict(line.split(": ", 1) for line in text.splitlines())
    assert options["com1"] == f'enabled=1, mode=file, dev="{tmp_path}/console"'
    assert options["ata0-master"].startswith(f'type=cdrom, path="{tmp_path}/boot.iso"')
    assert options["panic"] == "action=fatal"
    assert "reset_on_triple_fault=0" in options["cpu"]


def test_only_the_loopback_leads_to_the_host() -> None:
    # Bochs refuses the file without its first line
    assert bochs.network(4711).splitlines() == [
        "# slirp config",
        "net = 10.0.2.0",
        "hostfwd = tcp:127.0.0.1:4711-:22",
    ]


def test_the_store_is_packed_as_it_lies_there(parts: bochs.Parts, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    packed = bochs._pack_store(parts, scratch)
    assert sorted(path.name for path in scratch.iterdir()) == ["store"]
    out = tmp_path / "out"
    out.mkdir()
    with packed.open("rb") as stream:
        subprocess.run(["cpio", "--quiet", "-id"], cwd=out, stdin=stream, check=True)
    for name in (
        "image/1/debian.squashfs",
        "qemu/2/qemu-system-x86_64",
        "qemu/2/firmware/bios.bin",
    ):
        assert (out / "store" / name).read_text() == name
    assert (out / "store" / "root").read_text() == "image/1/debian.squashfs"
    assert not (out / "store" / "bzImage").exists()
    assert parts.image.path.read_text() == "image/1/debian.squashfs"


def test_a_machine_without_isolinux_is_told_what_to_install(
    parts: bochs.Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bochs, "_LOADER", (tmp_path / "isolinux.bin",))
    with pytest.raises(EnvironmentBroken, match=r"no .*isolinux\.bin") as caught:
        bochs.make_cd(parts, tmp_path)
    assert caught.value.hint == "apt-get install isolinux syslinux-common"


def test_the_cd_holds_kernel_and_both_parts_of_the_initramfs(
    parts: bochs.Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = tmp_path / "isolinux.bin"
    loader.write_bytes(bytes(4096))
    monkeypatch.setattr(bochs, "_LOADER", (loader, parts.emulator.bios))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bochs.make_cd(parts, scratch)
    listing = subprocess.run(
        ["xorriso", "-indev", scratch / "boot.iso", "-find", "/", "-type", "f"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("linux", "initramfs", "store", "isolinux/isolinux.cfg"):
        assert f"'/{name}'" in listing


def test_a_host_that_sees_a_part_of_the_store_gets_the_rest(parts: bochs.Parts) -> None:
    class Told(Host):
        def place_as(self, path: Path, folder: str) -> str:
            return f"copied {path.name}"

    facts = Facts("7.3.4", "cpu", "", "", True, "kvm_intel", 2048)
    store = parts.store
    host = Told(Shell.__new__(Shell), facts, "/run/nearmetal", store, parts.shown)
    seen = "/srv/nearmetal/qemu/2/firmware/bios.bin"
    assert host.place(store / "qemu/2/firmware/bios.bin") == seen
    assert host.place(store / "initramfs") == "copied initramfs"
    host.shown = None
    assert host.place(store / "initramfs") == "/srv/nearmetal/initramfs"


EVERY = ("lspci", "vmexit", "p2p", "tools", "imc")


def test_the_intel_testbed_has_no_pci_express() -> None:
    intel, amd = plans.equipment_of("intel"), plans.equipment_of("amd")
    assert plans.resolve_tests([], intel) == ("vmexit",)
    assert plans.resolve_tests([], amd) == plans.resolve_tests([]) == EVERY
    with pytest.raises(UsageError, match="cannot run the test 'p2p': Bochs has no PCI Express"):
        plans.resolve_tests(["p2p"], intel)


def test_a_run_on_both_testbeds_has_the_tests_of_each() -> None:
    both = ("amd", "intel")
    assert plans.on_testbeds([], both) == {"amd": EVERY, "intel": ("vmexit",)}
    assert plans.on_testbeds(["vmexit", "p2p"], both) == {
        "amd": ("vmexit", "p2p"),
        "intel": ("vmexit",),
    }
    assert plans.on_testbeds(["lspci"], both) == {"amd": ("lspci",)}
    with pytest.raises(UsageError, match="no PCI Express"):
        plans.on_testbeds(["lspci"], ["intel"])
    with pytest.raises(UsageError, match="there is no test 'lspic'"):
        plans.on_testbeds(["lspic"], both)
