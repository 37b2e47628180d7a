# SPDX-License-Identifier: GPL-2.0-or-later
"""What the testbed tests share: the builds, and one emulated host for those that only read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal.core import settings
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.patches import series, variants

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
def built(conf: Settings, cache: Cache, vanilla: variants.Config) -> Lab:
    return Lab.build(conf, cache, [vanilla])


class Shared:
    """The emulated host of vanilla that is up, if any: a boot takes half a minute."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.stack = contextlib.ExitStack()

    def close(self) -> None:
        self.host = None
        self.stack.close()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    found = Shared()
    yield found
    found.close()


@pytest.fixture(scope="module", autouse=True)
def one_machine_at_a_time(request: pytest.FixtureRequest, shared: Shared) -> None:
    """The shared host goes before a module begins that boots one of its own."""
    here = [item for item in request.session.items if item.path == request.path]
    if not any("host" in getattr(item, "fixturenames", ()) for item in here):
        shared.close()


@pytest.fixture(scope="module")
def host(
    conf: Settings,
    cache: Cache,
    built: Lab,
    vanilla: variants.Config,
    shared: Shared,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Host]:
    """An emulated host that is up, with KVM loaded.

    The next module that wants one has the same, unless it does not answer any more or its kernel
    broke.
    """
    if shared.host is not None:
        try:
            shared.host.shell.run("true", deadline_s=20)
            shared.host.check()
        except MeasurementError:
            with contextlib.suppress(MeasurementError):
                shared.close()
            shared.host = None
    if shared.host is None:
        logs: Path = tmp_path_factory.mktemp("logs")
        shared.stack.enter_context(cache.lock("testbed"))
        shared.host = shared.stack.enter_context(built.host(vanilla, logs))
        shared.host.load_kvm()
    yield shared.host
    shared.host.check()
