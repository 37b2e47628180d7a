# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: nothing half-built in it, and locks between processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache, key_of, sha256_tree
from nearmetal.core.errors import EnvironmentBroken


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache").open()


def test_made_once_then_found(cache: Cache) -> None:
    made = []

    def build(work: Path) -> dict[str, str]:
        made.append(work)
        (work / "thing").write_text("whole")
        return {"more": "said"}

    first = cache.make("kind", {"a": 1}, build, what="test")
    second = cache.make("kind", {"a": 1}, build, what="test")
    assert len(made) == 1
    assert first.fresh
    assert not second.fresh
    assert second.meta["more"] == "said"
    assert (second.path / "thing").read_text() == "whole"


def test_other_ingredients_make_another_thing(cache: Cache) -> None:
    def build(work: Path) -> None:
        (work / "thing").touch()

    assert (
        cache.make("kind", {"a": 1}, build, what="x").key
        != cache.make("kind", {"a": 2}, build, what="x").key
    )
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_failed_build_leaves_nothing_in_the_store(cache: Cache) -> None:
    def build(work: Path) -> None:
        (work / "half").touch()
        raise EnvironmentBroken("no compiler")

    with pytest.raises(EnvironmentBroken):
        cache.make("kind", {}, build, what="x")
    assert cache.find("kind", key_of({})) is None
    assert cache.entries() == []


def test_next_build_starts_afresh_unless_it_resumes(cache: Cache) -> None:
    seen = []

    def broken(work: Path) -> None:
        (work / "half").touch()
        raise EnvironmentBroken("stopped")

    def good(work: Path) -> None:
        seen.append((work / "half").exists())

    for resume in (False, True):
        with pytest.raises(EnvironmentBroken):
            cache.make("kind", {"r": resume}, broken, what="x")
        cache.make("kind", {"r": resume}, good, what="x", resume=resume)
    assert seen == [False, True]


def test_full_disk_is_one_line_with_the_mend(cache: Cache) -> None:
    def build(work: Path) -> None:
        raise OSError(28, "No space left on device", str(work / "big"))

    with pytest.raises(EnvironmentBroken, match="No space left on device") as caught:
        cache.make("kind", {}, build, what="building")
    assert "cache --prune" in str(caught.value.hint)


KILLED = """
import sys, time
from pathlib import Path
from nearmetal.core.cache import Cache
def build(work):
    (work / "half").touch()
    print("building", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1])).open().make("kind", {}, build, what="x")
"""


def test_kill_9_leaves_the_cache_intact_and_the_lock_free(cache: Cache) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(cache.root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert cache.find("kind", key_of({})) is None
    begun = time.monotonic()

    def good(work: Path) -> None:
        assert not (work / "half").exists()

    cache.make("kind", {}, good, what="x")
    assert time.monotonic() - begun < 10
    assert json.loads((cache.root / "store/kind" / key_of({}) / "meta.json").read_text())


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentBroken, match="cannot be made") as caught:
        Cache(tmp_path / "file" / "below").open()
    assert "--cache-dir" in str(caught.value.hint)


def test_tree_hash_sees_content_mode_and_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").chmod(0o755)
    second = sha256_tree(tmp_path)
    (tmp_path / "b").symlink_to("a")
    third = sha256_tree(tmp_path)
    (tmp_path / "a").write_text("2")
    assert len({first, second, third, sha256_tree(tmp_path)}) == 4


def test_a_process_does_not_wait_for_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path).open()
    with (
        cache.lock("testbed"),
        pytest.raises(RuntimeError, match="already holds the lock 'testbed'"),
    ):
        cache.lock("testbed").__enter__()
    with cache.lock("testbed"):
        pass
