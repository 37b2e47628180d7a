# SPDX-License-Identifier: GPL-2.0-or-later
"""The stages of ``validate --full``: what they build, what they read, and what is missing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nearmetal.builds import newer
from nearmetal.core.errors import EnvironmentBroken
from nearmetal.patches.series import Enable, Series
from nearmetal.upstream import validate
from nearmetal.upstream.results import Times
from nearmetal.upstream.validate import Base, Candidate, Diagnostic, LinuxBuild, QemuBuild, Touched
from nearmetal.upstream.validation import full, linux, plan, series_checks, stage, tools

DATA = Path(__file__).parent / "data" / "validate"


def recorded(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def candidate(folder: Path, files: Sequence[tuple[str, str]], tree: str = "linux") -> Candidate:
    """A series of one patch, which adds lines to files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "From: A <a@b.c>\nSubject: [PATCH] x\n\nIt has to be.\n---\n"
    for path, lines in files:
        added = lines.splitlines()
        text += f"diff --git a/{path} b/{path}\nnew file mode 100644\n"
        text += f"--- /dev/null\n+++ b/{path}\n"
        text += f"@@ -0,0 +1,{len(added)} @@\n" + "".join(f"+{line}\n" for line in added)
    (folder / "0001-x.patch").write_text(text)
    series = Series("x", tree, 1, "7.3", "", (), Enable(), folder)  # type: ignore[arg-type]
    return Candidate(series, ours=False)


# -- reading what the tools print


def test_sparse_is_read_as_a_compiler_is() -> None:
    source = Path("/scratch/src")
    found = validate.parse_build(recorded("sparse.txt"), source, Path("/scratch/out"))
    assert [(one.file, one.line, one.text) for one in found] == [
        (
            "arch/x86/pci/common.c",
            736,
            "no previous prototype for 'toy_probe' [-Wmissing-prototypes]",
        ),
        ("arch/x86/pci/common.c", 738, "Using plain integer as NULL pointer"),
        (
            "arch/x86/pci/common.c",
            736,
            "symbol 'toy_probe' was not declared. Should it be static?",
        ),
    ]


def test_what_coccinelle_reports_is_read_without_the_change_that_it_proposes() -> None:
    (found,) = tools.parse_cocci(recorded("coccinelle.txt"))
    text = "WARNING: NULL check before some freeing functions is not needed."
    assert found == Diagnostic("arch/x86/pci/common.c", 743, "warning", text)


def test_what_the_kernels_documentation_says_is_read() -> None:
    found = tools.parse_sphinx(recorded("sphinx-linux.txt"), Path("/scratch/src"))
    assert [(one.file, one.line, one.text) for one in found] == [
        (
            "Documentation/arch/x86/orc-unwinder.rst",
            183,
            "Explicit markup ends without a blank line; unexpected unindent.",
        ),
        (
            "Documentation/arch/x86/orc-unwinder.rst",
            189,
            "toctree contains reference to nonexisting document 'nowhere'",
        ),
        (
            "Documentation/arch/x86/orc-unwinder.rst",
            194,
            "Bullet list ends without a blank line; unexpected unindent.",
        ),
    ]


def test_reports_of_coccinelle_are_read() -> None:
    output = (
        "./drivers/pci/a.c:12:2-10: WARNING: opportunity for  str_yes_no(x)\n"
        "drivers/pci/a.c:40:6-7: WARNING comparing pointer to 0\n"
        "warning: something about the script\n"
    )
    assert tools.parse_cocci(output) == (
        Diagnostic("drivers/pci/a.c", 12, "warning", "WARNING: opportunity for str_yes_no(x)"),
        Diagnostic("drivers/pci/a.c", 40, "warning", "WARNING comparing pointer to 0"),
    )


def test_the_warnings_of_sphinx_are_read() -> None:
    source = Path("/scratch/src")
    output = (
        "/scratch/src/Documentation/virt/kvm/toy.rst:12: WARNING: Title underline too short.\n"
        "\x1b[91m/scratch/src/docs/toy.rst: WARNING: it is included in no toctree\x1b[0m\n"
        "docs/a.rst:3: ERROR: Unexpected indentation.\n"
        "WARNING: ./include/linux/toy.h:7 function parameter 'b' not described in 'toy'\n"
        "reading sources... done\n"
    )
    found = tools.parse_sphinx(output, source)
    assert [(one.file, one.line, one.kind) for one in found] == [
        ("Documentation/virt/kvm/toy.rst", 12, "warning"),
        ("docs/toy.rst", 0, "warning"),
        ("docs/a.rst", 3, "error"),
        ("include/linux/toy.h", 7, "warning"),
    ]


def test_sphinx_that_does_not_run_is_an_error() -> None:
    (found,) = tools.parse_sphinx("Extension error:\nCould not import x\n", Path("/s"))
    assert (found.kind, found.text) == ("error", "Extension error: Could not import x")


def test_the_folders_of_documents(tmp_path: Path) -> None:
    for folder in ("virt", "virt/kvm", "arch/x86"):
        (tmp_path / "Documentation" / folder).mkdir(parents=True)
        (tmp_path / "Documentation" / folder / "index.rst").touch()
    files = ["Documentation/virt/kvm/a.rst", "Documentation/arch/x86/x/b.rst"]
    assert tools.documents_folders(files, tmp_path) == ("virt/kvm", "arch/x86")
    files.append("Documentation/virt/c.rst")
    assert tools.documents_folders(files, tmp_path) == ("arch/x86", "virt")
    assert tools.documents_folders(["Documentation/none/d.rst"], tmp_path) == ()


# -- builds of Linux


def build(tmp_path: Path, lines: str = "CONFIG_KVM=m\nCONFIG_PCI=y\n") -> linux.FolderBuild:
    fragment = tmp_path / "fragment"
    fragment.write_text(lines)
    return linux.FolderBuild(fragment)


def test_built_in_has_no_module_left(tmp_path: Path) -> None:
    more = tmp_path / "kernel.config"
    more.write_text("CONFIG_TOY=m\n")
    plain = build(tmp_path).with_options([more])
    assert plain.wanted() == "CONFIG_KVM=m\nCONFIG_PCI=y\nCONFIG_TOY=m\n"
    builtin = replace(plain, builtin=True, over="CONFIG_TOY=n\n")
    assert builtin.wanted() == "CONFIG_KVM=y\nCONFIG_PCI=y\nCONFIG_TOY=y\nCONFIG_TOY=n\n"
    assert builtin.key() != plain.key()


def test_another_machine_has_its_own_kvm_and_nothing_of_x86() -> None:
    touched = [
        Touched("virt/kvm/kvm_main.c"),
        Touched("drivers/pci/pci.c"),
        Touched("arch/x86/k.c"),
    ]
    targets = ["arch/x86/kvm/", "drivers/pci/a.o", "arch/x86/k.o"]
    found = linux.targets_of(targets, touched, "arm64")
    assert found == ("arch/arm64/kvm/", "drivers/pci/a.o")
    assert linux.targets_of(targets, touched, "x86") == tuple(targets)
    assert linux.targets_of(["arch/x86/kvm/"], [Touched("arch/x86/kvm/x86.c")], "arm64") == ()


def test_folders_are_built_once() -> None:
    targets = ["drivers/vfio/pci/a.o", "drivers/vfio/", "virt/kvm/b.o"]
    assert linux.folders_of(targets) == ("drivers/vfio/", "virt/kvm/")


def test_complaints_about_what_make_builds_on_the_way_do_not_count() -> None:
    def about(file: str, *targets: str) -> bool:
        return linux.is_about(Diagnostic(file, 1, "warning", "x"), Path("/s"), targets)

    assert about("drivers/pci/pci.c", "drivers/pci/pci.o")
    assert not about("drivers/pci/quirks.c", "drivers/pci/pci.o")
    assert about("drivers/pci/quirks.c", "drivers/pci/")
    assert about("virt/kvm/kvm_main.c", "arch/arm64/kvm/")
    assert about("include/linux/pci.h", "drivers/pci/pci.o")
    assert about("", "drivers/pci/pci.o")


KCONFIG = """\
config TOY
\ttristate "A toy"
\tdepends on PCI
\thelp
\t  The config of a toy.

config TOY_KUNIT_TEST
\tbool "Tests" if !KUNIT_ALL_TESTS
"""


def test_the_options_of_a_series(tmp_path: Path) -> None:
    files = [("drivers/toy/Kconfig", KCONFIG), ("drivers/toy/toy.c", "config NONE\nbool x;")]
    symbols = linux.own_symbols(candidate(tmp_path, files))
    assert [(one.name, one.kind) for one in symbols] == [
        ("TOY", "tristate"),
        ("TOY_KUNIT_TEST", "bool"),
    ]
    assert linux.lines_on(symbols, modules=True) == (
        "CONFIG_KUNIT=y\nCONFIG_TOY=m\nCONFIG_TOY_KUNIT_TEST=y\n"
    )
    assert "CONFIG_TOY=y" in linux.lines_on(symbols, modules=False)
    assert linux.lines_off(symbols) == "CONFIG_TOY=n\nCONFIG_TOY_KUNIT_TEST=n\n"


# -- the plan


def linux_base(tmp_path: Path) -> Base:
    fragment = tmp_path / "base.config"
    fragment.write_text("CONFIG_KVM=m\n")
    return Base("linux", tmp_path, "7.3.4", None, LinuxBuild(fragment, 1, ("CC=gcc",)))


def names(tmp_path: Path, *paths: str) -> list[str]:
    one = candidate(tmp_path / "x", [(path, "int x;") for path in paths])
    return [found.name for found in plan.stages(one, linux_base(tmp_path))]


def test_the_stages_of_a_series_are_those_for_its_files(tmp_path: Path) -> None:
    everywhere = ["sparse", "built in", "arm64", "i386", "coccicheck"]
    assert names(tmp_path, "drivers/pci/a.c") == everywhere
    assert names(tmp_path, "arch/x86/kvm/a.c") == ["sparse", "built in", "i386", "coccicheck"]
    assert names(tmp_path, "include/linux/a.h") == [
        "kernel-doc",
        "sparse",
        "built in",
        "arm64",
        "i386",
    ]
    assert names(tmp_path, "Documentation/a.rst") == ["documentation"]
    assert names(tmp_path, "tools/testing/selftests/kvm/a.c") == []


def test_options_are_built_off_and_on_built_in_and_as_modules(tmp_path: Path) -> None:
    one = candidate(tmp_path / "x", [("drivers/a/Kconfig", KCONFIG), ("drivers/a/a.c", "int x;")])
    found = {one.name: one for one in plan.stages(one, linux_base(tmp_path))}
    wanted = {name: setup.setup.wanted() for name, setup in found.items() if "option" in name}  # type: ignore[attr-defined]
    assert list(wanted) == [
        "option on, modules",
        "option off, modules",
        "option on, built in",
        "option off, built in",
    ]
    assert wanted["option on, modules"].startswith("CONFIG_KVM=m\nCONFIG_KUNIT=y\nCONFIG_TOY=m\n")
    assert wanted["option off, built in"].startswith("CONFIG_KVM=y\nCONFIG_TOY=n\n")
    assert found["option on, built in"].folder != found["option on, modules"].folder


def test_qemu_is_built_for_two_targets_and_warnings_are_errors(tmp_path: Path) -> None:
    words = ("--target-list=x86_64-softmmu", "--disable-werror", "--disable-fdt")
    base = Base("qemu", tmp_path, "1:10.0.13+ds-0", None, QemuBuild(words))
    one = candidate(tmp_path / "x", [("hw/a.c", "int x;"), ("docs/a.rst", "x")], "qemu")
    werror, documents = plan.stages(one, base)
    assert werror.setup.arguments == (  # type: ignore[attr-defined]
        "--target-list=x86_64-softmmu,aarch64-softmmu",
        "--enable-werror",
        "--enable-fdt=system",
    )
    assert documents.setup.version == "10.0.13"  # type: ignore[attr-defined]


def test_qtests_are_the_touched_ones_and_those_that_know_the_folder() -> None:
    touched = [
        Touched("tests/qtest/toy-test.c", new=True),
        Touched("tests/qtest/libqos/toy.c"),
        Touched("hw/pci/pci.c"),
        Touched("docs/a.rst"),
    ]
    assert series_checks.qtests(touched) == ("toy-test", "q35-test", "device-introspect-test")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo ok 1; exit 0", ""),
        ("echo ok 1; echo not ok 2 /toy/read; exit 1", "not ok 2 /toy/read"),
        ("echo oops >&2; exit 3", "ended with status 3: oops"),
        ("sleep 9", "did not end within"),
    ],
)
def test_a_qtest_that_fails_or_hangs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(series_checks, "_QTEST_S", 1.0)
    program = tmp_path / "tests" / "qtest" / "toy-test"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    found = series_checks._one(tmp_path, "toy-test")
    assert said in found
    assert bool(found) == bool(said)


# -- stages run


class Lines:
    """A tool that complains of each line with BAD."""

    def with_options(self, fragments: Sequence[Path]) -> Lines:
        return self

    def key(self) -> str:
        return "lines"

    def lost_options(self, build: Path) -> tuple[str, ...]:
        return ()

    def configure(self, source: Path, build: Path) -> None:
        build.mkdir(parents=True, exist_ok=True)

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        return tuple(one.path for one in touched)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        return tuple(
            Diagnostic(name, number, "warning", line)
            for name in targets
            if (source / name).is_file()
            for number, line in enumerate((source / name).read_text().splitlines(), 1)
            if "BAD" in line
        )


def nowhere() -> Path:
    raise EnvironmentBroken("Debian cannot be reached")


def test_a_changed_uapi_is_an_error_where_no_abidiff_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(plan, "stages", lambda candidate, base: ())
    one = candidate(tmp_path / "x", [("include/uapi/linux/toy.h", "struct toy;")])
    base = Base("linux", tmp_path / "sources", "7.3.4")
    (tmp_path / "scratch").mkdir()
    found = full.full([one], {"linux": base}, tmp_path / "scratch", abidiff=nowhere)
    assert [(one.rule, one.severity) for one in found] == [("check-uapi", "error")]
    assert "Debian cannot be reached" in found[0].text


def test_a_program_of_an_unpacked_root_is_run_with_its_own_loader(tmp_path: Path) -> None:
    """A stand-in for the loader that says how it is called."""
    root = tmp_path / "a root"
    loader = root / "usr" / "lib64" / "ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True)
    loader.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    loader.chmod(0o755)
    program = newer.wrappers(root, ["abidiff"]) / "abidiff"
    said = subprocess.run([program, "--version", "a b"], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [
        "--library-path",
        f"{root}/usr/lib/x86_64-linux-gnu",
        f"{root}/usr/bin/abidiff",
        "--version",
        "a b",
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [("abidiff: 2.2.0", (2, 2, 0)), ("abidiff: 2.10.1", (2, 10, 1)), ("none", ())],
)
def test_the_version_of_a_program(tmp_path: Path, said: str, expected: tuple[int, ...]) -> None:
    program = tmp_path / "abidiff"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    assert newer.version(program) == expected
    assert newer.version(tmp_path / "gone") == ()


def toy_stage(*needs: stage.Need) -> stage.Stage:
    return stage.Stage("lines", Lines(), "lines", lambda file: file.path.endswith(".c"), needs)


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *needs: stage.Need
) -> list[validate.Finding]:
    """All stages, which are one, over a series of one patch with a bad line."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "old.c").write_text("BAD old\n")
    one = candidate(tmp_path / "x", [("new.c", "int x;\nBAD new"), ("a.rst", "BAD text")])
    monkeypatch.setattr(plan, "stages", lambda candidate, base: (toy_stage(*needs),))
    base = Base("linux", sources, "7.3.4")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return full.full([one], {"linux": base}, scratch, abidiff=nowhere)


def test_a_stage_tells_what_a_patch_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = run(tmp_path, monkeypatch)
    assert (found.patch, found.rule, found.severity) == ("0001-x.patch", "lines", "error")
    assert found.text == "new.c:2: new warning: BAD new"


def test_a_stage_whose_tool_is_missing_is_an_error_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = run(tmp_path, monkeypatch, stage.Need("no-such-tool", "toy-package"))
    assert (found.rule, found.severity) == ("lines", "error")
    assert found.text == "not run: there is no no-such-tool (toy-package)"


def test_a_series_of_nothing_but_qtests_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "old.c").write_text("int old;\n")
    one = candidate(tmp_path / "x", [("tests/qtest/toy-test.c", "int x;")], "qemu")
    asked = []

    def asks(one: object, *_: object) -> list[object]:
        asked.append(one)
        return []

    monkeypatch.setattr(full, "run_qtests", asks)
    (tmp_path / "scratch").mkdir()
    base = Base("qemu", sources, "11.1.1", None, QemuBuild(()))
    found = full.full([one], {"qemu": base}, tmp_path / "scratch", abidiff=nowhere)
    assert found == []
    assert asked == [one]


def test_what_an_earlier_stage_told_is_told_once() -> None:
    first = validate.Finding("s", "p", "build", "error", "a.c:1: new warning: x")
    again = replace(first, rule="sparse")
    other = replace(first, rule="sparse", text="a.c:2: new warning: y")
    assert full._news([again, other], [first]) == [other]


def test_the_time_to_expect_is_that_of_the_last_run(tmp_path: Path) -> None:
    one = candidate(tmp_path / "x", [("new.c", "int x;")])
    times = Times(tmp_path / "times.json")
    assert full.expectation([toy_stage()], one, times) == "lines (1 of its patches, time unknown)"
    times.note("lines", 300.04)
    said = full.expectation([toy_stage()], one, times)
    assert said == "lines (1 of its patches, about 5 min)"
