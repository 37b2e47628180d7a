# SPDX-License-Identifier: GPL-2.0-or-later
"""series.yaml: what it means, and what a typing error in it gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.patches.series import Enable, Known, find_series, load_series, of_tree
from nearmetal.runs import plan as plans

GOOD = """
series:
  - name: second
    tree: linux
    order: 2
    base: "7.3"
    purpose: Does the second thing.
  - name: model
    tree: testbed-bochs
    order: 1
    base: "3.0"
    purpose: Teaches Bochs.
  - name: first
    tree: linux
    order: 1
    base: "7.3"
    purpose: >
      Does the
      first thing.
    checks: [exits, bytes]
    enable:
      modules: {kvm: {cache: true, depth: 4, mode: fast}}
      qemu: {vfio-pci.x-cache: on, pci-bus.limit: 3}
      guest_kernel: patched
  - name: machine
    tree: qemu
    order: 1
    base: "10.0"
    purpose: Adds an option.
    enable:
      qemu: [-machine, fixed=on]
"""


def write(folder: Path, text: str) -> Path:
    (folder / "series.yaml").write_text(text, encoding="utf-8")
    return folder


def test_the_series_come_by_tree_and_order(tmp_path: Path) -> None:
    series = load_series(write(tmp_path, GOOD))
    assert [one.name for one in series] == ["first", "second", "machine", "model"]
    assert [one.name for one in of_tree(series, "linux")] == ["first", "second"]


def test_an_entry_is_read_in_full(tmp_path: Path) -> None:
    first = find_series(load_series(write(tmp_path, GOOD)), "first")
    assert first.purpose == "Does the first thing."
    assert first.base == "7.3"
    assert first.checks == ("exits", "bytes")
    assert first.folder == tmp_path / "linux" / "first"
    assert first.enable.modules == {"kvm": {"cache": "Y", "depth": "4", "mode": "fast"}}
    assert first.enable.guest_kernel == "patched"
    assert first.enable.setups == ()
    # YAML reads `on` as true; QEMU must see "on".
    assert first.enable.qemu_arguments() == (
        "-global",
        "vfio-pci.x-cache=on",
        "-global",
        "pci-bus.limit=3",
    )


FEATURE = """
series:
  - name: feature
    parts:
      linux: {order: 1, base: "7.3", purpose: In the kernel., requires: {}}
      qemu: {order: 2, base: "11.1", purpose: In QEMU.}
    checks: [exits]
    tests: [p2p]
    draft: true
    enable:
      modules: {kvm: {cache: true}}
      qemu: [-machine, fixed=on]
""".replace(", requires: {}", "")


def test_a_feature_has_a_series_for_each_part(tmp_path: Path) -> None:
    linux, qemu = load_series(write(tmp_path, FEATURE))
    assert (linux.label, qemu.label) == ("linux/feature", "qemu/feature")
    assert (linux.base, qemu.base, qemu.order) == ("7.3", "11.1", 2)
    assert linux.purpose == "In the kernel."
    assert linux.checks == qemu.checks == ("exits",)
    assert linux.tests == qemu.tests == ("p2p",)
    assert linux.draft
    assert qemu.draft
    # once: the variant takes what any part enables
    assert linux.enable.qemu_arguments() == ("-machine", "fixed=on")
    assert qemu.enable == Enable()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("linux:", "linx:", "feature: parts: unknown key 'linx'"),
        ("order: 2, ", "", "feature: parts: qemu: the key 'order' is missing"),
        ("    checks:", "    tree: linux\n    checks:", "feature: unknown key 'tree'"),
        ('base: "11.1"', "base: 11.1", "feature: parts: qemu: base: '11.1' is not a base"),
    ],
)
def test_a_mistake_in_a_part_is_told_with_its_place(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in FEATURE
    with pytest.raises(UsageError) as caught:
        load_series(write(tmp_path, FEATURE.replace(old, new, 1)))
    assert says in caught.value.message


def test_what_is_not_enabled_sets_nothing(tmp_path: Path) -> None:
    second = find_series(load_series(write(tmp_path, GOOD)), "second")
    assert second.enable.modules == {}
    assert second.enable.qemu_arguments() == ()
    assert second.enable.guest_kernel == "vanilla"


def test_qemu_words_are_kept_as_they_are(tmp_path: Path) -> None:
    machine = find_series(load_series(write(tmp_path, GOOD)), "machine")
    assert machine.enable.qemu_arguments() == ("-machine", "fixed=on")


SETUPS = GOOD[GOOD.index("  - name: machine") :].replace(
    "qemu: [-machine, fixed=on]", "setups: [iommufd, direct]"
)
SETUPS = f"series:\n{SETUPS}"
LINUX_PART = """
  - name: machine
    tree: linux
    order: 1
    base: "7.3"
    purpose: Has the same name.
    tests: [{}]
"""


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (SETUPS, "name the test"),
        (SETUPS.replace("enable:", "tests: [lspci]\n    enable:"), "name the test"),
        (
            SETUPS.replace("enable:", "tests: [p2p]\n    enable:").replace("direct]", "drect]"),
            "'direct'",
        ),
        (SETUPS + LINUX_PART.format("vmexit"), "name the test"),
    ],
)
def test_set_ups_that_none_of_the_tests_has_are_refused(
    tmp_path: Path, text: str, hint: str
) -> None:
    """They would be left out quietly, and then be reported as not measured."""
    with pytest.raises(UsageError, match="machine: none of its tests has a set-up") as caught:
        load_series(write(tmp_path, text), known=plans.known())
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tests: [p2p]", "tests: [p2pp]", "there is no test 'p2pp'"),
        ("setups: [iommufd, direct]", "functions: {imx: vfio-pci}", "no function of a host 'imx'"),
    ],
)
def test_names_of_tests_and_functions_are_known(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = SETUPS.replace("enable:", "tests: [p2p]\n    enable:")
    assert old in text
    with pytest.raises(UsageError, match=says):
        load_series(write(tmp_path, text.replace(old, new)), known=plans.known())


def test_set_ups_may_have_their_test_in_another_part(tmp_path: Path) -> None:
    load_series(write(tmp_path, SETUPS + LINUX_PART.format("p2p")), known=plans.known())


def test_the_accelerator_has_properties_by_kvms_module(tmp_path: Path) -> None:
    text = GOOD.replace("qemu: [-machine, fixed=on]", "accel: {kvm_intel: {fast: on, depth: 4}}")
    machine = find_series(load_series(write(tmp_path, text)), "machine")
    assert machine.enable.accel == {"kvm_intel": {"fast": "on", "depth": "4"}}
    with pytest.raises(UsageError, match="kvm_intl"):
        load_series(write(tmp_path, text.replace("kvm_intel", "kvm_intl")))


def test_set_ups_are_kept_in_order(tmp_path: Path) -> None:
    text = SETUPS.replace("enable:", "tests: [p2p]\n    enable:")
    series = load_series(write(tmp_path, text))
    assert find_series(series, "machine").enable.setups == ("iommufd", "direct")


def test_product_and_testbed_series_are_told_apart(tmp_path: Path) -> None:
    series = load_series(write(tmp_path, GOOD))
    assert [one.name for one in series if one.is_testbed] == ["model"]
    assert [one.name for one in series if one.is_product] == ["first", "second", "machine"]
    assert find_series(series, "model").folder == tmp_path / "testbed" / "model"


def test_the_repository_s_own_file_is_good() -> None:
    load_series(Path(__file__).parents[2] / "patches")


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        (
            "purpose: Does the s",
            "porpose: Does the s",
            "second: unknown key 'porpose'",
            "'purpose'",
        ),
        ("tree: qemu", "tree: qmeu", "machine: tree: 'qmeu' is not known", "'qemu'"),
        (
            "guest_kernel: patched",
            "guest_kernel: patch",
            "first: enable: guest_kernel",
            "'patched'",
        ),
        ("modules:", "module:", "first: enable: unknown key 'module'", "'modules'"),
        ('base: "10.0"', "base: 10.0", "machine: base: '10.0' is not a base", "quotes"),
        ("    order: 2\n", "", "second: the key 'order' is missing", "add it"),
        ("order: 2", "order: 1", "have the same order 1", "own place"),
        (
            "name: second",
            "name: first",
            "two series of the tree linux are named 'first'",
            "another name",
        ),
        ("vfio-pci.x-cache", "x-cache", "first: enable: qemu: neither", "device.property"),
        ("order: 2", "? [order]\n    : 2", "found unhashable key", ""),
        ("order: 2", "order: 2\n    order: 3", "the key 'order' comes twice", ""),
        ("series:", "series: [", "series.yaml:", ""),
        ("series:", "serie:", "", "'series'"),
        ("name: model", "name: Mödel", "does not match", ""),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(
    tmp_path: Path, old: str, new: str, message: str, hint: str
) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        load_series(write(tmp_path, GOOD.replace(old, new, 1)))
    assert message in caught.value.message
    assert "series.yaml" in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def only(*checks: str) -> Known:
    return dataclasses.replace(plans.known(checks), tests=("lspci", "vmexit", "p2p"))


def test_an_unknown_check_gets_the_nearest_name(tmp_path: Path) -> None:
    folder = write(tmp_path, GOOD)
    assert load_series(folder, known=only("exits", "bytes"))
    with pytest.raises(UsageError, match="first: there is no check 'bytes'") as caught:
        load_series(folder, known=only("exits", "byte"))
    assert caught.value.hint == "did you mean 'byte'?"


def test_an_unknown_series_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_series(load_series(write(tmp_path, GOOD)), "secnd")
    assert caught.value.hint == "did you mean 'second'?"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_series(tmp_path)
