# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job as a user starts it: from a command to a report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from nearmetal.core.settings import Settings
from nearmetal.measure import p2p
from nearmetal.sources.archive import BASES

pytestmark = pytest.mark.testbed

DEADLINE_S = 1500

WANTED = {
    "lspci.userspace_exits",
    "lspci.exits",
    "lspci.pass_us",
    "lspci.dword_ns",
    "lspci.dword_instructions",
    "exit.kernel_pair_instructions",
    "vmexit.agent.exits_per_sample",
    "vmexit.agent.samples_per_s",
    "p2p.read_mib_s",
    "p2p.write_mib_s",
    "p2p.host_ram_mib_s",
    "p2p.corrupt_bytes",
    "p2p.iommu_faults",
}
WAYS = {"bare": "direct", "iommu": "redirected", "ats": "translated"}
"""The set-ups of p2p, and the way that the switch's counters must show."""


def nearmetal(conf: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nearmetal", *words, "--results-dir", str(conf.results_dir)]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def ran(conf: Settings) -> subprocess.CompletedProcess[str]:
    return nearmetal(conf, "run", "--variant", "vanilla", "--cache-dir", str(conf.cache_dir))


@pytest.fixture(scope="module")
def document(conf: Settings, ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((conf.results_dir / "latest" / "report.json").read_text())
    return found


def rows(document: dict[str, Any], name: str, **context: str) -> list[dict[str, Any]]:
    return [
        row
        for row in document["measurements"]
        if row["name"] == name and context.items() <= row["context"].items()
    ]


def test_run_ends_well(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "Traceback" not in ran.stderr


def test_everything_was_measured_and_is_told_to_be_emulated(document: dict[str, Any]) -> None:
    assert {row["name"] for row in document["measurements"]} >= WANTED
    assert {row["provenance"] for row in document["measurements"]} == {"emulated"}
    assert {row["context"]["testbed"] for row in document["measurements"]} == {"amd"}


def test_no_check_failed_and_none_was_left_out_silently(document: dict[str, Any]) -> None:
    statuses = {check["name"]: check["status"] for check in document["checks"]}
    assert "pass" in statuses.values()
    assert not [name for name, status in statuses.items() if status in ("fail", "error")]
    assert all(check["reason"] for check in document["checks"] if check["status"] == "skip")


def test_config_reads_are_the_same_in_every_pass(document: dict[str, Any]) -> None:
    (second,) = rows(document, "lspci.exits", path="cf8", **{"pass": "second"})
    (first,) = rows(document, "lspci.exits", path="cf8", **{"pass": "first"})
    assert len(second["values"]) == 3
    assert len(set(second["values"] + first["values"])) == 1
    # 13 functions of 64 dwords below 256 bytes, two port accesses each
    assert second["median"] == 13 * 64 * 2
    (user,) = rows(document, "lspci.userspace_exits", path="cf8", **{"pass": "second"})
    assert user["values"] == second["values"]


def test_peer_to_peer_moved_every_byte(document: dict[str, Any]) -> None:
    found = rows(document, "p2p.corrupt_bytes")
    assert {row["context"]["direction"] for row in found} == {"read", "write"}
    assert all(value == 0 for row in found for value in row["values"])
    faults = rows(document, "p2p.iommu_faults")
    assert {row["context"]["setup"] for row in faults} == set(WAYS)
    assert all(row["values"] == [0] for row in faults)


@pytest.mark.parametrize(("setup", "way"), sorted(WAYS.items()))
def test_every_set_up_takes_its_way(document: dict[str, Any], setup: str, way: str) -> None:
    """8 MiB written and 8 MiB read a run, each byte by this way and no other."""
    for name in WAYS.values():
        (row,) = rows(document, f"p2p.bytes_{name}", setup=setup)
        moved = 2 * p2p.BYTES if name == way else 0
        assert row["values"] == [moved] * (p2p.RUNS[row["context"]["topology"]] + 1)


def test_builds_are_recorded_exactly(document: dict[str, Any]) -> None:
    roles = {build["role"]: build for build in document["builds"]}
    assert set(roles) >= {"host-kernel", "guest-kernel", "host-qemu", "emulator", "image"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", build["sha256"]) for build in document["builds"])
    linux, qemu = BASES["linux"], BASES["qemu"]
    for role, base in (("host-kernel", linux), ("host-qemu", qemu), ("emulator", qemu)):
        version = roles[role]["source"].rsplit(" ", 1)[-1].split(":")[-1]
        assert re.match(base.wanted, version), roles[role]["source"]


def test_page_and_junit_are_whole(conf: Settings, document: dict[str, Any]) -> None:
    folder: Path = conf.results_dir / "latest"
    page = (folder / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r"""(?:src|href)=["']https?://""", page)
    suites = ElementTree.parse(folder / "junit.xml").getroot()
    assert len(list(suites.iter("testcase"))) == len(document["checks"])
    assert (folder / "logs" / "host-console.log").stat().st_size > 0
    assert (folder / "logs" / "guest-vanilla-console.log").stat().st_size > 0


def test_report_command_gives_the_same_verdict(
    conf: Settings, document: dict[str, Any], ran: subprocess.CompletedProcess[str]
) -> None:
    again = nearmetal(conf, "report", "latest")
    assert again.returncode == 0, again.stderr
    assert "lspci.exits" in again.stdout
    verdict = [line for line in ran.stdout.splitlines() if line.startswith("pass: ")]
    assert len(verdict) == 1
    assert verdict[0] in again.stdout
