# SPDX-License-Identifier: GPL-2.0-or-later
"""What is asked of a whole series: its uapi stays compatible, its qtests pass."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ...core import proc
from ...core.errors import EnvironmentBroken
from ..form import UAPI
from ..validate import (
    BUILD_ENVIRONMENT,
    Base,
    Candidate,
    Finding,
    QemuBuild,
    Touched,
    WorkTree,
    touched_files,
)
from .stage import Need, not_run

_UAPI_S = 3600.0
_BUILD_S = 2 * 3600.0
_QTEST_S = 600.0

UAPI_RULE = "check-uapi"
QTEST_RULE = "qtest"


def all_touched(candidate: Candidate) -> tuple[Touched, ...]:
    """The files that the patches of a series touch, each once."""
    return tuple(
        dict.fromkeys(
            file
            for patch in candidate.series.patches()
            for file in touched_files(patch.read_text(encoding="utf-8", errors="replace"))
        )
    )


# -- Linux' uapi


def has_uapi(candidate: Candidate) -> bool:
    """Whether a series for Linux touches what userspace includes."""
    return candidate.series.tree == "linux" and any(
        UAPI.match(file.path) for file in all_touched(candidate)
    )


Abidiff = Callable[[], Path]
"""Where there is an abidiff that is new enough; EnvironmentBroken where there is none."""


def check_uapi(
    work: WorkTree, label: str, before: str, after: str, abidiff: Abidiff
) -> list[Finding]:
    """scripts/check-uapi.sh between two commits: what it says where it is not content."""
    try:
        program = abidiff()
    except EnvironmentBroken as error:
        need = Need("abidiff 2.4 or newer", f"abigail-tools of Debian 13; {error.message}")
        return not_run(label, UAPI_RULE, [need])
    work.git.run("reset", "--quiet", "--hard", after)
    done = proc.run(
        [work.git.folder / "scripts" / "check-uapi.sh", "-q", "-b", before, "-p", after],
        deadline_s=_UAPI_S,
        cwd=work.git.folder,
        env={**BUILD_ENVIRONMENT, "ABIDIFF": str(program)},
        tree=True,
        check=False,
    )
    if done.status == 0:
        return []
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    text = " / ".join(said[:8]) or f"ended with status {done.status}"
    return [Finding(label, "", UAPI_RULE, "error", text)]


# -- QEMU's qtests

_AROUND: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^(?:hw/pci|include/hw/pci|hw/pci-host|include/hw/pci-host|hw/pci-bridge)/", ("q35-test",)),
    (r"^(?:hw/i386|include/hw/i386)/", ("q35-test", "i440fx-test")),
    (r"^target/i386/", ("test-x86-cpuid-compat",)),
    (r"^hw/i386/(?:intel_iommu|x86-iommu)", ("intel-iommu-test",)),
    (r"^hw/nvme/", ("device-introspect-test",)),
    (r"^hw/", ("device-introspect-test",)),
)
"""Tests that QEMU has for the code in a folder, beside those that a series brings."""


_FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/lib/ipxe/qemu"))
_NEEDS = (
    Need("SeaBIOS", "seabios", (_FIRMWARE[0] / "bios-256k.bin").is_file),
    Need("ROMs of network cards", "ipxe-qemu", (_FIRMWARE[1] / "efi-e1000.rom").is_file),
)


def _link_firmware(build: Path) -> None:
    """Put Debian's firmware where a QEMU in its build folder looks: its source has none."""
    target = build / "qemu-bundle" / "usr" / "share" / "qemu"
    target.mkdir(parents=True, exist_ok=True)
    for folder in _FIRMWARE:
        for path in folder.glob("*.[br][io][nm]"):
            link = target / path.name
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(path)


def qtests(touched: Sequence[Touched]) -> tuple[str, ...]:
    """The qtests for touched files: the touched ones, and those that know the folder."""
    found: dict[str, None] = {}
    for file in touched:
        path = PurePosixPath(file.path)
        if file.path.startswith("tests/qtest/") and re.search(r"-test\.c$|/test-", file.path):
            if not file.deleted:
                found[path.stem] = None
            continue
        for pattern, names in _AROUND:
            if re.search(pattern, file.path):
                found.update(dict.fromkeys(names))
    return tuple(found)


def run_qtests(
    candidate: Candidate, base: Base, work: WorkTree, before: str, after: str
) -> list[Finding]:
    """Build QEMU with a whole series and run the qtests: each that fails, with its own words.

    A test that fails without the series as well is told as a note.
    """
    setup = base.build
    names = qtests(all_touched(candidate))
    if not isinstance(setup, QemuBuild) or not names:
        return []
    label = candidate.series.label
    if missing := [need for need in _NEEDS if not need.is_met()]:
        return not_run(label, QTEST_RULE, missing)
    here = work.in_folder("out")
    failed = _run(setup, here, after, names)
    if not failed:
        return []
    old = _run(setup, here, before, tuple(failed))
    return [
        Finding(
            label,
            "",
            QTEST_RULE,
            "note" if old.get(name) == said else "error",
            f"{name}: {said}" + (" (so it does without the series)" if name in old else ""),
        )
        for name, said in failed.items()
    ]


def _run(setup: QemuBuild, work: WorkTree, commit: str, names: Sequence[str]) -> dict[str, str]:
    """The qtests of a commit that fail, and what they say; those that it lacks are left out."""
    work.go(setup, commit)
    here = [name for name in names if (work.git.folder / f"tests/qtest/{name}.c").is_file()]
    targets = [f"tests/qtest/{name}" for name in here]
    environment = {**BUILD_ENVIRONMENT, **(setup.environment or {})}
    ninja = ["ninja", f"-j{setup.jobs}", "-k0"]
    done = proc.run(
        [*ninja, "qemu-system-x86_64", *targets],
        deadline_s=_BUILD_S,
        cwd=work.build,
        env=environment,
        log=work.build / "validate.log",
        tree=True,
        check=False,
    )
    if done.status != 0:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        return dict.fromkeys(here, f"does not build: {lines[0] if lines else 'ninja failed'}")
    _link_firmware(work.build)
    return {name: said for name in here if (said := _one(work.build, name))}


def _one(build: Path, name: str) -> str:
    """What a qtest says where it fails or does not end, or nothing."""
    try:
        return _said(build, name)
    except proc.CommandFailed as error:
        return error.message


def _said(build: Path, name: str) -> str:
    done = proc.run(
        [build / "tests" / "qtest" / name, "--tap"],
        deadline_s=_QTEST_S,
        cwd=build,
        env={
            "QTEST_QEMU_BINARY": str(build / "qemu-system-x86_64"),
            "G_TEST_DBUS_DAEMON": "",
            "MALLOC_PERTURB_": "1",
            "PATH": os.environ["PATH"],
        },
        tree=True,
        check=False,
    )
    if done.status == 0:
        return ""
    lines = (done.stdout + done.stderr).splitlines()
    bad = [one for one in lines if one.startswith(("not ok", "Bail out!", "ERROR:", "**"))]
    return bad[0] if bad else f"ended with status {done.status}: {proc.tail(done.stderr, 1)}"
