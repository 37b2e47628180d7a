# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines of both QEMUs, whole: a change of one is seen in review.

To write them anew: NEARMETAL_WRITE_GOLDEN=1 pytest tests/unit/test_command_lines.py
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from nearmetal.builds import Image, Kernel, Keys, Qemu
from nearmetal.machines import guest
from nearmetal.machines.emulators import qemu as emulator

GOLDEN = Path(__file__).parent / "data" / "command-lines"

QEMU = Qemu(Path("/s/qemu-system-x86_64"), Path("/s/firmware"), "11.1.1", "ab", False)
KERNEL = Kernel(Path("/s/bzImage"), Path("/s/modules"), "7.3.4", "cd", False)
IMAGE = Image(Path("/s/debian.squashfs"), "ef", False)
KEYS = Keys(Path("/k/login"), Path("/k/host"))
HOST = emulator.Parts(QEMU, KERNEL, Path("/s/initramfs"), IMAGE, KEYS, Path("/s"))
GUEST = guest.GuestParts(QEMU, KERNEL, Path("/s/initramfs"), IMAGE, KEYS)
PAIR = ("0000:03:00.0", "0000:04:00.0")

HOSTS = {
    "host-plain": HOST,
    "host-bare": dataclasses.replace(HOST, iommu=False),
    "host-ats": dataclasses.replace(HOST, ats=True),
    "host-counting": dataclasses.replace(HOST, counter=Path("/s/nm-insns.so")),
    "host-with-more": dataclasses.replace(HOST, extra=("-device", "pcie-testdev")),
}
GUESTS = {
    "guest-plain": GUEST,
    "guest-pair": dataclasses.replace(GUEST, assigned=PAIR),
    "guest-iommufd": dataclasses.replace(GUEST, assigned=PAIR, iommufd=True),
    "guest-direct": dataclasses.replace(
        GUEST,
        assigned=PAIR,
        iommufd=True,
        host_addresses=True,
        machine="ram-holes=0x100000000-0x1ffffffff",
        extra=("-global", "vfio-pci.direct-p2p=on"),
    ),
    "guest-accelerator": dataclasses.replace(GUEST, accel={"pmu-passthrough": "on"}, cpus=2),
}


def held(name: str, line: list[str]) -> None:
    """Compare a line with its golden file: an option and its value a line."""
    rows = [line[0]]
    for word in line[1:]:
        if word.startswith("-"):
            rows.append(f"  {word}")
        else:
            rows[-1] += f" {word}"
    text = "\n".join(rows) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("NEARMETAL_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", HOSTS)
def test_the_emulated_host(name: str) -> None:
    where = {"console": Path("/l/console"), "scratch": Path("/t"), "instructions": Path("/l/i")}
    held(name, emulator.command_line(HOSTS[name], port=2222, **where))


@pytest.mark.parametrize("name", GUESTS)
def test_the_guest(name: str) -> None:
    held(
        name,
        guest.command_line(
            GUESTS[name],
            program="/h/qemu",
            firmware="/h/firmware",
            kernel="/h/bzImage",
            initramfs="/h/initramfs",
            image="/h/image",
            folder="/run/vm",
            name="nearmetal-1",
            port=40022,
        ),
    )
