# SPDX-License-Identifier: GPL-2.0-or-later
"""Small git repositories and sources for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

AUTHOR = {
    "GIT_AUTHOR_NAME": "Žofie Nováková",
    "GIT_AUTHOR_EMAIL": "zofie@example.org",
    "GIT_AUTHOR_DATE": "2026-03-04T05:06:07+0530",
    "GIT_COMMITTER_NAME": "Somebody Else",
    "GIT_COMMITTER_EMAIL": "else@example.org",
    "GIT_COMMITTER_DATE": "2026-04-01T00:00:00+0000",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


def git(folder: Path, *words: str, stdin: str | None = None) -> str:
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        env={**os.environ, **AUTHOR},
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def commit(folder: Path, message: str) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--cleanup=whitespace", "--file=-", stdin=message)
    return git(folder, "rev-parse", "HEAD")


def make_sources(folder: Path) -> Path:
    (folder / "kvm").mkdir(parents=True)
    (folder / "kvm/x86.c").write_text(
        "".join(
            f"int f{n}(void)\n{{\nout:\n\ta();\n\tb();\n\tc();\n\treturn {n};\n}}\n\n"
            for n in range(9)
        )
    )
    (folder / "kvm/dos.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    (folder / "kvm/latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "kvm/run").write_text("#!/bin/sh\n")
    (folder / "kvm/old.c").write_text("".join(f"static int g{n};\n" for n in range(30)))
    (folder / ".gitignore").write_text("*.o\n*.generated\n")
    (folder / ".gitattributes").write_text("*.c diff=cpp\n")
    (folder / "part.generated").write_text("ignored by git, but part of the tarball\n")
    return folder
