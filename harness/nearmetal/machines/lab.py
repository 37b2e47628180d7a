# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab: all builds of a plan, and the hosts and guests that are made of them.

Runs, commands and tests use it and nothing below it::

    lab = Lab.build(settings, cache, plan)
    with lab.host(config, logs) as host, lab.guest(host, config, logs) as guest: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .. import builds
from ..builds import Image, Kernel, Qemu
from ..core import proc
from ..core.cache import Cache, sha256_file
from ..core.errors import MeasurementError, UsageError
from ..core.model import Build
from ..core.settings import Settings
from ..patches import series
from ..patches.variants import Config
from ..sources.archive import Source, obtain
from .console import Console
from .emulators import EMULATORS
from .emulators.testbed import Made, Wanted, running_host
from .equipment import of_server
from .guest import Guest, GuestParts, running_guest
from .host import Host, reach
from .inventory import Server

Role = Literal["host-kernel", "guest-kernel", "host-qemu", "emulator", "image"]


@dataclass(frozen=True)
class Own:
    """What is the user's, in place of what we would build: the same in every variant."""

    host_kernel: Kernel | None = None
    guest_kernel: Kernel | None = None
    qemu: Qemu | None = None
    sources: Mapping[Role, str] = field(default_factory=dict)
    """What each was built from."""

    @classmethod
    def build(cls, settings: Settings, cache: Cache, image: Image) -> Own:
        """Build the user's trees, and take what the user built. Raises UsageError, BuildFailed."""
        sources: dict[Role, str] = {}
        kernels: dict[Role, Kernel] = {}
        roles: tuple[tuple[Role, Literal["host", "guest"], Path | None], ...] = (
            ("host-kernel", "host", settings.host_kernel),
            ("guest-kernel", "guest", settings.guest_kernel),
        )
        for role, short, folder in roles:
            if folder is not None:
                kernels[role], sources[role] = builds.kernel_of_build(
                    settings, cache, folder, short
                )
        tree = settings.linux_tree
        if tree is not None and tree.is_dir():
            kernel, origin = builds.kernel_of_tree(settings, cache, tree)
            for role, _, _ in roles:
                kernels[role], sources[role] = kernel, origin
        qemu = None
        if settings.qemu_build is not None:
            qemu, sources["host-qemu"] = builds.qemu_of_build(cache, settings.qemu_build, image)
        elif settings.qemu_tree is not None and settings.qemu_tree.is_dir():
            qemu, sources["host-qemu"] = builds.qemu_of_tree(
                settings, cache, settings.qemu_tree, image
            )
        return cls(kernels.get("host-kernel"), kernels.get("guest-kernel"), qemu, sources)


@dataclass(frozen=True)
class Lab:
    """All builds of a plan. ``emulator`` is None where the host is ``server``.

    ``kernels`` and ``qemus`` are by their patches; ``own`` goes before them (``host_kernel``,
    ``guest_kernel``, ``qemu``). ``fresh`` says whether any was built just now.
    """

    settings: Settings
    cache: Cache
    image: Image
    emulator: Made | None
    kernels: dict[tuple[Path, ...], Kernel]
    qemus: dict[tuple[Path, ...], Qemu]
    records: tuple[Build, ...]
    fresh: bool
    server: Server | None = None
    own: Own = Own()

    @classmethod
    def build(
        cls,
        settings: Settings,
        cache: Cache,
        plan: Sequence[Config],
        *,
        server: Server | None = None,
    ) -> Lab:
        """Everything that the variants need, from the cache or built now. Raises BuildFailed."""
        note = _Records(settings)
        image = builds.image(settings, cache)
        # what the user gives goes first: a mistake in it is told before anything is built for long
        own = Own.build(settings, cache, image)
        note.add("image", None, "guest-images/debian.yaml", image.sha256, fresh=image.fresh)
        emulator = None if server is not None else _emulator(settings, cache, note)
        given = {"host-kernel": own.host_kernel, "guest-kernel": own.guest_kernel}
        kernels: dict[tuple[Path, ...], Kernel] = {}
        qemus: dict[tuple[Path, ...], Qemu] = {}
        for config in plan:
            roles: list[tuple[Role, tuple[Path, ...]]] = [("guest-kernel", config.guest_patches)]
            if emulator is not None:
                roles.insert(0, ("host-kernel", config.linux_patches))
            for role, patches in roles:
                if (users := given[role]) is not None:
                    # what the user built makes no run a cold one
                    fresh = users.fresh and settings.linux_tree is not None
                    note.add(role, config, own.sources[role], users.sha256, fresh=fresh)
                    continue
                linux = obtain(settings, cache, "linux")
                kernel = builds.kernel(settings, cache, linux, patches=patches)
                fresh = kernel.fresh and patches not in kernels
                kernels[patches] = kernel
                names = config.applied if patches else ()
                note.add(role, config, linux, kernel.sha256, names, fresh=fresh)
            if own.qemu is not None:
                source = own.sources["host-qemu"]
                fresh = own.qemu.fresh and settings.qemu_tree is not None
                note.add("host-qemu", config, source, own.qemu.sha256, fresh=fresh)
                continue
            patches = config.qemu_patches
            qemu = obtain(settings, cache, "qemu")
            inner = builds.qemu(settings, cache, qemu, patches=patches)
            fresh = inner.fresh and patches not in qemus
            qemus[patches] = inner
            names = config.applied if patches else ()
            note.add("host-qemu", config, qemu, inner.sha256, names, fresh=fresh)
        return cls(
            settings,
            cache,
            image,
            emulator,
            kernels,
            qemus,
            tuple(dict.fromkeys(note.records)),
            note.fresh,
            server,
            own,
        )

    def host_kernel(self, config: Config) -> Kernel:
        """The kernel of the emulated host of a variant."""
        return self.own.host_kernel or self.kernels[config.linux_patches]

    def guest_kernel(self, config: Config) -> Kernel:
        """The kernel of a variant's guests."""
        return self.own.guest_kernel or self.kernels[config.guest_patches]

    def qemu(self, config: Config) -> Qemu:
        """The QEMU that runs a variant's guests."""
        return self.own.qemu or self.qemus[config.qemu_patches]

    @contextmanager
    def host(
        self,
        config: Config,
        logs: Path,
        *,
        iommu: bool = True,
        ats: bool = False,
        extra: tuple[str, ...] = (),
    ) -> Iterator[Host]:
        """The host that a variant runs on: the emulated one, booted now, or the server.

        ``iommu``, ``ats`` and ``extra`` are for the emulated one (emulators.testbed.Wanted).
        ``Host.boot_retries`` says whether it took a second boot.
        """
        if self.server is not None:
            with (
                self.cache.lock(f"host-{self.server.name}"),
                following(self.server.name, self.server.console, logs) as console,
            ):
                host = reach(
                    self.server.name, self.server.address, equipment=of_server(self.server)
                )

                def watch() -> None:
                    if console is not None:
                        console.broken()
                    _ = host.shell.transport  # else a guest is blamed that went with its host

                host.shell.watch, host.shell.console = watch, console
                try:
                    yield host
                finally:
                    host.shell.close()
            return
        assert self.emulator is not None
        kernel = self.host_kernel(config)
        parts = EMULATORS[self.settings.testbed].machine(
            Wanted(
                made=self.emulator,
                kernel=kernel,
                initramfs=self._initramfs(kernel, "host"),
                image=self.image,
                keys=builds.keys(self.cache),
                store=self.cache.root / "store",
                things=self._for_guests(),
                iommu=iommu,
                ats=ats,
                extra=extra,
            )
        )
        scratch = self.cache.root / "tmp" / f"testbed-{os.getpid()}"
        _sweep(scratch.parent)
        with running_host(parts, logs=logs, scratch=scratch) as (host, machine, retries):
            host.boot_retries = retries
            _check_modules(host, kernel)
            yield host
            machine.alive()
            machine.console.check()

    def guest_parts(
        self, config: Config, host: Host, assigned: Sequence[str] | None = None
    ) -> GuestParts:
        """What the guest of a variant is made of; ``assigned``: all that the host has, if None.

        Raises UsageError where the host has no function that the variant is about.
        """
        kernel = self.guest_kernel(config)
        words = list(config.qemu_args)
        for name, driver in config.functions.items():
            if name not in host.functions:
                raise UsageError(
                    f"the host {host.name} has no function '{name}' for variant {config.label}",
                    hint=f"give its address in the inventory: functions: {{{name}: ...}}",
                )
            device = host.vfio_device(name, driver)
            words = [word.replace(f"{{{name}}}", device) for word in words]
        return GuestParts(
            qemu=self.qemu(config),
            kernel=kernel,
            initramfs=self._initramfs(kernel, "guest"),
            image=self.image,
            keys=builds.keys(self.cache),
            cpus=host.equipment.guest_cpus,
            memory_mib=host.equipment.guest_memory_mib,
            cpu=host.equipment.guest_cpu,
            assigned=tuple(host.assigned if assigned is None else assigned),
            accel=config.accel.get(host.facts.kvm_module, {}),
            extra=tuple(words),
        )

    @contextmanager
    def guest(
        self,
        host: Host,
        config: Config,
        logs: Path,
        *,
        label: str | None = None,
        parts: GuestParts | None = None,
        modules: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Iterator[Guest]:
        """The variant's guest on a host, up, with KVM loaded and functions bound as it wants them.

        ``parts`` and ``modules`` are in place of the variant's own; ``label`` names its logs.
        """
        wanted = config.modules if modules is None else modules
        made = self.guest_parts(config, host) if parts is None else parts
        host.load_kvm(wanted)
        with ExitStack() as stack:
            stack.enter_context(host.parameters(wanted))
            stack.enter_context(host.vfio(list(made.assigned), config.functions))
            yield stack.enter_context(
                running_guest(host, made, logs=logs, label=label or config.label)
            )

    def _initramfs(self, kernel: Kernel, role: str) -> Path:
        return builds.initramfs(self.settings, self.cache, kernel, role, modules=role == "host")

    def _for_guests(self) -> tuple[Path, ...]:
        """The files and folders that QEMU needs on the host for the guests of all variants."""
        things: list[Path] = []
        own = self.own
        for qemu in (*self.qemus.values(), *([own.qemu] if own.qemu else [])):
            things += [qemu.program, qemu.firmware]
        for kernel in (*self.kernels.values(), *([own.guest_kernel] if own.guest_kernel else [])):
            things += [kernel.image, self._initramfs(kernel, "guest")]
        return tuple(dict.fromkeys(things))


@contextmanager
def following(name: str, command: str | None, logs: Path) -> Iterator[Console | None]:
    """A server's console, kept in ``logs`` by a command for as long as the context lasts."""
    if command is None:
        yield None
        return
    console = Console(name, logs / "host-console.log")
    with console.path.open("ab") as log:
        process = subprocess.Popen(
            proc.guarded(["sh", "-c", command], tree=True),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield console
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _sweep(folder: Path) -> None:
    """Remove the scratch folders of hosts whose process was killed."""
    for path in folder.glob("testbed-*"):
        if not (Path("/proc") / path.name.removeprefix("testbed-")).exists():
            shutil.rmtree(path, ignore_errors=True)


class _Records:
    """Gathers what was built."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.records: list[Build] = []
        self.fresh = False

    def add(
        self,
        role: Role,
        config: Config | None,
        source: Source | str,
        sha256: str,
        names: tuple[str, ...] = (),
        *,
        fresh: bool,
    ) -> None:
        self.fresh |= fresh
        self.records.append(
            Build(
                role=role,
                variant=config.variant if config else "vanilla",
                source=str(source),
                sha256=sha256,
                series=names,
                testbed=self.settings.testbed if role in ("emulator", "image") else None,
            )
        )


def _emulator(settings: Settings, cache: Cache, note: _Records) -> Made:
    """The emulator of the settings' testbed, with the patches of its tree."""
    kind = EMULATORS[settings.testbed]
    # the emulator is of the harness: it stays what it is whatever QEMU runs in the host
    settings = dataclasses.replace(settings, qemu_tree=None)
    every = [one for one in series.load_series(settings.repo / "patches") if not one.draft]
    ours = series.of_tree(every, kind.tree)
    made = kind.build(settings, cache, tuple(path for one in ours for path in one.patches()))
    names = tuple(one.name for one in ours)
    note.add("emulator", None, made.source, made.build.sha256, names, fresh=made.build.fresh)
    return made


def _check_modules(host: Host, kernel: Kernel) -> None:
    """Raise MeasurementError unless the host's KVM modules are those of the build."""
    folder = f"lib/modules/{kernel.release}"
    for path in sorted((kernel.modules / folder).rglob("kvm*.ko")):
        there = f"/{folder}/{path.relative_to(kernel.modules / folder)}"
        seen = host.shell.run(f"sha256sum {shlex.quote(there)}", check=False).stdout.split()
        if not seen or seen[0] != sha256_file(path):
            raise MeasurementError(
                f"{host.name}: {there} is not the module that was built for this variant"
            )
