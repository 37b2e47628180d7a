# SPDX-License-Identifier: GPL-2.0-or-later
"""A night on two servers, one of which dies: two emulated hosts, each behind a port of its own.

To the job they are servers of an inventory: it knows addresses, keys, and how to get the consoles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.console import UP
from nearmetal.machines.emulators import qemu
from nearmetal.machines.lab import Lab
from nearmetal.machines.shell import connect
from nearmetal.nights import page
from nearmetal.patches import variants

if TYPE_CHECKING:
    from nearmetal.machines.emulators.testbed import Testbed

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

REPO = Path(__file__).parents[2]
MEMORY_MIB = 4096
LAST_WORDS = "the power of this server fails"
BOOT_S = 900.0
NIGHT_S = 3600.0


@contextlib.contextmanager
def server(
    cache: Cache, built: Lab, vanilla: variants.Config, logs: Path, name: str
) -> Iterator[Testbed]:
    """An emulated host that boots, and of which nothing is known but its address."""
    assert built.emulator is not None
    kernel = built.host_kernel(vanilla)
    parts = qemu.Parts(
        emulator=built.emulator.build,  # type: ignore[arg-type]
        kernel=kernel,
        initramfs=builds.initramfs(built.settings, cache, kernel, "host", modules=True),
        image=built.image,
        keys=builds.keys(cache),
        store=cache.root / "store",
        counter=None,
        memory_mib=MEMORY_MIB,
    )
    with parts.power_on(
        console=logs / f"{name}-console.log",
        scratch=cache.root / "tmp" / f"server-{name}",
        emulator_log=logs / f"{name}-emulator.log",
    ) as testbed:
        yield testbed


def entry(testbed: Testbed) -> dict[str, object]:
    """Its entry in an inventory."""
    address = testbed.address
    return {
        "address": address.host,
        "port": address.port,
        "key": str(address.key),
        "host_key": address.host_key,
        "guest": {"cpus": 1, "memory_mib": 1024},
        "console": f"tail -n +1 -F {testbed.console.path}",
    }


def guest_of(night: Path, name: str) -> Path | None:
    """The console of a server's guest, if there is one yet."""
    pattern = f"nights/*/{name}/job-*/test-results/*/data/*/logs/guest-vanilla-console.log"
    return next(iter(night.glob(pattern)), None)


def test_a_server_that_dies_turns_its_own_tests_red(
    conf: Settings, cache: Cache, built: Lab, vanilla: variants.Config, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache.lock("testbed"))
        up = {
            name: stack.enter_context(server(cache, built, vanilla, tmp_path, name))
            for name in ("alive", "dies")
        }
        for one in up.values():
            one.console.wait_for(UP, deadline_s=BOOT_S, alive=one.alive)
        inventory = tmp_path / "inventory.yaml"
        inventory.write_text(json.dumps({"hosts": {name: entry(one) for name, one in up.items()}}))
        words = [sys.executable, str(REPO / "tests" / "avocado" / "job.py"), "--tags", "lspci"]
        words += ["--variant", "vanilla", "--inventory", str(inventory), "--quick"]
        for name in up:
            words += ["--host", name]
        with (tmp_path / "night.log").open("w") as log:
            job = subprocess.Popen(
                [*words, "--results-dir", str(results)], stdout=log, stderr=log, cwd=REPO
            )
        end = time.monotonic() + NIGHT_S
        try:
            while (found := guest_of(results, "dies")) is None or UP not in found.read_text():
                assert job.poll() is None, (tmp_path / "night.log").read_text()
                assert time.monotonic() < end
                time.sleep(1)
            dying = up["dies"]
            shell = connect("dies", dying.address, deadline_s=120)
            shell.run(f"echo '<1>{LAST_WORDS}' > /dev/kmsg; sleep 1")
            dying.process.kill()
            status = job.wait(NIGHT_S)
        finally:
            job.kill()
            job.wait()
        up["alive"].alive()
    assert status == 1
    (night,) = (results / "nights").iterdir()
    ran = {
        name: page.ran(next(one for one in (night / name).glob("job-*") if one.is_dir()), night)
        for name in up
    }
    print({name: [dataclasses.astuple(one)[:4] for one in found] for name, found in ran.items()})
    assert [one.status for one in ran["alive"]] == ["PASS"]
    (red,) = ran["dies"]
    assert red.red
    assert "dies" in red.reason
    (console,) = [link for link in red.links if link.endswith("host-console.log")]
    assert LAST_WORDS in (night / console).read_text(errors="replace")
    line = (night / "summary.txt").read_text()
    assert "RED" in line
    assert "1 of 2 tests passed" in line
    assert console in (night / "page.html").read_text()
    latest = next((night / "dies").rglob("report.json"))
    reasons = [one["reason"] for one in json.loads(latest.read_text())["checks"]]
    assert any(LAST_WORDS in reason for reason in reasons), "the report has no console"
    assert not list((night / "alive").rglob("*fault*"))
