# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches are held to what a maintainer asks, and what is said about them is true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nearmetal.cli.main import main
from nearmetal.core.errors import Exit, UsageError
from nearmetal.patches.series import Enable, Series, load_series
from nearmetal.upstream import findings, trees, validate
from nearmetal.upstream.validate import Base, Candidate, Diagnostic, Finding, Remark, Touched

DATA = Path(__file__).parent / "data" / "validate"
SOURCE = Path("/scratch/source")
BUILD = Path("/scratch/build")


def recorded(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


# -- checkpatch


def test_the_remarks_of_linux_s_checkpatch_are_read() -> None:
    remarks = validate.parse_checkpatch(recorded("checkpatch-linux.txt"))
    assert remarks == (
        Remark(26, "ERROR", "CODE_INDENT", "code indent should use tabs where possible"),
        Remark(26, "WARNING", "LEADING_SPACE", "please, no spaces at the start of a line"),
        Remark(26, "WARNING", "SPACING", "space prohibited before semicolon"),
        Remark(
            33,
            "WARNING",
            "FILE_PATH_CHANGES",
            "added, moved or deleted file(s), does MAINTAINERS need updating?",
        ),
        Remark(
            38,
            "WARNING",
            "SPDX_LICENSE_TAG",
            "Missing or malformed SPDX-License-Identifier tag in line 1",
        ),
        Remark(38, "ERROR", "MISSING_SIGN_OFF", "Missing Signed-off-by: line(s)"),
    )


def test_the_remarks_of_qemu_s_checkpatch_are_read() -> None:
    remarks = validate.parse_checkpatch(recorded("checkpatch-qemu.txt"))
    assert remarks == (
        Remark(21, "ERROR", "", "code indent should never use tabs"),
        Remark(27, "ERROR", "", "Missing Signed-off-by: line(s)"),
    )


def test_a_missing_sign_off_and_the_maintainers_hint_are_told_and_do_not_fail() -> None:
    remarks = validate.parse_checkpatch(recorded("checkpatch-linux.txt"))
    findings = validate.judge_checkpatch("s", "p", remarks)
    assert [(one.rule, one.severity) for one in findings] == [
        ("checkpatch", "error"),
        ("checkpatch", "error"),
        ("checkpatch", "error"),
        ("maintainers", "note"),
        ("checkpatch", "error"),
        ("sign-off", "note"),
    ]
    assert findings[0].text == (
        "line 26: ERROR CODE_INDENT code indent should use tabs where possible"
    )


# -- builds


def test_the_complaints_of_a_kernel_build_are_read() -> None:
    found = validate.parse_build(recorded("build-linux.txt"), SOURCE, BUILD)
    assert [(one.file, one.kind, one.text) for one in found] == [
        (
            "drivers/pci/p2pdma.c",
            "warning",
            "no previous prototype for 'toy_probe' [-Wmissing-prototypes]",
        ),
        ("drivers/pci/p2pdma.c", "warning", "unused variable 'unused' [-Wunused-variable]"),
        (
            "drivers/pci/p2pdma.c",
            "warning",
            "function parameter 'b' not described in 'toy_probe'",
        ),
        (
            "drivers/pci/p2pdma.c",
            "warning",
            "Excess function parameter 'a' description in 'toy_probe'",
        ),
    ]


def test_the_complaints_of_a_qemu_build_are_read_once() -> None:
    found = validate.parse_build(recorded("build-qemu.txt"), SOURCE, BUILD)
    # The header's error is repeated by every object, and ninja repeats each as FAILED.
    assert found == (
        Diagnostic("include/hw/pci/pcie_port.h", 29, "error", "unknown type name 'uint8_x'"),
        Diagnostic(
            "hw/pci/pcie_port.c",
            109,
            "warning",
            "no previous prototype for 'toy_probe' [-Wmissing-prototypes]",
        ),
        Diagnostic(
            "hw/pci/pcie_port.c",
            111,
            "warning",
            "unused variable 'unused' [-Wunused-variable]",
        ),
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("make[2]: *** No rule to make target 'x.o', needed by 'y'.  Stop.", "No rule to make"),
        ("ninja: error: unknown target 'x.o'", "unknown target 'x.o'"),
        ("FAILED: [code=1] libcommon.a.p/x.c.o", "libcommon.a.p/x.c.o"),
        ('../meson.build:12:3: ERROR: Unknown variable "x".', "Unknown variable"),
    ],
)
def test_a_tool_that_fails_without_a_compiler_s_error_is_an_error(line: str, text: str) -> None:
    (found,) = validate.parse_build(f"{line}\n", SOURCE, BUILD)
    assert found.kind == "error"
    assert text in found.text


def test_the_echo_of_an_error_is_not_another_one() -> None:
    output = (
        "../source/a.c:3:1: error: unknown type name 'x'\n"
        "make[3]: *** [/scratch/source/scripts/Makefile.build:290: a.o] Error 1\n"
        "make: *** [Makefile:248: __sub-make] Error 2\n"
    )
    assert validate.parse_build(output, SOURCE, BUILD) == (
        Diagnostic("a.c", 3, "error", "unknown type name 'x'"),
    )


def test_what_no_compiler_said_is_told_with_what_came_before() -> None:
    output = (
        "  CC      a.o\n"
        "ccache: error: no space left\n"
        "make[4]: *** [../source/scripts/Makefile.build:290: a.o] Error 1\n"
        "make[4]: *** Deleting file 'a.o'\n"
    )
    (found,) = validate.parse_build(output, SOURCE, BUILD)
    assert found.text == "Deleting file 'a.o' after: ccache: error: no space left"


def test_objtool_and_kernel_doc_are_heard() -> None:
    output = (
        "arch/x86/kvm/x86.o: warning: objtool: f+0x12: unreachable instruction\n"
        "Warning: ../source/drivers/pci/p2pdma.c:40 function parameter 'b' not described\n"
    )
    assert [(one.file, one.line) for one in validate.parse_build(output, SOURCE, BUILD)] == [
        ("arch/x86/kvm/x86.o", 0),
        ("drivers/pci/p2pdma.c", 40),
    ]


def test_only_new_complaints_count() -> None:
    old = Diagnostic("a.c", 10, "warning", "unused variable 'x'")
    moved = Diagnostic("a.c", 17, "warning", "unused variable 'x'")
    again = Diagnostic("a.c", 90, "warning", "unused variable 'x'")
    worse = Diagnostic("a.c", 17, "error", "unused variable 'x'")
    assert validate.new_diagnostics([old], [moved]) == ()
    assert validate.new_diagnostics([old], [moved, again]) == (again,)
    assert validate.new_diagnostics([old], [worse]) == (worse,)
    assert validate.new_diagnostics([old], []) == ()


# -- targets


def test_the_objects_of_linux() -> None:
    def targets(*paths: str) -> tuple[str, ...]:
        return validate.linux_targets([Touched(path) for path in paths])

    assert targets("drivers/pci/pci.c", "arch/x86/kvm/vmx/vmenter.S") == (
        "drivers/pci/pci.o",
        "arch/x86/kvm/vmx/vmenter.o",
    )
    assert targets("virt/kvm/kvm_main.c") == ("arch/x86/kvm/",)
    assert targets("arch/x86/kvm/pmu.h", "arch/x86/kvm/x86.c") == ("arch/x86/kvm/",)
    assert targets("include/linux/vfio.h") == ("drivers/vfio/",)
    assert targets("include/uapi/linux/kvm.h") == ("arch/x86/kvm/",)
    assert targets("include/linux/pci.h") == ("drivers/pci/", "drivers/vfio/")
    assert targets("arch/x86/include/asm/pci_x86.h") == ("arch/x86/pci/",)
    assert targets("include/linux/mm.h") == ("arch/x86/kvm/", "drivers/vfio/", "drivers/pci/")
    assert targets("tools/testing/selftests/kvm/x.c", "Documentation/x.rst", "MAINTAINERS") == ()
    assert targets("arch/arm64/kvm/arm.c") == ()
    assert validate.linux_targets([Touched("drivers/pci/gone.c", deleted=True)]) == ()


def test_the_objects_of_qemu() -> None:
    objects = {
        "hw/pci/pci.c": ["a.p/hw_pci_pci.c.o"],
        "hw/vfio/pci.c": ["t.p/hw_vfio_pci.c.o"],
        "hw/net/e1000.c": ["a.p/e1000.c.o"],
    }
    includers = {"include/hw/pci/pci.h": ["hw/net/e1000.c", "hw/vfio/pci.c", "hw/arm/not.c"]}
    touched = [Touched("hw/vfio/pci.c"), Touched("include/hw/pci/pci.h"), Touched("docs/x.rst")]
    assert validate.qemu_targets(touched, objects, includers) == (
        "t.p/hw_vfio_pci.c.o",
        "a.p/e1000.c.o",
    )


def test_of_a_header_that_many_include_the_nearest_objects_are_built() -> None:
    files = [f"hw/net/n{number:03}.c" for number in range(90)] + ["hw/vfio/pci.c"]
    objects = {name: [f"{name}.o"] for name in files}
    touched = [Touched("include/hw/pci/pci.h"), Touched("hw/vfio/pci.h")]
    found = validate.qemu_targets(touched, objects, {"include/hw/pci/pci.h": files})
    assert len(found) == 40
    assert found[0] == "hw/vfio/pci.c.o"


# -- a patch's own text


PATCH = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: A Developer <dev@example.org>
Date: Wed, 4 Mar 2026 05:06:07 +0000
Subject: [PATCH] kvm: Do a thing with a subject that is so long that git folds
 it

It was not done.

---
 x.c | 2 ++
 1 file changed, 2 insertions(+)

diff --git a/kvm/new.c b/kvm/new.c
new file mode 100644
index 0000000..1111111
--- /dev/null
+++ b/kvm/new.c
@@ -0,0 +1,2 @@
+/* SPDX-License-Identifier: GPL-2.0-only */
+int x;
diff --git a/kvm/old.c b/kvm/old.c
deleted file mode 100644
index 1111111..0000000
--- a/kvm/old.c
+++ /dev/null
@@ -1,2 +0,0 @@
-diff --git a/fake b/fake
--- a/also-fake
diff --git a/kvm/a.h b/kvm/b.h
similarity index 90%
rename from kvm/a.h
rename to kvm/b.h
"""


def test_the_touched_files_of_a_patch() -> None:
    assert validate.touched_files(PATCH) == (
        Touched("kvm/new.c", new=True),
        Touched("kvm/old.c", deleted=True),
        Touched("kvm/b.h"),
    )


def make_series(folder: Path, tree: str = "linux", order: int = 1) -> Series:
    return Series(folder.name, "linux", order, "7.3", "x", (), Enable(), folder)


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("From: A Developer <dev@example.org>\n", "", "author"),
        ("<dev@example.org>", "dev", "author"),
        ("Subject: [PATCH] kvm", "Subject: kvm", "subject"),
        ("It was not done.\n\n", "", "changelog"),
        ("done.\n\n", "done.\n\nSigned-off-by: A <a@b.c>\n", "sign-off"),
        ("+/* SPDX-License-Identifier: GPL-2.0-only */", "+/* no licence */", "spdx"),
    ],
)
def test_what_a_patch_lacks_is_an_error(tmp_path: Path, old: str, new: str, rule: str) -> None:
    path = tmp_path / "0001-x.patch"
    candidate = Candidate(make_series(tmp_path))
    path.write_text(PATCH)
    assert [(one.rule, one.severity) for one in validate.check_text(candidate, path)] == [
        ("sign-off", "note")
    ]
    assert old in PATCH
    path.write_text(PATCH.replace(old, new, 1))
    errors = [one for one in validate.check_text(candidate, path) if one.severity == "error"]
    assert [one.rule for one in errors] == [rule]


def test_patches_of_others_may_be_signed_off(tmp_path: Path) -> None:
    path = tmp_path / "0001-x.patch"
    path.write_text(PATCH.replace("done.\n\n", "done.\n\nSigned-off-by: A <a@b.c>\n"))
    assert validate.check_text(Candidate(make_series(tmp_path), ours=False), path) == ()


# -- a whole validation, of a small tree


CHECKPATCH = r"""#!/usr/bin/perl
my $file = $ARGV[-1];
open(my $in, '<', $file) or die;
my $bad = 0;
while (<$in>) { if (/^\+.*UGLY/) { print "$file:$.: WARNING:UGLY: do not\n"; $bad = 1; } }
print "$file:9: ERROR:MISSING_SIGN_OFF: Missing Signed-off-by: line(s)\n";
exit 1;
"""


@dataclass
class Grep:
    """A compiler that warns of WARN and fails at FAIL; what it was asked is kept.

    Of the lines in the options' files it takes those with =y, and it warns of each one in a file
    that holds MENTION.
    """

    asked: list[tuple[str, ...]] = field(default_factory=list)
    options: tuple[Path, ...] = ()

    def with_options(self, fragments: Sequence[Path]) -> Grep:
        return Grep(self.asked, tuple(fragments))

    def lines(self) -> list[str]:
        return [line for path in self.options for line in path.read_text().splitlines()]

    def key(self) -> str:
        return " ".join(self.lines())

    def lost_options(self, build: Path) -> tuple[str, ...]:
        return tuple(line for line in self.lines() if not line.endswith("=y"))

    def configure(self, source: Path, build: Path) -> None:
        build.mkdir(parents=True, exist_ok=True)

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        return tuple(one.path for one in touched if one.path.endswith(".c") and not one.deleted)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        self.asked.append(tuple(targets))
        lines = []
        for target in targets:
            if not (source / target).is_file():
                continue
            for number, line in enumerate((source / target).read_text().splitlines(), 1):
                if "MENTION" in line:
                    said = " ".join(self.lines()) or "no option"
                    lines.append(f"{source / target}:{number}:1: warning: {said}")
                for mark, kind in (("WARN", "warning"), ("FAIL", "error")):
                    if mark in line:
                        lines.append(f"{source / target}:{number}:1: {kind}: {line}")
        return validate.parse_build("\n".join(lines), source, build)


@dataclass
class World:
    """A base, a folder of series, and a way to write series."""

    root: Path
    build: Grep = field(default_factory=Grep)

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    def write(
        self,
        contents: Mapping[str, Sequence[tuple[str, str]]],
        requires: Mapping[str, str] | None = None,
    ) -> None:
        """Series by name: each patch is (file, the line to append to it).

        ``requires`` are requirements by series, in YAML: such a one is written on top of the
        series before it.
        """
        requires = requires or {}
        entries: list[str] = []
        for order, (name, changes) in enumerate(contents.items(), 1):
            tree = self.root / "author"
            shutil.rmtree(tree, ignore_errors=True)
            before = load_series(self.patches) if name in requires else ()
            trees.tree_checkout("linux", self.root / "sources", "7.3.4", before, tree)
            git = trees.Git(tree)
            trees.tree_new_series(tree, name, "x: A series")
            for number, (file, line) in enumerate(changes):
                path = tree / file
                old = path.read_text() if path.exists() else "// SPDX-License-Identifier: x\n"
                path.write_text(f"{old}{line}\n")
                git.run("add", "--all")
                git.run("commit", "--quiet", "-m", f"x: Change {number}\n\nIt has to be.")
            trees.tree_export(tree, self.patches, [])
            with (self.patches / "linux" / name / "cover.txt").open("a") as cover:
                cover.write("\nWhat it is for.\n")
            needs = f", requires: {requires[name]}" if name in requires else ""
            entries.append(
                f"  - {{name: {name}, tree: linux, order: {order}, base: '7.3', purpose: x"
                f"{needs}}}\n"
            )
            (self.patches / "series.yaml").write_text("series:\n" + "".join(entries))

    def validate(self, *, quick: bool = True, build: bool = True) -> list[tuple[str, ...]]:
        candidates, found = validate.find_candidates(self.patches)
        base = Base("linux", self.root / "sources", "7.3.4", None, self.build if build else None)
        found = (
            *found,
            *validate.validate(candidates, {"linux": base}, self.root / "scratch", quick=quick),
        )
        return [(one.series, one.patch[:4], one.rule, one.text) for one in found if is_error(one)]


def is_error(finding: Finding) -> bool:
    return finding.severity == "error"


@pytest.fixture
def world(tmp_path: Path) -> World:
    sources = tmp_path / "sources"
    (sources / "scripts").mkdir(parents=True)
    (sources / "scripts/checkpatch.pl").write_text(CHECKPATCH)
    (sources / "a.c").write_text("int a;\nWARN old\n")
    (sources / "b.c").write_text("int b;\n")
    return World(tmp_path)


def test_good_series_pass_and_every_patch_is_built(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("b.c", "int y;")], "two": [("new.c", "int z;")]})
    assert world.validate() == []
    # Each patch's parent and the patch, each with the patch's own objects.
    assert world.build.asked == [("a.c",)] * 2 + [("b.c",)] * 2 + [("new.c",)] * 2
    assert world.validate(quick=False) == []
    assert world.build.asked[-2:] == [("a.c", "b.c", "new.c")] * 2


def test_new_warnings_and_errors_are_found_in_the_patch_that_brings_them(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("b.c", "WARN new"), ("a.c", "FAIL new")]})
    assert world.validate() == [
        ("linux/one", "0002", "build", "b.c:2: new warning: WARN new"),
        ("linux/one", "0003", "build", "a.c:4: error: FAIL new"),
    ]


def test_checkpatch_s_remark_fails(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("b.c", "int UGLY;")]})
    ((series, patch, rule, text),) = world.validate()
    assert (series, patch, rule) == ("linux/one", "0002", "checkpatch")
    assert "WARNING UGLY do not" in text


def test_series_that_only_apply_alone_are_found(world: World) -> None:
    world.write({"one": [("b.c", "int x;")], "two": [("b.c", "int y;")]})
    ((series, patch, rule, text),) = world.validate()
    assert (series, patch, rule) == ("linux/two", "0001", "stacked")
    assert "b.c" in text


def test_a_series_stands_on_the_patches_that_it_requires(world: World) -> None:
    contents = {"one": [("b.c", "int x;"), ("a.c", "int z;")], "two": [("b.c", "int y;")]}
    world.write(contents, {"two": "{one: 1}"})
    assert world.validate() == []
    # Its one patch is built, and not again what it stands on: the base, one's first patch, it.
    assert world.build.asked.count(("b.c",)) == 3
    text = (world.patches / "series.yaml").read_text()
    (world.patches / "series.yaml").write_text(text.replace(", requires: {one: 1}", ""))
    ((series, patch, rule, _),) = world.validate()
    assert (series, patch, rule) == ("linux/two", "0001", "applies")


def test_what_is_required_and_does_not_apply_is_an_error_of_its_own(world: World) -> None:
    contents = {"one": [("b.c", "int x;")], "two": [("a.c", "int y;")]}
    world.write(contents, {"two": "{one: all}"})
    (patch,) = (world.patches / "linux/one").glob("*.patch")
    patch.write_text(patch.read_text().replace(" int b;", " int c;"))
    found = [one for one in world.validate() if one[0] == "linux/two"]
    assert [(rule, text[:42]) for _, _, rule, text in found] == [
        ("requires", "one/0001-x-Change-0.patch, which it requir")
    ]


def test_a_series_is_built_with_its_own_options_and_with_those_that_it_requires(
    world: World,
) -> None:
    contents = {
        "one": [("a.c", "int x;")],
        "two": [("b.c", "MENTION")],
        "six": [("c.c", "MENTION")],
    }
    world.write(contents, {"two": "{one: 1}"})
    for name in ("one", "two"):
        (world.patches / "linux" / name / "kernel.config").write_text(f"CONFIG_{name}=y\n")
    assert [(series, text) for series, _, _, text in world.validate()] == [
        ("linux/two", "b.c:2: new warning: CONFIG_one=y CONFIG_two=y"),
        ("linux/six", "c.c:2: new warning: no option"),
    ]


def test_an_option_that_the_configuration_does_not_take_is_found(world: World) -> None:
    world.write({"one": [("a.c", "int x;")], "two": [("b.c", "int y;")]})
    (world.patches / "linux/two/kernel.config").write_text("CONFIG_A=y\nCONFIG_B=m\n")
    assert world.validate() == [
        ("linux/two", "", "kernel.config", "the configuration drops CONFIG_B=m")
    ]


def test_a_patch_that_does_not_apply_to_the_base_is_found(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("b.c", "int y;"), ("a.c", "int z;")]})
    _, second, _ = sorted((world.patches / "linux/one").glob("*.patch"))
    second.write_text(second.read_text().replace(" int b;", " int c;"))
    ((series, patch, rule, text),) = world.validate()
    assert (series, patch, rule) == ("linux/one", "0002", "applies")
    assert "does not apply to linux 7.3.4: patch failed: b.c:1" in text
    # What comes before it is built all the same.
    assert world.build.asked == [("a.c",)] * 2


def test_fuzz_is_not_forgiven(world: World) -> None:
    lines = "".join(f"int v{number};\n" for number in range(9))
    (world.root / "sources/b.c").write_text(lines)
    world.write({"one": [("b.c", "int x;")]})
    (patch,) = (world.patches / "linux/one").glob("*.patch")
    patch.write_text(patch.read_text().replace(" int v6;", " int w6;"))
    assert [finding[2] for finding in world.validate()] == ["applies"]


def test_a_killed_validation_does_not_spoil_the_next(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("new.c", "int y;")]})
    assert world.validate() == []
    shutil.rmtree(world.root / "scratch/results")
    source = world.root / "scratch/linux/src"
    trees.Git(source).run("reset", "--quiet", "--hard", trees.BASE_TAG)
    (source / ".git/index.lock").write_text("")
    (source / ".git/rebase-apply").mkdir()
    (source / "a.c").write_text("WARN left\n")
    (source / "new.c").write_text("FAIL left\n")
    assert world.validate() == []


def test_a_second_validation_builds_from_the_changed_patch_on(world: World) -> None:
    files = ("a.c", "b.c", "c.c", "d.c")
    world.write({"one": [(file, "int x;") for file in files]})
    assert world.validate() == []
    world.build.asked.clear()
    assert world.validate() == []
    assert world.build.asked == []
    third = sorted((world.patches / "linux/one").glob("*.patch"))[2]
    third.write_text(third.read_text().replace("+int x;", "+WARN x;"))
    assert [(patch, text) for _, patch, _, text in world.validate()] == [
        ("0003", "c.c:2: new warning: WARN x;")
    ]
    # The fourth one stands on the third: both of its sides are other trees now.
    assert world.build.asked == [("c.c",), ("d.c",), ("d.c",)]


def test_errors_are_not_kept(world: World) -> None:
    world.write({"one": [("b.c", "FAIL x")]})
    assert [rule for _, _, rule, _ in world.validate()] == ["build"]
    world.build.asked.clear()
    assert [rule for _, _, rule, _ in world.validate()] == ["build"]
    assert world.build.asked == [("b.c",)]


def test_another_configuration_is_built_again(world: World) -> None:
    world.write({"one": [("b.c", "MENTION")]})
    assert len(world.validate()) == 1
    (world.patches / "linux/one/kernel.config").write_text("CONFIG_A=y\n")
    assert [text for _, _, _, text in world.validate()] == ["b.c:2: new warning: CONFIG_A=y"]


def test_another_base_makes_another_work_tree(world: World) -> None:
    world.write({"one": [("a.c", "int x;")]})
    assert world.validate() == []
    repository = world.root / "base.git"
    (world.root / "sources/a.c").write_text("int something_else;\n")
    trees.make_base_repository(world.root / "sources", "linux", "7.3.5", repository)
    candidates, _ = validate.find_candidates(world.patches)
    base = Base("linux", world.root / "sources", "7.3.5", repository, world.build)
    found = validate.validate(candidates, {"linux": base}, world.root / "scratch")
    assert [one.rule for one in found if is_error(one)] == ["applies"]


def test_what_cannot_be_built_is_told(world: World) -> None:
    world.write({"one": [("text.rst", "A line.")]})
    candidates, _ = validate.find_candidates(world.patches)
    base = Base("linux", world.root / "sources", "7.3.4", None, world.build)
    found = validate.validate(candidates, {"linux": base}, world.root / "scratch")
    assert ("build", "note") in [(one.rule, one.severity) for one in found]
    unbuilt = Base("linux", world.root / "sources", "7.3.4")
    found = validate.validate(candidates, {"linux": unbuilt}, world.root / "scratch")
    assert any("no build of this tree was set up" in one.text for one in found)
    with pytest.raises(UsageError, match="no sources of linux"):
        validate.validate(candidates, {}, world.root / "scratch")


def test_a_folder_without_an_entry_and_an_empty_cover_letter_are_found(world: World) -> None:
    world.write({"one": [("a.c", "int x;")], "two": [("b.c", "int y;")], "six": [("c.c", "int;")]})
    (world.patches / "linux/one/cover.txt").write_text("\n")
    (world.patches / "linux/six/cover.txt").write_text("A title\n")
    (world.patches / "linux/stray").mkdir()
    shutil.rmtree(world.patches / "linux/two")
    _, found = validate.find_candidates(world.patches)
    assert {(one.series, one.rule) for one in found} == {
        ("stray", "series.yaml"),
        ("linux/one", "cover"),
        ("linux/six", "cover"),
        ("linux/two", "patches"),
        ("linux/two", "cover"),
    }


def test_any_folder_of_patches_will_do(world: World) -> None:
    world.write({"one": [("a.c", "int x;"), ("b.c", "WARN new")]})
    flat = world.root / "mail"
    shutil.copytree(world.patches / "linux/one", flat)
    with pytest.raises(UsageError, match="does not say which tree its patches are for"):
        validate.find_candidates(flat)
    candidates, found = validate.find_candidates(flat, tree="linux")
    assert [(one.series.name, one.ours) for one in candidates] == [("mail", False)]
    base = Base("linux", world.root / "sources", "7.3.4", None, world.build)
    found = (*found, *validate.validate(candidates, {"linux": base}, world.root / "scratch"))
    assert [one.rule for one in found if is_error(one)] == ["build"]
    # A series' own folder knows its tree.
    (candidate,), _ = validate.find_candidates(world.patches / "linux/one")
    assert candidate.ours


def test_bad_folders_get_a_hint(world: World) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        validate.find_candidates(world.root / "nowhere")
    with pytest.raises(UsageError, match=r"neither series\.yaml nor patches"):
        validate.find_candidates(world.root)
    world.write({"one": [("a.c", "int x;")]})
    with pytest.raises(UsageError) as caught:
        validate.find_candidates(world.patches, only="oen")
    assert caught.value.hint == "did you mean 'one'?"


# -- telling


def test_the_summary_puts_errors_first_and_gathers_notes(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"000{number}-x.patch").write_text(PATCH)
    name = f"linux/{tmp_path.name}"
    candidates = [Candidate(make_series(tmp_path))]
    notes = [Finding(name, f"000{number}-x.patch", "sign-off", "note", "none") for number in (1, 2)]
    error = Finding(name, "0002-x.patch", "build", "error", "a.c:1: new warning: w")
    text = validate.render_findings([*notes, error], candidates)
    assert text.splitlines() == [
        f"{name} (2 patches): 1 error",
        "  error 0002-x.patch: build: a.c:1: new warning: w",
        "  note  all patches: sign-off: none",
        "",
        "1 error in 1 series",
    ]
    assert validate.exit_status([*notes, error]) is Exit.FAILED
    assert validate.exit_status(notes) is Exit.OK
    assert f"{name} (2 patches): ok" in validate.render_findings(notes, candidates)


def test_the_findings_for_programs(tmp_path: Path) -> None:
    (tmp_path / "0001-x.patch").write_text(PATCH)
    name = f"linux/{tmp_path.name}"
    candidates = [Candidate(make_series(tmp_path))]
    note = Finding(name, "0001-x.patch", "sign-off", "note", "none")
    error = Finding("all series", "", "stacked", "error", "a.c:1: new warning: w")
    document = json.loads(findings.to_json([note, error], candidates))
    assert document == {
        "errors": 1,
        "notes": 1,
        "series": [
            {"series": name, "patches": 1, "errors": 0, "notes": 1},
            {"series": "all series", "patches": 0, "errors": 1, "notes": 0},
        ],
        "findings": [
            {
                "series": name,
                "patch": "0001-x.patch",
                "rule": "sign-off",
                "severity": "note",
                "text": "none",
            },
            {
                "series": "all series",
                "patch": "",
                "rule": "stacked",
                "severity": "error",
                "text": "a.c:1: new warning: w",
            },
        ],
    }
    good = json.loads(findings.to_json([], candidates))
    assert (good["errors"], good["findings"]) == (0, [])


def test_the_command_prints_the_findings_for_programs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # a layout without patches: nothing is fetched or built
    (tmp_path / "linux/stray").mkdir(parents=True)
    (tmp_path / "series.yaml").write_text("series: []\n")
    words = ["--patches", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    assert main(["validate", "--json", *words]) == Exit.FAILED
    document = json.loads(capfd.readouterr().out)
    assert [(one["series"], one["rule"]) for one in document["findings"]] == [
        ("stray", "series.yaml")
    ]
    assert document["errors"] == 1


TRACE_PATCH = """\
diff --git a/arch/x86/kvm/x86.c b/arch/x86/kvm/x86.c
--- a/arch/x86/kvm/x86.c
+++ b/arch/x86/kvm/x86.c
+	foo(
diff --git a/arch/x86/kvm/trace.h b/arch/x86/kvm/trace.h
--- a/arch/x86/kvm/trace.h
+++ b/arch/x86/kvm/trace.h
+	TP_STRUCT__entry(
"""


def test_layout_of_trace_events_is_told_in_trace_headers_only() -> None:
    said = "Lines should not end with a '('"
    remarks = [validate.Remark(line, "CHECK", "OPEN_ENDED_LINE", said) for line in (4, 8)]
    code, trace = validate.judge_checkpatch("s", "p", remarks, TRACE_PATCH)
    assert (code.severity, trace.severity) == ("error", "note")
    other = [validate.Remark(8, "CHECK", "SPACING", "spaces preferred")]
    assert validate.judge_checkpatch("s", "p", other, TRACE_PATCH)[0].severity == "error"


IMPORT_PATCH = """\
diff --git a/linux-headers/linux/kvm.h b/linux-headers/linux/kvm.h
--- a/linux-headers/linux/kvm.h
+++ b/linux-headers/linux/kvm.h
+#define X 1
"""
IMPORT_REMARKS = (
    Remark(
        3, "WARNING", "", "added, moved or deleted file(s) imported from Linux, are you using it?"
    ),
    Remark(4, "ERROR", "", "Saw unacceptable licenses 'GPL-2.0-WITH-Linux-syscall-note', valid"),
)


def test_headers_update_is_told_and_not_failed() -> None:
    findings = validate.judge_checkpatch("s", "p", IMPORT_REMARKS, IMPORT_PATCH)
    assert [(one.rule, one.severity) for one in findings] == [("imported", "note")] * 2


def test_headers_update_with_something_else_in_it_fails() -> None:
    text = IMPORT_PATCH + IMPORT_PATCH.replace("linux-headers/linux/kvm.h", "hw/net/a.c")
    findings = validate.judge_checkpatch("s", "p", IMPORT_REMARKS, text)
    assert {one.severity for one in findings} == {"error"}


def test_an_included_source_is_built_with_the_one_that_includes_it(tmp_path: Path) -> None:
    folder = tmp_path / "drivers" / "pci"
    folder.mkdir(parents=True)
    (folder / "p2p.c").write_text('#ifdef CONFIG_P2P_KUNIT\n#include "p2p-kunit.c"\n#endif\n')
    (folder / "p2p-kunit.c").write_text("static void test(void) {}\n")
    (folder / "pci.c").write_text('/* #include "p2p.c" */\n')
    assert validate.built_with(tmp_path, "drivers/pci/p2p-kunit.o") == "drivers/pci/p2p.o"
    assert validate.built_with(tmp_path, "drivers/pci/p2p.o") == "drivers/pci/p2p.o"
    assert validate.built_with(tmp_path, "drivers/pci/") == "drivers/pci/"
    assert validate.built_with(tmp_path, "drivers/gone/none.o") == "drivers/gone/none.o"
