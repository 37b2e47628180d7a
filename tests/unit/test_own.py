# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels and QEMU of the user's: make is incremental, nothing is copied, what is missing is named.

The trees are toys whose Makefile and configure take the words that Linux' and QEMU's take.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nearmetal import builds
from nearmetal.builds import BuildFailed, Image, Kernel, Qemu, emulators, own
from nearmetal.cli.main import main
from nearmetal.core.cache import Cache
from nearmetal.core.errors import UsageError
from nearmetal.core.settings import Settings
from nearmetal.machines import lab
from nearmetal.machines.emulators.testbed import Emulator, Made
from nearmetal.patches.variants import Config

REPO = Path(__file__).resolve().parents[2]
BASE = (REPO / "guest-images/kernel/base.config").read_text()
CONFIG = "".join(line for line in BASE.splitlines(True) if not line.endswith("=n\n"))
"""A .config that has all of it."""
LINUX = """
O ?= .
DROPPED ?= none
allnoconfig:
	mkdir -p $(O)
	grep -v -e '$(DROPPED)' -e '=n$$' $(KCONFIG_ALLCONFIG) > $(O)/.config
	echo configured >> $(O)/calls
bzImage: $(O)/arch/x86/boot/bzImage
$(O)/arch/x86/boot/bzImage: kernel.c
	mkdir -p $(@D) $(O)/include/config
	grep -v '^#error' kernel.c > $@
	! grep '^#error' kernel.c || { echo "kernel.c:1: error: no" >&2; exit 1; }
	echo 7.3.9$(EXTRA) > $(O)/include/config/kernel.release
	echo built >> $(O)/calls
modules:
	touch $(O)/modules.order
modules_install:
	d=$(INSTALL_MOD_PATH)/lib/modules/7.3.9; mkdir -p $$d/kernel && \\
	cp $(O)/arch/x86/boot/bzImage $$d/kernel/kvm.ko && touch $$d/modules.dep && \\
	ln -s $(CURDIR) $$d/build
"""
QEMU_CONFIGURE_TOY = """#!/bin/sh
echo configured >> calls
src=$(dirname $0)
mkdir -p pc-bios/optionrom
printf 'rule cc\\n command = cp $in $out && echo built >> calls\\n' > build.ninja
echo "build qemu-system-x86_64: cc $src/program" >> build.ninja
printf 'all:\\n\\ttouch kvmvapic.bin linuxboot_dma.bin multiboot_dma.bin\\n' > pc-bios/optionrom/Makefile
"""  # noqa: E501


@pytest.fixture
def conf(tmp_path: Path) -> Settings:
    return Settings(REPO, tmp_path / "cache", tmp_path / "results")


@pytest.fixture
def cache(conf: Settings) -> Cache:
    return Cache(conf.cache_dir).open()


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    tree = tmp_path / "mine"
    tree.mkdir()
    (tree / "Kconfig").touch()
    (tree / "kernel.c").write_text("one\n")
    (tree / "Makefile").write_text(LINUX)
    return tree


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image with libc alone."""
    (tmp_path / "root/lib").mkdir(parents=True)
    for name in ("libc.so.6", "ld-linux-x86-64.so.2"):
        (tmp_path / "root/lib" / name).touch()
    packed = tmp_path / "image.squashfs"
    subprocess.run(
        f"tar -C {tmp_path / 'root'} -c lib | tar2sqfs -q -f {packed}", shell=True, check=True
    )
    return Image(packed, "ab" * 32, False)


def calls(cache: Cache, kind: str) -> list[str]:
    (folder,) = (cache.root / "own").glob(f"{kind}-*")
    return (folder / "out" / "calls").read_text().split()


def names(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


# --- Linux -----------------------------------------------------------------------------------


def test_a_tree_is_built_incrementally_and_where_it_lies(
    conf: Settings, cache: Cache, linux: Path
) -> None:
    before = names(linux)
    first, _ = builds.kernel_of_tree(conf, cache, linux)
    again, _ = builds.kernel_of_tree(conf, cache, linux)
    assert calls(cache, "linux") == ["configured", "built"]
    assert (first.fresh, again.fresh) == (True, False)
    (linux / "kernel.c").write_text("two\n")
    os.utime(linux / "kernel.c", (2e9, 2e9))
    second, origin = builds.kernel_of_tree(conf, cache, linux)
    assert calls(cache, "linux") == ["configured", "built", "built"]
    assert (first.image.read_text(), second.image.read_text()) == ("one\n", "two\n")
    assert first.sha256 != second.sha256
    assert origin == "folder mine"
    assert names(linux) == before
    assert {one.kind for one in cache.entries()} == {"kernel"}  # no tree was copied
    modules = second.modules / "lib/modules" / second.release
    assert (modules / "kernel/kvm.ko").read_text() == "two\n"
    assert not (modules / "build").exists()


def test_a_change_of_our_configuration_configures_anew(
    conf: Settings, cache: Cache, linux: Path
) -> None:
    builds.kernel_of_tree(conf, cache, linux)
    (stamp,) = (cache.root / "own").glob("linux-*/nearmetal.stamp")
    stamp.write_text(stamp.read_text().replace("CONFIG_KVM=m", "CONFIG_KVM=y"))
    builds.kernel_of_tree(conf, cache, linux)
    assert calls(cache, "linux").count("configured") == 2


def test_build_folders_are_pruned_by_their_last_use(
    conf: Settings, cache: Cache, linux: Path
) -> None:
    where = ["--cache-dir", str(cache.root)]
    builds.kernel_of_tree(conf, cache, linux)
    (folder,) = (cache.root / "own").iterdir()
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1e9, 1e9))
    builds.kernel_of_tree(conf, cache, linux)
    main(["cache", "--prune", *where])
    assert folder.is_dir()
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1e9, 1e9))
    main(["cache", "--prune", *where])
    assert not folder.exists()


def test_a_tree_that_was_built_where_it_lies(conf: Settings, cache: Cache, linux: Path) -> None:
    (linux / ".config").touch()
    with pytest.raises(UsageError, match="was built where it lies") as caught:
        builds.kernel_of_tree(conf, cache, linux)
    assert f"--host-kernel {linux}" in str(caught.value.hint)


def test_a_folder_that_is_no_tree(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a linux tree: it has no Kconfig"):
        builds.kernel_of_tree(conf, cache, tmp_path)


def test_an_option_that_the_tree_drops_is_named_each_time(
    conf: Settings, cache: Cache, linux: Path
) -> None:
    makefile = linux / "Makefile"
    makefile.write_text(LINUX.replace("DROPPED ?= none", "DROPPED = CONFIG_SYNTH_EVENTS"))
    for _ in range(2):
        with pytest.raises(BuildFailed, match="drops CONFIG_SYNTH_EVENTS=y"):
            builds.kernel_of_tree(conf, cache, linux)
    assert "built" not in calls(cache, "linux")  # told before it is built for long


def test_the_compiler_s_error_is_told(conf: Settings, cache: Cache, linux: Path) -> None:
    (linux / "kernel.c").write_text("one\n#error\n")
    with pytest.raises(BuildFailed, match=r"the kernel in .*/mine does not build") as caught:
        builds.kernel_of_tree(conf, cache, linux)
    assert "kernel.c:1: error: no" in str(caught.value.detail)


def test_what_git_says_of_a_tree(linux: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(linux), *who, *words], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert re.fullmatch(r"tree mine [0-9a-f]{12}", own.origin(linux))
    (linux / "kernel.c").write_text("two\n")
    assert own.origin(linux).endswith("-dirty")


def built(linux: Path, config: str = CONFIG) -> Path:
    """The toy as its user builds it, in the tree."""
    line = ["make", "-s", "-C", str(linux), "bzImage", "modules"]
    subprocess.run(line, check=True)
    (linux / ".config").write_text(config)
    return linux


def test_a_build_is_taken_as_it_is(conf: Settings, cache: Cache, linux: Path) -> None:
    found, origin = builds.kernel_of_build(conf, cache, built(linux), "host")
    assert (found.release, origin) == ("7.3.9", "build mine")
    assert (found.modules / "lib/modules/7.3.9/kernel/kvm.ko").read_text() == "one\n"
    guest, _ = builds.kernel_of_build(conf, cache, linux, "guest")
    assert guest.image.read_text() == "one\n"
    assert not [*guest.modules.iterdir()]
    assert (linux / "calls").read_text().split() == ["built"]


@pytest.mark.parametrize(
    ("gone", "message", "hint"),
    [
        (".config", "it has no .config", "O= says"),
        ("arch/x86/boot/bzImage", "there is no arch/x86/boot/bzImage", "bzImage"),
        ("include/config/kernel.release", "no include/config/kernel.release", "make -C"),
        ("modules.order", "the modules were not built", "modules"),
    ],
)
def test_what_a_build_lacks_is_named(
    conf: Settings, cache: Cache, linux: Path, gone: str, message: str, hint: str
) -> None:
    (built(linux) / gone).unlink()
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        builds.kernel_of_build(conf, cache, linux, "host")
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_modules_of_another_release(conf: Settings, cache: Cache, linux: Path) -> None:
    built(linux)
    (linux / "include/config/kernel.release").write_text("7.3.8\n")
    with pytest.raises(UsageError, match=r"no modules of the release 7\.3\.8"):
        builds.kernel_of_build(conf, cache, linux, "host")


def test_missing_options_are_all_named(conf: Settings, cache: Cache, linux: Path) -> None:
    config = CONFIG.replace("CONFIG_HIST_TRIGGERS=y", "# CONFIG_HIST_TRIGGERS is not set")
    config = config.replace("CONFIG_KVM=m", "CONFIG_KVM=y").replace("CONFIG_VIRTIO_BLK=y\n", "")
    with pytest.raises(UsageError) as caught:
        builds.kernel_of_build(conf, cache, built(linux, config), "host")
    lacking = caught.value.message.partition("lacks ")[2].split(", ")
    assert lacking == ["CONFIG_VIRTIO_BLK=y", "CONFIG_KVM=m (is y)", "CONFIG_HIST_TRIGGERS=y"]
    assert "merge_config.sh" in str(caught.value.hint)


def test_a_guest_needs_no_kvm_and_a_host_may_have_vfio_as_modules() -> None:
    config = CONFIG.replace("CONFIG_VFIO_PCI=y", "CONFIG_VFIO_PCI=m")
    config = config.replace("CONFIG_KVM=m\n", "").replace("CONFIG_E1000=y\n", "")
    assert own.options(BASE, config, "guest", "amd").missing == ()
    assert own.options(BASE, config, "host", "amd").missing == ("CONFIG_KVM=m",)
    assert own.options(BASE, config, "host", "intel").missing == (
        "CONFIG_E1000=y",
        "CONFIG_KVM=m",
    )
    # a guest has no modules at all
    block = CONFIG.replace("CONFIG_VIRTIO_BLK=y", "CONFIG_VIRTIO_BLK=m")
    assert own.options(BASE, block, "guest", "amd").missing == ("CONFIG_VIRTIO_BLK=y (is m)",)


def test_preferences_are_told_and_no_error(
    conf: Settings, cache: Cache, linux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.replace("CONFIG_HZ_250=y", "CONFIG_HZ_1000=y")
    builds.kernel_of_build(conf, cache, built(linux, config), "guest")
    assert "figures may differ" in capsys.readouterr().err
    assert own.options(BASE, config, "host", "amd") == own.Options((), ("CONFIG_HZ_250=y",))
    labels = CONFIG + "CONFIG_JUMP_LABEL=y\n"
    assert own.options(BASE, labels, "host", "amd").other == ("CONFIG_JUMP_LABEL=n (is y)",)
    assert own.options(BASE, labels, "guest", "amd") == own.Options((), ())


def test_the_lists_of_options_name_what_the_fragment_has() -> None:
    ours = set(re.findall(r"^CONFIG_(\w+)=", BASE, re.M))
    assert ours >= own._PREFERENCES
    assert ours >= own._OF_BOCHS


def test_modules_that_the_host_has_no_room_for(
    conf: Settings, cache: Cache, linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "MODULES_MIB", -1)
    with pytest.raises(UsageError, match="has room for -1"):
        builds.kernel_of_build(conf, cache, built(linux), "host")


# --- QEMU ------------------------------------------------------------------------------------


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy of QEMU's tree; its program is one of this machine's that needs libc alone."""
    tree = tmp_path / "my-qemu"
    tree.mkdir()
    configure = tree / "configure"
    configure.write_text(QEMU_CONFIGURE_TOY)
    configure.chmod(0o755)
    compile_program(tree / "program", "-lm")
    monkeypatch.setattr(emulators, "SEABIOS", tree)
    for name in emulators.BIOSES:
        (tree / name).touch()
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    monkeypatch.setattr(emulators, "qemu_python", lambda cache: python)
    return tree


def compile_program(target: Path, *words: str) -> None:
    source = target.with_suffix(".c")
    source.write_text("#include <math.h>\nint main(int n, char **v) { return sin(n) > 2; }\n")
    subprocess.run(["gcc", "-fno-builtin", "-o", target, source, *words], check=True)


def test_a_tree_of_qemu_is_built_incrementally(
    conf: Settings, cache: Cache, qemu: Path, image: Image
) -> None:
    compile_program(qemu / "program", "-static", "-lm")
    first, _ = builds.qemu_of_tree(conf, cache, qemu, image)
    builds.qemu_of_tree(conf, cache, qemu, image)
    assert calls(cache, "qemu") == ["configured", "built"]
    firmware = {one.name for one in first.firmware.iterdir()}
    assert firmware == {*emulators.OPTION_ROMS, *emulators.BIOSES}
    assert {one.kind for one in cache.entries()} == {"qemu"}


def test_a_library_that_the_image_lacks_is_named(
    cache: Cache, qemu: Path, image: Image, tmp_path: Path
) -> None:
    out = tmp_path / "build"
    (out / "pc-bios/optionrom").mkdir(parents=True)
    with pytest.raises(UsageError, match="there is no qemu-system-x86_64"):
        builds.qemu_of_build(cache, out, image)
    compile_program(out / "qemu-system-x86_64", "-lm")
    with pytest.raises(UsageError, match=r"lacks kvmvapic\.bin, linuxboot_dma\.bin"):
        builds.qemu_of_build(cache, out, image)
    for name in emulators.OPTION_ROMS:
        (out / "pc-bios" / name).touch()
    with pytest.raises(UsageError, match=r"linked against libm\.so\.6, which") as caught:
        builds.qemu_of_build(cache, out, image)
    assert "--without-default-features" in str(caught.value.hint)
    compile_program(out / "qemu-system-x86_64", "-static", "-lm")
    found, origin = builds.qemu_of_build(cache, out, image)
    assert (found.version, origin) == ("build build", "build build")


# --- what a run makes of them ----------------------------------------------------------------


def test_the_lab_takes_them_in_place_of_ours(
    conf: Settings, cache: Cache, linux: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In every variant; QEMU is still ours here, and the emulator is of our QEMU in any case."""
    import dataclasses

    seen: list[Settings] = []

    def emulator(settings: Settings, cache: Cache, patches: Any) -> Made:
        seen.append(settings)
        return Made(Qemu(tmp_path, tmp_path, "11.1", "ef" * 32, False), source)

    def no_kernel(*_: Any, **__: Any) -> Kernel:
        raise AssertionError("a kernel of ours is built")

    ours = Qemu(tmp_path, tmp_path, "11.1", "cd" * 32, False)
    source: Any = "qemu 11.1"
    monkeypatch.setattr(builds, "image", lambda *_: Image(tmp_path, "ab" * 32, False))
    monkeypatch.setattr(builds, "kernel", no_kernel)
    monkeypatch.setattr(builds, "qemu", lambda *_, **__: ours)
    monkeypatch.setattr(lab, "obtain", lambda *_: source)
    kind = Emulator("amd", "testbed-qemu", frozenset(), {}, emulator, lambda _: None)  # type: ignore
    monkeypatch.setattr(lab, "EMULATORS", {"amd": kind})
    mine = dataclasses.replace(conf, linux_tree=linux, qemu_tree=tmp_path / "file")
    off = Config("off", linux_patches=(tmp_path / "x.patch",))
    made = lab.Lab.build(mine, cache, [Config("vanilla"), off])
    assert made.host_kernel(off).image.read_text() == "one\n"
    assert made.host_kernel(off) == made.guest_kernel(Config("vanilla"))
    assert made.qemu(off) == ours
    assert seen[0].qemu_tree is None
    sources = {(one.role, one.variant): one.source for one in made.records}
    assert sources["host-kernel", "off"] == sources["guest-kernel", "vanilla"] == "folder mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--host-kernel", "/no/such"], "--host-kernel /no/such: there is nothing there"),
        (["run", "--linux-tree", "/", "--host-kernel", "/"], "mutually exclusive"),
        (["boot", "--qemu-tree", "/", "--qemu-build", "/"], "mutually exclusive"),
        (["run", "--host", "gpu1", "--host-kernel", "/"], "a server runs its own kernel"),
        (["doctor", "--host-kernel", "/"], "unrecognized arguments"),
    ],
)
def test_wrong_use(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
