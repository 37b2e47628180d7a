# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree is what its files say, and a folder that is none is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.patches.series import Enable, Series
from nearmetal.upstream import bases, identity
from nearmetal.upstream.validate import Candidate

MAKEFILE = """\
# SPDX-License-Identifier: GPL-2.0
VERSION = 7
PATCHLEVEL = 3
SUBLEVEL = 4
EXTRAVERSION =
NAME = Baby Opossum Posse
"""
LINUX = {"Kbuild": "", "init/main.c": "", "Makefile": MAKEFILE}
QEMU = {"VERSION": "11.1.1\n", "qemu-options.hx": "", "qapi/qapi-schema.json": ""}
BOCHS = {"bochs.h": "", "cpu/cpu.h": "", "configure.ac": 'AC_INIT(bochs.h)\nVERSION="3.0"\n'}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_tree_says_its_version(tmp_path: Path) -> None:
    assert identity.version_in("linux", write(tmp_path / "linux", LINUX)) == "7.3.4"
    assert identity.version_in("qemu", write(tmp_path / "qemu", QEMU)) == "11.1.1"
    assert identity.version_in("testbed-bochs", write(tmp_path / "bochs", BOCHS)) == "3.0"
    rc = MAKEFILE.replace("SUBLEVEL = 4", "SUBLEVEL = 0").replace("VERSION =\n", "VERSION = -rc2\n")
    write(tmp_path / "linux", {"Makefile": rc})
    assert identity.version_in("linux", tmp_path / "linux") == "7.3.0-rc2"


def test_a_tree_that_is_neither_linux_nor_qemu_is_refused(tmp_path: Path) -> None:
    # A boot loader has a Kconfig, a Kbuild and a Makefile with the same lines.
    other = write(tmp_path / "u-boot", {"Kbuild": "", "Kconfig": "", "Makefile": MAKEFILE})
    with pytest.raises(UsageError, match=r"u-boot is not a tree of Linux: it has no init/main\.c"):
        identity.version_in("linux", other)
    with pytest.raises(UsageError, match="is not a tree of QEMU: it has no VERSION"):
        identity.version_in("qemu", other)


@pytest.mark.parametrize("makefile", ["", "VERSION =\nPATCHLEVEL = 3\n", "VERSION = 7\n"])
def test_a_tree_without_a_version_is_refused(tmp_path: Path, makefile: str) -> None:
    with pytest.raises(UsageError, match="does not say which version of Linux"):
        identity.version_in("linux", write(tmp_path, {**LINUX, "Makefile": makefile}))
    with pytest.raises(UsageError, match="does not say which version of QEMU"):
        identity.version_in("qemu", write(tmp_path, {**QEMU, "VERSION": "newest\n"}))


def test_a_range_holds_its_own_versions_only() -> None:
    for version in ("7.3", "7.3.4", "7.3.0-rc2", "7.3-rc1"):
        assert identity.fits(version, "7.3")
    for version in ("7.30", "7.30.1", "6.7.3", "17.3"):
        assert not identity.fits(version, "7.3")


@pytest.mark.parametrize(("given", "severity"), [(False, "error"), (True, "note")])
def test_a_series_for_another_version_is_told(tmp_path: Path, given: bool, severity: str) -> None:
    ours = Candidate(Series("one", "linux", 1, "99.9", "", (), Enable(), tmp_path))
    others = Candidate(Series("two", "linux", 1, "", "", (), Enable(), tmp_path), ours=False)
    (found,) = bases._versions([ours, others], "linux", "7.3.4", given=given)
    assert (found.series, found.rule, found.severity) == ("linux/one", "base", severity)
    assert found.text == "series.yaml says its base is 99.9, the sources are 7.3.4"
    assert bases._versions([ours], "linux", "99.9.1", given=given) == []
