# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pci-config-cache in the emulated host: its selftest, and those that it must not break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal import builds, run, series, sources, variants
from nearmetal.cache import Cache
from nearmetal.host import Host
from nearmetal.settings import Settings

pytestmark = pytest.mark.testbed

SELFTESTS = ("x86/pci_config_cache_test", "x86/userspace_io_test", "coalesced_io_test")
SEED = 1


@pytest.fixture(scope="module")
def off(conf: Settings) -> variants.Config:
    return variants.configs(series.load_series(conf.repo / "patches"), ("off",))[0]


@pytest.fixture(scope="module")
def patched(
    conf: Settings, cache: Cache, off: variants.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """An emulated host with every product patch in its kernel."""
    made = run.build_all(conf, cache, [off], with_testbed=True)
    logs: Path = tmp_path_factory.mktemp("logs")
    with cache.lock("testbed"), run.host_for(conf, cache, made, off, None, logs) as machine:
        machine.load_kvm()
        yield machine


@pytest.mark.parametrize("program", SELFTESTS)
def test_selftest_passes(
    conf: Settings, cache: Cache, off: variants.Config, patched: Host, program: str
) -> None:
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kvm_selftests(conf, cache, linux, SELFTESTS, patches=off.linux_patches)
    name = Path(program).name
    words = f" -s {SEED}" if "pci_config" in name else ""
    patched.forget_log()
    done = patched.shell.run(patched.place(folder / name) + words, deadline_s=600, check=False)
    print(done.stdout, done.stderr)
    # 4 is KSFT_SKIP: a skip would prove nothing here
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    patched.check()
