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
from test_uncore_pmu import MODULE, NEEDED

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.emulators import qemu as testbed
from nearmetal.machines.lab import Lab

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]


def test_the_hosts_perf_and_a_user_exclude_each_other(
    conf: Settings, cache: Cache, tmp_path: Path
) -> None:
    config = patched_config(conf, NEEDED)
    made = Lab.build(conf, cache, [config])
    extra = (*testbed.MEMORY_CONTROLLERS, "-cpu", "Icelake-Server-v4,-hypervisor")
    counts = "perf stat -x, -a -e uncore_imc_0/event=0x04,umask=0x30/ sleep"
    with (
        cache.lock("testbed"),
        made.host(config, tmp_path, extra=extra) as host,
        host.vfio([], {"imc": MODULE}),
    ):
        function = host.functions["imc"]

        def is_counted() -> bool:
            done = host.shell.run(f"{counts} 0.1 2>&1", check=False)
            print(done.stdout)
            return done.status == 0 and ",,uncore_imc_0/" in done.stdout and "<" not in done.stdout

        assert is_counted()
        user = isolation.Program(host)
        user.do("open", function)
        assert not is_counted()
        user.end("KILL")
        isolation.wait_for(is_counted)

        pid = host.shell.run(f"{counts} 600 > /dev/null 2>&1 < /dev/null & echo $!").stdout.strip()
        isolation.wait_for(
            lambda: "perf_event" in host.shell.run(f"ls -l /proc/{pid}/fd", check=False).stdout
        )
        user = isolation.Program(host)
        assert user.ask("open", function)["errno"] == EBUSY
        host.shell.run(f"kill {shlex.quote(pid)}; while [ -d /proc/{pid} ]; do sleep 0.1; done")
        user.do("open", function)
        user.end("KILL")
        host.check()
