# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``export`` writes is sent by git send-email, received by b4, and applied by git am.

Needs git-email (Debian) and b4 (PyPI); nothing leaves the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.patches import series
from nearmetal.upstream import bases, sendcmd, trees

pytestmark = [pytest.mark.nightly]

SENDER = "Jürgen Sender <js@example.org>"


@pytest.fixture(scope="module")
def b4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("b4")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    words: list[str | Path] = [
        folder / "bin/pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "b4",
    ]
    subprocess.run(words, check=True)
    return folder / "bin/b4"


@pytest.fixture(scope="module")
def tree(conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git tree of QEMU's base that is the user's own."""
    folder = tmp_path_factory.mktemp("user") / "qemu"
    trees.clone_base(bases.repository(conf, cache, "qemu")[1], folder)
    return folder


@pytest.fixture(scope="module")
def mails(
    conf: Settings, cache: Cache, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ...]:
    changes = tmp_path_factory.mktemp("changes") / "changes"
    changes.write_text("Changes in v2:\n- patch 2: a comment (Cédric)\n")
    request = sendcmd.Request(
        name="pci-ecam",
        tree="qemu",
        signoff=SENDER,
        output=tmp_path_factory.mktemp("out") / "mails",
        revision=2,
        prefixes=("RFC",),
        changes=changes,
        validated=False,
    )
    return sendcmd.export(replace(conf, qemu_tree=tree), cache, request)


def run(words: list[str | Path], home: Path, cwd: Path) -> str:
    """A program with a user's configuration; its output, which is shown if it fails."""
    home.mkdir(exist_ok=True)
    name, mail = SENDER.removesuffix(">").split(" <")
    (home / ".gitconfig").write_text(f"[user]\n\tname = {name}\n\temail = {mail}\n")
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def send(mails: tuple[Path, ...], folder: Path) -> Path:
    """A mailbox with what git send-email handed to a program in the place of sendmail."""
    folder.mkdir(exist_ok=True)
    mailbox, program = folder / "mbox", folder / "sendmail"
    program.write_text(
        f"#!/bin/sh\n{{ echo 'From x Mon Nov 30 00:00:00 2026'; cat; echo; }} >>{mailbox}\n"
    )
    program.chmod(0o755)
    words = ["git", "send-email", "--quiet", "--confirm=never", f"--smtp-server={program}"]
    run([*words, *mails], folder / "home", folder)
    return mailbox


def test_git_send_email_needs_nothing_more(mails: tuple[Path, ...], tmp_path: Path) -> None:
    assert shutil.which("git-send-email", path=subprocess.getoutput("git --exec-path")), (
        "git-email is not installed"
    )
    words = ["git", "send-email", "--dry-run", "--confirm=never"]
    said = run([*words, *mails], tmp_path / "home", tmp_path)
    assert said.count("Result: OK") == len(mails)
    assert said.count("RCPT TO:<qemu-devel@nongnu.org>") == len(mails)
    assert said.count("RCPT TO:<mst@redhat.com>") == len(mails)
    assert "Which 8bit encoding" not in said


def test_b4_receives_it_and_git_am_gives_the_same_files(
    b4: Path, mails: tuple[Path, ...], tree: Path, conf: Settings, tmp_path: Path
) -> None:
    mailbox = send(mails, tmp_path)
    git = trees.Git(tree)
    commit = git.text("rev-parse", "HEAD")
    got = tmp_path / "got"
    words: list[str | Path] = [b4, "--offline-mode", "am", "--no-cache", "-m", mailbox, "-o", got]
    said = run(words, tmp_path / "home", tree)
    assert f"Total patches: {len(mails) - 1}" in said
    assert f" {commit}\n" in said  # b4 says: git checkout -b ... of the base-commit
    (whole,) = sendcmd.picked(series.load_series(conf.repo / "patches"), "pci-ecam", "qemu")
    trees.apply_patches(git, whole.patches(), "qemu")
    kept = git.text("rev-parse", "HEAD^{tree}")
    git.run("reset", "--quiet", "--hard", commit)
    (mbx,) = got.glob("*.mbx")
    run(["git", "am", "--quiet", mbx], tmp_path / "home", tree)
    assert git.text("rev-parse", "HEAD^{tree}") == kept
    log = git.text(
        "log",
        "--format=%an <%ae>|%(trailers:key=Signed-off-by,valueonly,separator=%x2C)",
        f"{commit}..HEAD",
    )
    assert set(log.splitlines()) == {f"{SENDER}|{SENDER}"}
    assert "Changes in v2" not in git.text("log", "--format=%B", f"{commit}..HEAD")
    assert (
        "Changes in v2:\n- patch 2: a comment (Cédric)\n" in next(got.glob("*.cover")).read_text()
    )
