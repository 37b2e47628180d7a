# SPDX-License-Identifier: GPL-2.0-or-later
"""A bare Debian: whatever the builds and a measurement need must be installed by the scripts.

A machine that people work on has ninja, lz4 and more, and hides what scripts/setup.sh
forgets. So a root file system with next to nothing in it is made for each Debian that the
README names; the main job's builds run in it, and one measurement. What is compiled may come
from this machine's ccache, which looks at each header that the compiler would read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal.core import proc
from nearmetal.core.cache import Cache, remove
from nearmetal.core.settings import Settings
from nearmetal.sources import debian

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.nightly,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes and enters a root file system: needs root"),
]

BARE = "python3,python3-venv,git,sudo,ca-certificates"
"""What is there before the README's commands: git to clone with, and sudo."""

NETWORK = re.compile(r"(?i)^(https?_proxy|no_proxy|all_proxy|pip_\w+|ssl_cert_\w+)$")
"""Variables that say how this machine reaches the network."""

CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")

BUILDS_S = 2.5 * 3600
"""All builds with nothing from ccache, on two CPUs."""


@pytest.fixture(params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest, conf: Settings, cache: Cache) -> Iterator[Path]:
    """The bare root, with a clone of this repository in /nearmetal."""
    suite = request.param
    folder = cache.root / "tmp" / f"bare-{suite}"
    if folder.exists():
        remove(folder)
    sources = cache.root / "tmp" / f"bare-{suite}.sources"
    sources.write_text(debian.sources_text(debian.machine_mirrors(), suite))
    made = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={BARE}"]
    proc.run([*made, suite, folder, sources], deadline_s=1800, tree=True)
    shutil.copy("/etc/resolv.conf", folder / "etc" / "resolv.conf")
    # also the certificate of a proxy that stands between this machine and the network
    if (Path("/") / CERTIFICATES).is_file():
        shutil.copy(Path("/") / CERTIFICATES, folder / CERTIFICATES)
    proc.run(
        ["git", "clone", "-q", "--no-hardlinks", conf.repo, folder / "nearmetal"], deadline_s=300
    )
    (folder / "root" / ".cache" / "nearmetal" / "ccache").mkdir(parents=True)
    yield folder
    remove(folder)


def inside(root: Path, ccache: Path, command: str, deadline_s: float) -> str:
    """Run a shell command in the root, with nothing of this machine's environment."""
    mounts = (
        f"mount --rbind /dev {root}/dev && mount -t proc proc {root}/proc"
        f" && mount -t sysfs sysfs {root}/sys && mount -t tmpfs tmpfs {root}/tmp"
        f" && mount --bind {ccache} {root}/root/.cache/nearmetal/ccache"
    )
    kept = [f"{name}={value}" for name, value in os.environ.items() if NETWORK.match(name)]
    plain = ["HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=dumb", "SSL_CERT_DIR="]
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation=private", "--pid", "--fork"),
            *("--kill-child=KILL", "sh", "-c", f'{mounts} && exec "$@"', "sh"),
            *("chroot", str(root), "env", "-i", *kept, *plain),
            *("sh", "-c", f"cd /nearmetal && {command}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, proc.tail(done.stdout, 40)
    return done.stdout


def test_the_readme_s_command_sets_up_a_bare_machine(root: Path, cache: Cache) -> None:
    ccache = cache.root / "ccache"
    assert "Debian" in inside(root, ccache, "cat /etc/os-release", 60)
    for program in ("ninja", "lz4", "gcc", "make", "pip3"):
        assert not (root / "usr" / "bin" / program).exists(), f"the root is not bare: {program}"
    inside(root, ccache, "scripts/nearmetal build", BUILDS_S)
    said = inside(root, ccache, "scripts/run --variant vanilla --only lspci", 1800)
    assert re.search(r"\b[1-9]\d* (checks )?pass", said), said
