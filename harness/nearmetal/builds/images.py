# SPDX-License-Identifier: GPL-2.0-or-later
"""What machines boot with: the Debian image, probes, SSH keys, first file systems, firmware."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core import proc
from ..core.cache import Cache, Stored, sha256_file, sha256_tree
from ..core.errors import EnvironmentBroken
from ..core.settings import Settings
from ..sources import debian
from . import recipe
from .linux import Kernel


@dataclass(frozen=True)
class Image:
    """The Debian root file system (squashfs), the same for host and guest."""

    path: Path
    sha256: str
    fresh: bool


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
        words = ("--variant=essential", "--dpkgopt=force-unsafe-io", *excluded, "--format=tar")
        packages = recipe["packages"]
        archive.root(tar, recipe["suite"], packages, words=words, log=log, deadline_s=1800)
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
            recipe.compile_file(program, work / program.stem, "-static")

    ingredients = {"files": sha256_tree(folder), "compiler": recipe.compiler(), "recipe": 1}
    return cache.make("probes", ingredients, build, what="building the probes")


HOST_PUBLIC = "ssh_host_ed25519_key.pub"


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
        # in place of that of the image's own key
        shutil.copy(key_pair.host.with_suffix(".pub"), overlay / "etc" / "ssh" / HOST_PUBLIC)
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
        "recipe": 2,
    }
    done = cache.make("initramfs", ingredients, build, what=f"packing the {role}'s initramfs")
    return done.path / "initramfs"
