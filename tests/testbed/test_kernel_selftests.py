# SPDX-License-Identifier: GPL-2.0-or-later
"""What passes of the kernel's own selftests for vfio and iommufd without the series passes with it.

Each is built from the tree that it is run on. iommufd's want a kernel of their own
(iommufd-test.config), in which allocations fail when they want it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_direct_p2p as isolation

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.patches import series, variants
from nearmetal.sources import archive as sources

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

ON_DISK = (
    "vfio_dma_mapping_test",
    "vfio_dma_mapping_mmio_test",
    "vfio_iommufd_setup_test",
    "vfio_pci_device_test",
    "vfio_pci_device_init_perf_test",
    "vfio_pci_driver_test",
)
"""Those that take one function: the disk."""
ON_PF = "vfio_pci_sriov_uapi_test"
"""This one takes a PF."""
ON_IOMMUFD = ("iommufd", "iommufd_fail_nth")
DEADLINE_S = 900.0
SKIPPED = 4
"""Exit status of a program that can't run here (Linux: tools/testing/selftests/kselftest.h)."""
_LINE = re.compile(r"^(ok|not ok) \d+ (\S+)(?: # (.*))?$")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one test: ``pass``, ``fail`` or ``skip``, and why it was skipped."""

    status: str
    reason: str = ""


def results(program: str, text: str) -> dict[str, Result]:
    """By program and name, from TAP (Linux: Documentation/dev-tools/ktap.rst).

    A program that skips all says only why.
    """
    found = {}
    for line in text.splitlines():
        if match := _LINE.match(line.strip()):
            state, name, rest = match.groups()
            skipped = (rest or "").startswith("SKIP")
            status = "skip" if skipped else {"ok": "pass", "not ok": "fail"}[state]
            found[f"{program}: {name}"] = Result(status, (rest or "")[5:])
        elif line.startswith("1..0 # SKIP"):
            found[program] = Result("skip", line[12:])
    return found


def configs(conf: Settings) -> tuple[variants.Config, variants.Config]:
    """Vanilla, and the variant that direct-p2p is on in; without guests, so with one QEMU."""
    every = series.load_series(conf.repo / "patches")
    (vanilla,) = variants.configs(every, ("vanilla",))
    on = next(one for one in variants.configs(every, ("on",)) if one.series == "direct-p2p")
    return vanilla, dataclasses.replace(on, qemu_patches=(), guest_patches=())


@contextmanager
def booted(
    conf: Settings,
    cache: Cache,
    config: variants.Config,
    logs: Path,
    fragment: str = "",
) -> Iterator[Host]:
    """An emulated host with the variant's kernel, its parameters, and functions of each kind."""
    made = Lab.build(conf, cache, [config])
    if fragment:
        folder = conf.repo / "guest-images" / "kernel"
        linux = sources.obtain(conf, cache, "linux")
        fragments = (folder / "base.config", folder / fragment)
        made.kernels[config.linux_patches] = builds.kernel(
            conf, cache, linux, patches=config.linux_patches, fragments=fragments
        )
    folder = logs / config.variant
    folder.mkdir()
    with (
        cache.lock("testbed"),
        made.host(config, folder, extra=isolation.BELOW) as host,
        host.parameters(config.modules),
    ):
        # some tests want huge pages
        host.shell.run("echo 64 > /proc/sys/vm/nr_hugepages")
        yield host


def on_functions(
    conf: Settings, cache: Cache, config: variants.Config, logs: Path
) -> dict[str, Result]:
    linux = sources.obtain(conf, cache, "linux")
    programs = (*ON_DISK, ON_PF)
    folder = builds.kernel_selftests(
        conf, cache, linux, "vfio", programs, patches=config.linux_patches
    )
    found = {}
    with booted(conf, cache, config, logs) as host:
        functions = {
            line.split()[0]: line.split()[1]
            for line in host.shell.run(isolation.FIND).stdout.splitlines()
        }
        host.shell.run("modprobe vfio-pci; echo Y > /sys/module/vfio_pci/parameters/enable_sriov")
        for program in programs:
            function = functions["nmvirtual" if program == ON_PF else "nmdisk"]
            host.bind_vfio(function)
            found.update(told(host, folder / program, function))
    return found


def told(host: Host, program: Path, *arguments: str) -> dict[str, Result]:
    """Runs one program on the host."""
    words = " ".join([host.place(program), *arguments])
    done = host.shell.run(words, deadline_s=DEADLINE_S, check=False)
    print(done.stdout[-20000:], done.stderr[-5000:])
    found = results(program.name, done.stdout)
    if not found and done.status == SKIPPED:
        found = {program.name: Result("skip", " ".join((done.stdout + done.stderr).split()))}
    assert found, f"{program.name} says nothing: {done.stderr[-1000:]}"
    return found


def compare(vanilla: Mapping[str, Result], on: Mapping[str, Result]) -> None:
    """Prints what is not passed on vanilla, and fails where the series changes anything else."""
    passed = {name for name, result in vanilla.items() if result.status == "pass"}
    for name, result in vanilla.items():
        if result.status != "pass":
            print(f"{result.status} on vanilla: {name} {result.reason}")
    print(f"{len(passed)} of {len(vanilla)} pass on vanilla")
    assert passed
    lost = {name: on.get(name) for name in passed if on.get(name) != Result("pass")}
    assert not lost, f"pass on vanilla, but not with the series: {lost}"


def test_vfio(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    vanilla, on = configs(conf)
    compare(*(on_functions(conf, cache, config, tmp_path) for config in (vanilla, on)))


def test_iommufd(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    found = []
    for config in configs(conf):
        linux = sources.obtain(conf, cache, "linux")
        folder = builds.kernel_selftests(
            conf, cache, linux, "iommu", ON_IOMMUFD, patches=config.linux_patches
        )
        here: dict[str, Result] = {}
        with booted(conf, cache, config, tmp_path, "iommufd-test.config") as host:
            for program in ON_IOMMUFD:
                here.update(told(host, folder / program))
        found.append(here)
    compare(*found)
