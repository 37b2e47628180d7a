# SPDX-License-Identifier: GPL-2.0-or-later
"""Series uncore-pmu: the host's perf and a user of vfio exclude each other.

On a host whose CPU is an Ice Lake, so that its perf has the memory controllers' PMU; KVM cannot
run there.
"""

from __future__ import annotations

import shlex
from errno import EBUSY
from pathlib import Path

import pytest
import test_direct_p2p as isolation
from test_pmu_passthrough import patched_config
from test_uncore_pmu import NEEDED

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.lab import Lab
from nearmetal.measure import imc
from nearmetal.patches import variants

COUNTS = "perf stat -x, -a -e"
IMC = "uncore_imc_0/event=0x04,umask=0x30/"
PERF_COUNTS = "perf counts while another has the counters"
FREE = "uncore_imc_free_running_0/event=0xff,umask=0x20/"

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]


def test_the_hosts_perf_and_a_user_exclude_each_other(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    perf_and_a_user(conf, cache, patched_config(conf, NEEDED), tmp_path)


def perf_and_a_user(conf: Settings, cache: Cache, config: variants.Config, tmp_path: Path) -> None:
    """Each is refused while the other is there, and perf keeps the free-running counters."""
    made = Lab.build(conf, cache, [config])
    extra = ("-cpu", "Icelake-Server-v4,-hypervisor")
    with (
        cache.lock("testbed"),
        made.host(config, tmp_path, extra=extra) as host,
        host.vfio([], {"imc": imc.DRIVER}),
    ):
        device = host.auxiliary("imc").rpartition("/")[2]

        def is_counted(event: str = IMC) -> bool:
            done = host.shell.run(f"{COUNTS} {event} sleep 0.1 2>&1", check=False)
            print(done.stdout)
            return done.status == 0 and f",,{event}" in done.stdout and "<" not in done.stdout

        assert is_counted() and is_counted(FREE)
        user = isolation.Program(host)
        user.do("open", device)
        assert not is_counted(), PERF_COUNTS
        # what nobody can write stays the host's
        assert is_counted(FREE)
        user.end("KILL")
        isolation.wait_for(is_counted)
        pid = host.shell.run(
            f"{COUNTS} {IMC} sleep 600 > /dev/null 2>&1 < /dev/null & echo $!"
        ).stdout.strip()
        isolation.wait_for(
            lambda: "perf_event" in host.shell.run(f"ls -l /proc/{pid}/fd", check=False).stdout
        )
        user = isolation.Program(host)
        assert user.ask("open", device)["errno"] == EBUSY
        host.shell.run(f"kill {shlex.quote(pid)}; while [ -d /proc/{pid} ]; do sleep 0.1; done")
        user.do("open", device)
        user.end("KILL")
        host.check()
