# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of copies between a host's memory and devices."""

from __future__ import annotations

import subprocess

import pytest

from nearmetal.cli.copies import LOOK, copies

HOST = """\
pages=0 64 60
pages=1 64 64
pdpe1gb=1
intel=dmar0 8d2078c106f0466
intel=dmar1 8d2078c106f0466
disable_hugepages=N
command=BOOT_IMAGE=/vmlinuz root=/dev/sda1 intel_iommu=on iommu=pt
"""


def test_doctor_is_content_with_a_host_that_has_all() -> None:
    assert [(one.state, one.text) for one in copies(HOST)] == [
        ("ok", "of 1 GiB on node 0: 64 (60 free), node 1: 64 (64 free)"),
        ("ok", "up to 1 GiB"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "text", "mend"),
    [
        ("pdpe1gb=1\n", "", "the CPU has no pages of 1 GiB", "2 MiB"),
        ("pages=0 64 60\npages=1 64 64\n", "", "none of 1 GiB", "hugepages=N"),
        ("pages=1 64 64", "pages=1 0 0", "guests of node 1", "hugepages=0:N,1:N"),
        ("intel_iommu=on", "intel_iommu=on,sp_off", "sp_off", "remove it"),
        ("intel_iommu=on", "amd_iommu=nohugepages", "nohugepages", "remove it"),
        ("hugepages=N\n", "hugepages=Y\n", "type1 maps by entries of 4 KiB", "echo N"),
        ("dmar1 8d2078c106f0466", "dmar1 8d20784106f0466", "dmar1 can have none of 1 GiB", "2 MiB"),
        ("intel=", "other=", "no IOMMU tells", "see"),
    ],
)
def test_doctor_names_what_makes_copies_dear(old: str, new: str, text: str, mend: str) -> None:
    assert old in HOST
    (found,) = [one for one in copies(HOST.replace(old, new)) if one.state != "ok"]
    assert found.state == "warn"
    assert text in found.text
    assert mend in found.mend


def test_doctor_s_look_runs_and_writes_nothing() -> None:
    done = subprocess.run(["sh", "-c", LOOK], capture_output=True, text=True, check=True)
    assert "command=" in done.stdout
    assert len(copies(done.stdout)) == 2
