# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces come with documentation and tests, and cover letters say what they must."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from nearmetal.patches.series import Enable, Series, TreeName
from nearmetal.upstream import covers, form
from nearmetal.upstream.validate import Candidate


def patch(files: Mapping[str, str]) -> str:
    """A patch that adds lines to files; lines that begin with - or a space are there already."""
    text = "From: A <a@b.c>\nSubject: [PATCH] x\n\nIt has to be.\n---\n"
    for path, lines in files.items():
        marked = [line if line[:1] in ("-", " ") else f"+{line}" for line in lines.splitlines()]
        old = sum(not line.startswith("+") for line in marked)
        new = sum(not line.startswith("-") for line in marked)
        text += f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n"
        text += f"@@ -1,{old} +1,{new} @@\n" + "".join(f"{line}\n" for line in marked)
    return text


def found(folder: Path, tree: TreeName, *patches: Mapping[str, str]) -> list[tuple[str, str]]:
    """The rules that a series of others breaks, with the patch and the words."""
    for number, files in enumerate(patches, 1):
        (folder / f"000{number}-x.patch").write_text(patch(files))
    series = Series("x", tree, 1, "", "", (), Enable(), folder)
    findings = form.check_form([Candidate(series, ours=False)])
    assert all(one.severity == "error" for one in findings)
    return [(one.rule, f"{one.patch[:4]} {one.text}") for one in findings]


HEADER = {"include/uapi/linux/kvm.h": "#define KVM_TOY_GET\t_IOWR(KVMIO, 0xe0, struct toy)"}
DOCUMENTATION = {"Documentation/virt/kvm/api.rst": "4.200 KVM_TOY_GET"}
SELFTEST = {"tools/testing/selftests/kvm/toy.c": "ioctl(fd, KVM_TOY_GET, &toy);"}
OLD_WORDS = {"Documentation/virt/kvm/api.rst": " 4.200 KVM_TOY_GET\nAnd a line."}


def test_an_ioctl_with_documentation_and_a_selftest_is_well(tmp_path: Path) -> None:
    assert found(tmp_path, "linux", HEADER, {**DOCUMENTATION, **SELFTEST}) == []


def test_an_undocumented_ioctl_is_named(tmp_path: Path) -> None:
    ((rule, text),) = found(tmp_path, "linux", {"a.c": "int a;"}, HEADER, {**SELFTEST, **OLD_WORDS})
    assert rule == "documentation"
    assert text == (
        "0002 the ioctl KVM_TOY_GET is in no line that the series adds to Documentation/"
    )


def test_a_missing_selftest_is_named(tmp_path: Path) -> None:
    other = {"tools/testing/selftests/kvm/toy.c": "ioctl(fd, KVM_TOY_GET_ALL, &toy);"}
    for tests in ({}, other):
        ((rule, text),) = found(tmp_path, "linux", HEADER, {**DOCUMENTATION, **tests})
        assert rule == "test"
        assert "ioctl KVM_TOY_GET is in no line that the series adds to tools/testing" in text


@pytest.mark.parametrize(
    ("path", "line", "what"),
    [
        ("include/uapi/linux/kvm.h", "#define KVM_CAP_TOY 260", "KVM capability KVM_CAP_TOY"),
        ("include/uapi/linux/kvm.h", "#define KVM_EXIT_TOY            44", "exit reason KVM_EX"),
        ("include/uapi/linux/kvm.h", "\tKVM_DEV_TYPE_TOY,", "KVM device KVM_DEV_TYPE_TOY"),
        (
            "include/uapi/linux/vfio.h",
            "#define VFIO_DEVICE_FEATURE_TOY 14",
            "VFIO feature VFIO_DEVICE_FEATURE_TOY",
        ),
        ("arch/x86/include/uapi/asm/kvm.h", "#define KVM_TOY _IO(KVMIO, 1)", "ioctl KVM_TOY"),
        ("drivers/vfio/pci/toy.c", "module_param(toy, bool, 0644);", "module parameter toy"),
        (
            "arch/x86/kvm/x86.c",
            "module_param_named(toy, toy_on,\n\tbool, 0444);",
            "module parameter toy",
        ),
        ("arch/x86/pci/x.c", 'early_param("toy", toy_setup);', "kernel parameter toy"),
    ],
)
def test_the_interfaces_of_linux(tmp_path: Path, path: str, line: str, what: str) -> None:
    findings = found(tmp_path, "linux", {path: line})
    assert [rule for rule, _ in findings] == ["documentation", "test"]
    assert all(what in text for _, text in findings)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        # Bits, other headers, what was there and moved, tests' own parameters.
        ("include/uapi/linux/vfio.h", "#define VFIO_DEVICE_FEATURE_TOY (1 << 16)"),
        ("include/linux/kvm_host.h", "#define KVM_TOY _IO(KVMIO, 1)"),
        ("include/uapi/linux/kvm.h", "-#define KVM_CAP_TOY 260\n#define KVM_CAP_TOY 261"),
        ("drivers/pci/toy-kunit.c", "module_param(toy, bool, 0644);"),
        ("samples/toy.c", "module_param(toy, bool, 0644);"),
    ],
)
def test_what_offers_nothing_new(tmp_path: Path, path: str, line: str) -> None:
    assert found(tmp_path, "linux", {path: line}) == []


PROPERTY = {"hw/pci/toy.c": 'DEFINE_PROP_BOOL("toy", Toy, toy, false),'}
QTEST = {"tests/qtest/toy-test.c": "int x;"}


def test_a_property_without_documentation_is_named(tmp_path: Path) -> None:
    ((rule, text),) = found(tmp_path, "qemu", {**PROPERTY, **QTEST})
    assert (rule, text) == (
        "documentation",
        "0001 the property toy is in no line that the series adds to docs/, qapi/ or"
        " qemu-options.hx",
    )
    assert found(tmp_path, "qemu", {**PROPERTY, **QTEST, "docs/system/toy.rst": "``toy=on``"}) == []


def test_a_property_without_a_qtest_is_named(tmp_path: Path) -> None:
    ((rule, text),) = found(tmp_path, "qemu", {**PROPERTY, "docs/system/toy.rst": "``toy=on``"})
    assert (rule, text) == ("test", "0001 the property toy comes without a test in tests/")


@pytest.mark.parametrize(
    "line",
    [
        'object_class_property_add_bool(oc, "toy",\n\tget, set);',
        'object_property_add(OBJECT(host), "toy", "list", get, NULL, NULL, NULL);',
        '#define TOY_NAME "toy"\nDEFINE_PROP_ON_OFF_AUTO(TOY_NAME, Toy, toy, 0),',
    ],
)
def test_the_properties_of_qemu(tmp_path: Path, line: str) -> None:
    findings = found(tmp_path, "qemu", {"hw/toy.c": line, **QTEST})
    assert [text for _, text in findings if "property toy " in text]


def test_properties_of_developers_need_nothing(tmp_path: Path) -> None:
    assert found(tmp_path, "qemu", {"hw/toy.c": 'DEFINE_PROP_BOOL("x-toy", Toy, toy, 0),'}) == []


def test_numbered_properties_may_be_told_together(tmp_path: Path) -> None:
    lines = 'DEFINE_PROP_BOOL("bar-0", T, a, 0),\nDEFINE_PROP_BOOL("bar-1", T, b, 0),'
    files = {"hw/toy.c": lines, **QTEST}
    assert len(found(tmp_path, "qemu", files)) == 2
    assert found(tmp_path, "qemu", {**files, "docs/toy.rst": "``bar-N=on``"}) == []


def test_series_of_the_testbed_are_for_no_user(tmp_path: Path) -> None:
    assert found(tmp_path, "testbed-qemu", PROPERTY) == []


# -- cover letters

COVER = """\
KVM: Do a thing

Base and newer trees
--------------------
Based on Linux
7.3.4.  Not tried on kvm-x86/next.

Try it
------
  modprobe kvm toy=Y

The statistic toy_hits counts.

Testing
-------
The selftest, ten times.

Not run: real hardware, and
what needs it.

Related work
------------
None known.
"""


def series(tree: TreeName = "linux", enable: Enable | None = None) -> Series:
    return Series("x", tree, 1, "7.3", "", (), enable or Enable(), Path("/nowhere"))


def test_a_whole_cover_letter_is_well() -> None:
    assert covers.missing(series(enable=Enable(modules={"kvm": {"toy": "Y"}})), COVER) == ()


def test_paragraphs_end_at_blank_lines_and_sections_do_not() -> None:
    said = covers.parts(COVER)
    assert said["not run"].strip() == "real hardware, and\nwhat needs it."
    assert said["try it"] == "  modprobe kvm toy=Y\n\nThe statistic toy_hits counts."
    assert said["base"] == said["newer trees"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Base and newer trees", "Newer trees", "does not say what it is based on"),
        ("Base and newer trees", "Base", "which newer trees it was tried on"),
        ("Try it", "Trials", "how to switch it on and see it work"),
        ("Testing", "Tasting", "how it was tested"),
        ("Not run:", "Not walked:", "what was not run"),
        ("Related work", "Relations", "who else works on the same ground"),
        ("None known.\n", "", "who else works on the same ground"),
        ("Linux\n7.3.4", "the newest kernel", "the base has no version: write 'Linux 7.3.N'"),
        ("Linux\n7.3.4", "Linux 7.2.9", "the base is Linux 7.2.9, and series.yaml says 7.3"),
        ("Linux\n7.3.4", "Linux 7.31", "the base is Linux 7.31, and series.yaml says 7.3"),
        ("  modprobe", "modprobe", "has no command or setting in a line of its own"),
        ("statistic", "thing", "does not say what shows it"),
        ("toy=Y", "toys=Y", "does not name the switch toy"),
    ],
)
def test_what_a_cover_letter_lacks_is_one_error(old: str, new: str, message: str) -> None:
    assert old in COVER
    enable = Enable(modules={"kvm": {"toy": "Y"}})
    (said,) = covers.missing(series(enable=enable), COVER.replace(old, new, 1))
    assert message in said


def test_a_series_of_the_testbed_says_less() -> None:
    cover = "x: A thing\n\nBase: QEMU 7.3.1.\n\nTested: it boots.\n"
    assert covers.missing(series("testbed-qemu"), cover) == (
        "does not say what was not run: add a section 'Not run' or 'Not tested' or 'Not tried'",
    )


def test_switches_are_those_of_the_entry() -> None:
    enable = Enable(
        modules={"kvm": {"a": "Y"}},
        qemu_properties={"q35-pcihost.b-c": "on"},
        accel={"kvm_amd": {"d": "on"}, "kvm_intel": {"d": "on"}},
    )
    assert covers.switches(enable) == ("a", "d", "b-c")


def test_the_cover_letters_of_ours_are_looked_at(tmp_path: Path) -> None:
    one = Series("x", "linux", 1, "7.3", "", (), Enable(), tmp_path)
    one.cover.write_text(COVER.replace("Testing", "Tasting"))
    (finding,) = form.check_form([Candidate(one)])
    assert (finding.series, finding.rule, finding.severity) == ("linux/x", "cover", "error")
    # An empty one is told elsewhere, and others' folders have none.
    assert form.check_form([Candidate(one, ours=False)]) == ()
    one.cover.write_text("KVM: A title\n")
    assert form.check_form([Candidate(one)]) == ()
