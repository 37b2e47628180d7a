# SPDX-License-Identifier: GPL-2.0-or-later
"""Which source is taken: the user's, the archive's newest, the one that is known to work."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.core.settings import Settings
from nearmetal.sources import archive as sources
from nearmetal.sources import debian
from nearmetal.sources.debian import Archive, File, Gone, Pinned

REPO = Path(__file__).parents[2]
PINNED = Pinned("pool/q/qemu_11.1.1.orig.tar.xz", "11.1.1", "1" * 64)
BASE = sources.Base("qemu", "qemu", r"11\.1\.\d", True, r"qemu-11\.1\.\d+\.tar", PINNED)


@dataclass
class FakeArchive:
    """An archive whose index names ``index``, and that has the files whose names are in ``has``."""

    index: list[File]
    has: set[str]
    asked: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    error: EnvironmentBroken | None = None

    def tarballs(self, package: str, wanted: str) -> list[File]:
        return self.index

    def is_gone(self, file: File) -> bool:
        return file.sha256 in self.lost

    def _get(self, name: str, folder: Path) -> None:
        self.asked.append(name)
        if self.error:
            raise self.error
        if name not in self.has:
            raise Gone(f"{name} is gone")
        (folder / name).write_text(name)

    def fetch(self, file: File, folder: Path) -> None:
        if file.name not in self.has:
            self.lost.add(file.sha256)
        self._get(file.name, folder)

    def fetch_pinned(self, file: Pinned, folder: Path) -> None:
        self._get(file.name, folder)


def named(version: str, digest: str) -> File:
    return File(f"qemu_{version}.orig.tar.xz", digest * 64, version, "qemu", True)


def cache_of(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache").open()


def taken(cache: Cache, archive: FakeArchive, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(debian, "open_archive", lambda _: archive)
    path, version, _, origin = sources._fetched(cache, BASE)
    assert version in origin
    assert version in path.name
    return version


def test_the_newest_that_is_really_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = [named("11.1.3", "3"), named("11.1.2", "2")]
    archive = FakeArchive(index, {"qemu_11.1.2.orig.tar.xz", PINNED.name})
    assert taken(cache_of(tmp_path), archive, monkeypatch) == "11.1.2"
    assert PINNED.name not in archive.asked


def test_an_index_of_what_is_gone_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # two Debian revisions of one tarball, as trixie-backports had of 11.1.3
    index = [named("11.1.3", "3"), named("11.1.3", "3"), named("11.1.2", "2")]
    archive = FakeArchive(index, {PINNED.name})
    cache = cache_of(tmp_path)
    assert taken(cache, archive, monkeypatch) == "11.1.1"
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert "11.1.3, 11.1.2" in said
    archive.asked.clear()
    assert taken(cache, archive, monkeypatch) == "11.1.1"
    assert archive.asked == []
    assert "warning" not in capsys.readouterr().err


def test_an_index_that_moved_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = FakeArchive([], {PINNED.name})
    assert taken(cache_of(tmp_path), archive, monkeypatch) == "11.1.1"


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = FakeArchive([named("11.1.3", "3")], set())
    monkeypatch.setattr(debian, "open_archive", lambda _: archive)
    with pytest.raises(Gone, match=r"qemu_11\.1\.1"):
        sources._fetched(cache_of(tmp_path), BASE)


def test_a_lost_network_after_the_lists_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(tmp_path)
    archive = FakeArchive([], {PINNED.name})
    taken(cache, archive, monkeypatch)
    newer = FakeArchive([named("11.1.4", "4")], set(), error=EnvironmentBroken("no network"))
    assert taken(cache, newer, monkeypatch) == "11.1.1"
    newest = FakeArchive([named("11.1.4", "4")], set(), error=EnvironmentBroken("no network"))
    with pytest.raises(EnvironmentBroken, match="no network"):
        monkeypatch.setattr(debian, "open_archive", lambda _: newest)
        sources._fetched(cache_of(tmp_path / "other"), BASE)


def test_an_unknown_release(tmp_path: Path) -> None:
    settings = Settings(REPO, tmp_path, tmp_path)
    with pytest.raises(UsageError, match=r"no qemu 9\.9 is known") as caught:
        sources.obtain_release(settings, cache_of(tmp_path), "qemu", "9.9")
    assert caught.value.hint is not None
    assert "10.0, 10.2, 11.1" in caught.value.hint


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A mirror on this machine: its address and the folder that it serves."""
    top = tmp_path / "mirror"
    top.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: object) -> None:
            super().__init__(*words, directory=str(top))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", top
    server.shutdown()
    server.server_close()


def opened(tmp_path: Path, address: str) -> Archive:
    folder = tmp_path / "apt"
    folder.mkdir()
    archive = Archive(folder)
    archive.sources_file.write_text(f"Types: deb\nURIs: {address}\n")
    (folder / "apt.conf").write_text(
        'APT::Sandbox::User "root";\nAcquire::http::Proxy::127.0.0.1 "DIRECT";\n'
    )
    return archive


def test_a_pinned_file_is_fetched_by_apt(tmp_path: Path, mirror: tuple[str, Path]) -> None:
    address, top = mirror
    (top / "pool").mkdir()
    (top / "pool" / "a.tar").write_text("contents")
    digest = hashlib.sha256(b"contents").hexdigest()
    archive = opened(tmp_path, address)
    got = archive.fetch_pinned(Pinned("pool/a.tar", "1", digest), tmp_path)
    assert got.read_text() == "contents"
    with pytest.raises(Gone, match=r"b\.tar") as gone:
        archive.fetch_pinned(Pinned("pool/b.tar", "1", digest), tmp_path)
    assert gone.value.hint is not None
    assert "--source-dir" in gone.value.hint
    with pytest.raises(EnvironmentBroken) as altered:
        archive.fetch_pinned(Pinned("pool/a.tar", "1", "0" * 64), tmp_path)
    assert not isinstance(altered.value, Gone)
    assert not (tmp_path / "a.tar").exists()


def test_what_is_gone_is_asked_for_again_with_new_lists(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    file = named("11.1.3", "3")
    (tmp_path / "updated").touch()
    assert not archive.is_gone(file)
    archive._remember_gone(file.sha256)
    assert archive.is_gone(file)
    later = (tmp_path / "updated").stat().st_mtime + 3600
    os.utime(tmp_path / "updated", (later, later))
    assert not archive.is_gone(file)
