# SPDX-License-Identifier: GPL-2.0-or-later
"""What the testbed tests share: the builds, and one emulated host for those that only read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal import run, series, settings, variants
from nearmetal.cache import Cache
from nearmetal.host import Host
from nearmetal.settings import Settings

REPO = settings.repository()


@pytest.fixture(scope="session")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The user's cache, and results of our own."""
    return Settings(
        repo=REPO,
        cache_dir=settings.default_cache_dir().absolute(),
        results_dir=tmp_path_factory.mktemp("results"),
        jobs=os.cpu_count() or 2,
    )


@pytest.fixture(scope="session")
def cache(conf: Settings) -> Cache:
    return Cache(conf.cache_dir).open()


@pytest.fixture(scope="session")
def vanilla(conf: Settings) -> variants.Config:
    return variants.configs(series.load_series(REPO / "patches"), ("vanilla",))[0]


@pytest.fixture(scope="session")
def built(conf: Settings, cache: Cache, vanilla: variants.Config) -> run.Built:
    return run.build_all(conf, cache, [vanilla], with_testbed=True)


@pytest.fixture(scope="module")
def host(
    conf: Settings,
    cache: Cache,
    built: run.Built,
    vanilla: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Host]:
    """An emulated host that is up, with KVM loaded."""
    logs: Path = tmp_path_factory.mktemp("logs")
    with cache.lock("testbed"), run.host_for(conf, cache, built, vanilla, None, logs) as machine:
        machine.load_kvm()
        yield machine
