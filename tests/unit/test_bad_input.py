# SPDX-License-Identifier: GPL-2.0-or-later
"""Series of others with one fault each: the check that is meant for it says so, and no other.

The tree is a toy with two files, the compilers are real. What needs the real kernel or QEMU is
in tests/testbed/test_validate_faults.py; interfaces without documentation or tests are in
test_form.py, trees that are none in test_identity.py.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearmetal.cli import main as cli
from nearmetal.core import proc
from nearmetal.core.errors import UsageError
from nearmetal.patches.series import TREES
from nearmetal.upstream import form, validate
from nearmetal.upstream.validate import Base, Diagnostic, Touched

CHECKPATCH = r"""#!/usr/bin/perl
my $file = $ARGV[-1];
open(my $in, '<', $file) or die;
while (<$in>) {
    print "$file:$.: ERROR:TRAILING_WHITESPACE: trailing whitespace\n" if /^\+.*[ \t]$/;
}
exit 0;
"""
HEADER = "#include <stddef.h>\nint toy_read(const int *value);\n"
SOURCE = '#include "toy.h"\n\nint toy_read(const int *value)\n{\n\treturn *value;\n}\n'
FILES = {"scripts/checkpatch.pl": CHECKPATCH, "toy.h": HEADER, "toy.c": SOURCE}
GCC = ("gcc", "-fsyntax-only", "-Wall", "-Wmissing-prototypes")
SPARSE = ("sparse",)


@dataclass(frozen=True)
class Compiler:
    """Runs a compiler over touched sources, one at a time."""

    words: tuple[str, ...] = GCC

    def with_options(self, fragments: Sequence[Path]) -> Compiler:
        return self

    def key(self) -> str:
        return " ".join(self.words)

    def lost_options(self, build: Path) -> tuple[str, ...]:
        return ()

    def configure(self, source: Path, build: Path) -> None:
        build.mkdir(parents=True, exist_ok=True)

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        return tuple(one.path for one in touched if one.path.endswith(".c"))

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        said = ""
        for name in targets:
            if (source / name).is_file():
                environment = validate.BUILD_ENVIRONMENT
                done = proc.run(
                    [*self.words, source / name], deadline_s=60, env=environment, check=False
                )
                said += done.stdout + done.stderr
        return validate.parse_build(said, source, build)


def write_series(folder: Path, *states: Mapping[str, str]) -> Path:
    """A folder with a patch from each state of the files to the next, as a stranger sends it."""
    folder.mkdir()
    before = dict(FILES)
    for number, state in enumerate(states, 1):
        text = "From: A Stranger <a@example.org>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n"
        text += f"Subject: [PATCH] toy: Change {number}\n\nIt has to be.\n\n"
        text += "Signed-off-by: A Stranger <a@example.org>\n---\n"
        for name, new in state.items():
            text += diff(name, before.get(name), new)
        (folder / f"{number:04}-change.patch").write_text(text)
        before.update(state)
    return folder


def diff(name: str, old: str | None, new: str) -> str:
    head = f"diff --git a/{name} b/{name}\n"
    head += "new file mode 100644\n" if old is None else ""
    lines = difflib.unified_diff(
        (old or "").splitlines(keepends=True),
        new.splitlines(keepends=True),
        "/dev/null" if old is None else f"a/{name}",
        f"b/{name}",
    )
    return head + "".join(lines)


def errors(folder: Path, patches: Path, words: tuple[str, ...] = GCC) -> list[tuple[str, ...]]:
    """What a whole validation finds: patch, rule, text."""
    sources = folder / "sources"
    for name, text in FILES.items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(text)
    candidates, found = validate.find_candidates(patches, tree="linux")
    base = Base("linux", sources, "7.3.4", None, Compiler(words))
    found = (*found, *form.check_form(candidates))
    found = (*found, *validate.validate(candidates, {"linux": base}, folder / "scratch"))
    return [(one.patch[:4], one.rule, one.text) for one in found if one.severity == "error"]


def test_a_good_series_of_others_passes(tmp_path: Path) -> None:
    good = SOURCE + "\nint toy_twice(const int *value)\n{\n\treturn 2 * *value;\n}\n"
    header = HEADER + "int toy_twice(const int *value);\n"
    patches = write_series(tmp_path / "mail", {"toy.c": good, "toy.h": header})
    assert errors(tmp_path, patches) == []


def test_trailing_whitespace(tmp_path: Path) -> None:
    bad = SOURCE.replace("\treturn *value;\n", "\treturn *value; \n")
    ((patch, rule, text),) = errors(tmp_path, write_series(tmp_path / "mail", {"toy.c": bad}))
    assert (patch, rule) == ("0001", "checkpatch")
    assert "TRAILING_WHITESPACE" in text


def test_a_patch_that_builds_only_with_its_successor(tmp_path: Path) -> None:
    early = SOURCE.replace('"toy.h"', '"toy.h"\n#include "later.h"')
    patches = write_series(
        tmp_path / "mail", {"toy.c": early}, {"later.h": "/* SPDX-License-Identifier: x */\n"}
    )
    ((patch, rule, text),) = errors(tmp_path, patches)
    assert (patch, rule) == ("0001", "build")
    assert text == "toy.c:2: error: later.h: No such file or directory"


def test_a_function_without_a_prototype(tmp_path: Path) -> None:
    bad = SOURCE + "\nint toy_twice(const int *value)\n{\n\treturn 2 * *value;\n}\n"
    ((patch, rule, text),) = errors(tmp_path, write_series(tmp_path / "mail", {"toy.c": bad}))
    assert (patch, rule) == ("0001", "build")
    assert text == (
        "toy.c:8: new warning: no previous prototype for 'toy_twice' [-Wmissing-prototypes]"
    )


@pytest.mark.skipif(shutil.which("sparse") is None, reason="the package sparse is not installed")
def test_a_pointer_that_is_compared_with_0(tmp_path: Path) -> None:
    bad = SOURCE.replace("\treturn *value;\n", "\treturn value == 0 ? 0 : *value;\n")
    patches = write_series(tmp_path / "mail", {"toy.c": bad})
    assert errors(tmp_path, patches) == []  # gcc has nothing against it
    ((patch, rule, text),) = errors(tmp_path, patches, SPARSE)
    assert (patch, rule) == ("0001", "build")
    assert text == "toy.c:5: new warning: Using plain integer as NULL pointer"


def test_an_undocumented_ioctl_and_a_missing_selftest(tmp_path: Path) -> None:
    uapi = "/* SPDX-License-Identifier: x */\n#define TOY_GET _IOR('t', 1, int)\n"
    selftest = "/* SPDX-License-Identifier: x */\nint get = TOY_GET;\n"
    name = "tools/testing/selftests/toy.c"
    header = {"include/uapi/linux/toy.h": uapi}
    alone = write_series(tmp_path / "alone", header)
    assert [rule for _, rule, _ in errors(tmp_path, alone)] == ["documentation", "test"]
    tested = write_series(tmp_path / "tested", {**header, name: selftest})
    assert ("0001", "documentation") in [found[:2] for found in errors(tmp_path, tested)]


def test_a_tree_that_is_none_is_refused_by_name() -> None:
    assert "bsd" not in TREES
    with pytest.raises(UsageError, match="invalid choice: 'bsd'"):
        cli.parser().parse_args(["validate", "--patches", ".", "--tree", "bsd"])


def test_a_tree_without_checkpatch_is_an_error(tmp_path: Path) -> None:
    patches = write_series(tmp_path / "mail", {"toy.c": SOURCE + "\n/* The end. */\n"})
    candidates, _ = validate.find_candidates(patches, tree="linux")
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "toy.c").write_text(SOURCE)
    base = Base("linux", sources, "7.3.4", None, Compiler())
    found = validate.validate(candidates, {"linux": base}, tmp_path / "scratch")
    assert [(one.rule, one.text) for one in found if one.severity == "error"] == [
        ("checkpatch", "linux 7.3.4 has no scripts/checkpatch.pl")
    ]
