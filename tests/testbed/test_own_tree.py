# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel developer's loop: an edit, make, and what the harness says of it, in two minutes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nearmetal.core import proc
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.sources.archive import obtain

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

FIGURE_S = 120.0
"""From the end of the user's make to the verdict, all else warm."""
EDITED = "arch/x86/kvm/x86.c"
ANCHOR = "int kvm_x86_vendor_init("
"""The function that each module of KVM's calls when it is loaded."""
ONLY = ("--only", "vmexit", "--variant", "vanilla")


def nearmetal(conf: Settings, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nearmetal", str(words[0])]
    line += ["--cache-dir", str(conf.cache_dir), "--results-dir", str(conf.results_dir)]
    return subprocess.run(
        [*line, *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class Mine:
    """A tree of the user's and a build folder beside it."""

    def __init__(self, conf: Settings, cache: Cache, folder: Path) -> None:
        self.tree, self.out = folder / "linux", folder / "build"
        self.conf, self.cache, self.folder = conf, cache, folder
        proc.run(["cp", "-a", obtain(conf, cache, "linux").folder, self.tree], deadline_s=1200)
        self.out.mkdir()
        fragment = conf.repo / "guest-images" / "kernel" / "base.config"
        self._make("allnoconfig", env={"KCONFIG_ALLCONFIG": str(fragment)})
        self.edit("first")
        self.make()

    def edit(self, word: str) -> None:
        """Have KVM say a word when it is loaded."""
        path = self.tree / EDITED
        lines = path.read_text().splitlines(keepends=True)
        begin = next(
            number
            for number, line in enumerate(lines)
            if line.startswith(ANCHOR) and not line.rstrip().endswith(";")
        )
        brace = next(number for number in range(begin, begin + 9) if lines[number].rstrip() == "{")
        end = next(n for n in range(brace, brace + 99) if lines[n].startswith("}"))
        lines = [
            line
            for number, line in enumerate(lines)
            if not (brace < number < end and "nearmetal-loop:" in line)
        ]
        # behind the declarations, which the kernel's compilers want first
        first = next(number for number in range(brace + 1, brace + 99) if not lines[number].strip())
        lines.insert(first + 1, f'\tpr_err("nearmetal-loop: {word}\\n");\n')
        path.write_text("".join(lines))

    def make(self) -> None:
        """As the user does."""
        self._make(f"-j{os.cpu_count() or 2}", "bzImage", "modules")

    def _make(self, *words: str, env: Mapping[str, str] | None = None) -> None:
        line = ["make", "-s", "-C", str(self.tree), f"O={self.out}", "CC=ccache gcc"]
        ours = {"CCACHE_DIR": str(self.cache.root / "ccache"), "CCACHE_NOHASHDIR": "1"}
        ours |= {"CCACHE_BASEDIR": str(self.folder), "KBUILD_BUILD_TIMESTAMP": "1970-01-01"}
        proc.run([*line, *words], deadline_s=7200, env={**ours, **(env or {})}, tree=True)


@pytest.fixture(scope="module")
def mine(conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mine]:
    yield Mine(conf, cache, tmp_path_factory.mktemp("mine"))


def said(conf: Settings) -> str:
    """The console of the last run's host."""
    return (conf.results_dir / "latest" / "logs" / "host-console.log").read_text()


def test_the_figure(conf: Settings, mine: Mine) -> None:
    """An edit in KVM is in the host's log, and the verdict is there in two minutes."""
    build = ("--host-kernel", mine.out, "--guest-kernel", mine.out)
    warm = nearmetal(conf, "run", *ONLY, *build)
    assert warm.returncode == 0, warm.stderr[-4000:]
    assert "nearmetal-loop: first" in said(conf)
    mine.edit("second")
    mine.make()
    begun = time.monotonic()
    done = nearmetal(conf, "run", *ONLY, *build)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr[-4000:]
    assert "nearmetal-loop: second" in said(conf)
    assert "nearmetal-loop: first" not in said(conf)
    print(f"{seconds:.0f} s from the end of make to the verdict")
    assert seconds <= FIGURE_S


def test_a_tree_is_built_once_and_then_incrementally(conf: Settings, mine: Mine) -> None:
    mine.edit("third")
    first = nearmetal(conf, "boot", "--linux-tree", mine.tree, "--", "uname", "-r")
    assert first.returncode == 0, first.stderr[-4000:]
    assert first.stdout.startswith("7.")
    mine.edit("fourth")
    begun = time.monotonic()
    words = ("boot", "--no-guest", "--linux-tree", mine.tree)
    done = nearmetal(conf, *words, "--", "modprobe kvm_amd; dmesg | grep nearmetal-loop; exit 9")
    print(f"{time.monotonic() - begun:.0f} s from an edit to the end of a command on its host")
    assert done.returncode == 9, done.stderr[-4000:]
    assert "nearmetal-loop: fourth" in done.stdout
    assert not (mine.tree / ".config").exists()


def test_a_missing_option_is_named(conf: Settings, mine: Mine) -> None:
    config = mine.out / ".config"
    whole = config.read_text()
    config.write_text(whole.replace("CONFIG_HIST_TRIGGERS=y", "# CONFIG_HIST_TRIGGERS is not set"))
    try:
        done = nearmetal(conf, "boot", "--host-kernel", mine.out, "--", "true")
    finally:
        config.write_text(whole)
    assert done.returncode == 2
    assert "lacks CONFIG_HIST_TRIGGERS=y" in done.stderr
