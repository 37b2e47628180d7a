# SPDX-License-Identifier: GPL-2.0-or-later
"""apt: whose mirror to use, and what the signed indexes say."""

from pathlib import Path

import pytest

from nearmetal.core import proc
from nearmetal.core.errors import EnvironmentBroken
from nearmetal.sources.debian import (
    Archive,
    File,
    mirrors,
    parse_show,
    parse_showsrc,
    sources_text,
    version_key,
)

DEB822 = """\
Types: deb
# a comment: with a colon
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://other.example/nodesource
Suites: nodistro
Components: main
"""

ONE_LINE = """\
# deb http://no.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/k.gpg] http://mirror.example/debian trixie main contrib
deb-src http://source.example/debian trixie main
deb http://mirror.example/debian-security trixie-security main
"""


def test_deb822_sources() -> None:
    main, security = mirrors([DEB822])
    assert (main.kind, main.uri) == ("main", "http://mirror.example/debian")
    assert main.signed_by.endswith("debian-archive-keyring.gpg")
    assert (security.kind, security.uri) == ("security", "http://mirror.example/debian-security")


def test_one_line_sources() -> None:
    main, security = mirrors([ONE_LINE])
    assert (main.uri, main.signed_by) == ("http://mirror.example/debian", "/etc/k.gpg")
    assert security.uri == "http://mirror.example/debian-security"


def test_disabled_sources_do_not_count() -> None:
    assert mirrors([DEB822.replace("Types: deb\n", "Types: deb\nEnabled: no\n")]) == ()


def test_our_sources_name_the_project_s_suites() -> None:
    text = sources_text(mirrors([DEB822]))
    assert "Suites: trixie trixie-backports" in text
    assert "Suites: trixie-security" in text
    assert "bookworm" not in text
    assert "other.example" not in text


SHOW = """\
Package: linux-source-7.3
Version: 7.3.4-1~bpo13+1
Filename: pool/main/l/linux/linux-source-7.3_7.3.4-1~bpo13+1_all.deb
SHA256: {a}

Package: linux-source-7.3
Version: 7.2.9-1
Filename: pool/main/l/linux/linux-source-7.3_7.2.9-1_all.deb
SHA256: {b}
""".format(a="a" * 64, b="b" * 64)


def test_binary_versions_in_range() -> None:
    files = parse_show(SHOW, "linux-source-7.3", r"7\.3\.\d")
    assert [file.version for file in files] == ["7.3.4-1~bpo13+1"]
    assert files[0].name == "linux-source-7.3_7.3.4-1~bpo13+1_all.deb"
    assert files[0].sha256 == "a" * 64


def _source(version: str, digest: str) -> str:
    plain = version.split(":")[-1].split("-")[0]
    return (
        f"Package: qemu\nVersion: {version}\nChecksums-Sha256:\n"
        f" {'0' * 64} 1234 qemu_{plain}.debian.tar.xz\n"
        f" {digest * 64} 40010016 qemu_{plain}.orig.tar.xz\nFormat: 3.0\n"
    )


def test_source_versions_newest_first_and_only_the_tarball() -> None:
    text = "\n\n".join(
        [
            _source("1:10.0.2+ds-2", "1"),
            _source("1:11.1.3+ds-1", "2"),
            _source("1:10.0.13+ds-0", "3"),
        ]
    )
    files = parse_showsrc(text, "qemu", r"10\.0\.\d")
    assert [file.version for file in files] == ["1:10.0.13+ds-0", "1:10.0.2+ds-2"]
    assert files[0].name == "qemu_10.0.13+ds.orig.tar.xz"
    assert files[0].sha256 == "3" * 64


def test_altered_download_is_fetched_once_more_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fake(words: list[str], **_: object) -> proc.Completed:
        calls.append(words)
        (tmp_path / "qemu.orig.tar.xz").write_bytes(b"altered")
        return proc.Completed((), 0, "", "")

    monkeypatch.setattr(proc, "run", fake)
    file = File("qemu.orig.tar.xz", "0" * 64, "1:10.0.13", "qemu", True)
    with pytest.raises(EnvironmentBroken, match="SHA-256"):
        Archive(tmp_path).fetch(file, tmp_path)
    assert len(calls) == 2
    assert not (tmp_path / "qemu.orig.tar.xz").exists()


def test_versions_are_in_debian_s_order() -> None:
    versions = ["7.3.4-2~bpo12+1", "7.3.4-2", "7.3.4-10", "1:7.3.4-1", "7.3.4-2~bpo13+1"]
    assert sorted(versions, key=version_key) == [
        *("7.3.4-2~bpo12+1", "7.3.4-2~bpo13+1", "7.3.4-2", "7.3.4-10", "1:7.3.4-1"),
    ]
    names = ["qemu_11.1.10+ds.orig.tar.xz", "qemu_11.1.2+ds.orig.tar.xz"]
    assert sorted(names, key=version_key) == names[::-1]
