# SPDX-License-Identifier: GPL-2.0-or-later
"""Series of others with one fault each, held against the real kernel and the real QEMU.

Nothing is booted; the objects that each patch touches are built, on the bases in the cache.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import pytest

from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.patches.series import TreeName
from nearmetal.upstream import bases, identity, validate
from nearmetal.upstream.validation import full, plan, stage

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

LINUX_FILE = "drivers/pci/vc.c"
QEMU_FILE = "hw/pci/pcie_port.c"


def base_of(conf: Settings, cache: Cache, tree: TreeName) -> validate.Base:
    source, repository = bases.repository(conf, cache, tree)
    assert identity.version_in(tree, source.folder)
    setup = bases.setup(conf, cache, tree)
    return validate.Base(tree, source.folder, source.version, repository, setup)


def write_series(folder: Path, base: validate.Base, *states: Mapping[str, str]) -> Path:
    """A folder with a patch for each state; a state gives lines to append, by file."""
    now: dict[str, str] = {}
    for number, state in enumerate(states, 1):
        text = "From: A Stranger <a@example.org>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n"
        text += f"Subject: [PATCH] PCI: Do something, part {number}\n\nIt has to be done here.\n\n"
        text += "Signed-off-by: A Stranger <a@example.org>\n---\n"
        for name, lines in state.items():
            path = base.sources / name
            old = now.get(name, path.read_text() if path.is_file() else "")
            now[name] = old + lines
            text += f"diff --git a/{name} b/{name}\n"
            text += "" if old else "new file mode 100644\n"
            text += "".join(
                difflib.unified_diff(
                    old.splitlines(keepends=True),
                    now[name].splitlines(keepends=True),
                    f"a/{name}" if old else "/dev/null",
                    f"b/{name}",
                )
            )
        (folder / f"{number:04}-change.patch").write_text(text)
    return folder


def errors(
    cache: Cache, base: validate.Base, patches: Path, *stages: str
) -> list[tuple[str, str, str]]:
    """What a quick validation finds, and the named stages of a full one."""
    candidates, _ = validate.find_candidates(patches, tree=base.tree)
    scratch = cache.root / "validate"
    scratch.mkdir(exist_ok=True)
    with cache.lock(f"validate-{base.tree}"), pytest.MonkeyPatch.context() as patch:
        found = validate.validate(candidates, {base.tree: base}, scratch)
        if stages:
            every = plan.stages

            def some(candidate: validate.Candidate, base: validate.Base) -> tuple[stage.Stage, ...]:
                return tuple(one for one in every(candidate, base) if one.name in stages)

            patch.setattr(plan, "stages", some)
            patch.setattr(full, "run_qtests", lambda *_: [])
            found += full.full(
                candidates, {base.tree: base}, scratch, found, abidiff=lambda: Path("abidiff")
            )
    return [(one.patch[:4], one.rule, one.text) for one in found if one.severity == "error"]


@pytest.fixture(scope="module")
def linux(conf: Settings, cache: Cache) -> validate.Base:
    return base_of(conf, cache, "linux")


@pytest.fixture(scope="module")
def qemu(conf: Settings, cache: Cache) -> validate.Base:
    return base_of(conf, cache, "qemu")


def test_trailing_whitespace(cache: Cache, linux: validate.Base, tmp_path: Path) -> None:
    lines = "\nstatic int __maybe_unused pci_vc_toy = 1; \n"
    ((patch, rule, text),) = errors(
        cache, linux, write_series(tmp_path, linux, {LINUX_FILE: lines})
    )
    assert (patch, rule) == ("0001", "checkpatch")
    assert "TRAILING_WHITESPACE" in text


def test_a_patch_that_builds_only_with_its_successor(
    cache: Cache, linux: validate.Base, tmp_path: Path
) -> None:
    header = "/* SPDX-License-Identifier: GPL-2.0 */\n"
    series = write_series(
        tmp_path, linux, {LINUX_FILE: '\n#include "vc-toy.h"\n'}, {"drivers/pci/vc-toy.h": header}
    )
    found = errors(cache, linux, series)
    assert [(patch, rule) for patch, rule, _ in found] == [("0001", "build")]
    assert "vc-toy.h: No such file or directory" in found[0][2]


def test_a_function_without_a_prototype(cache: Cache, linux: validate.Base, tmp_path: Path) -> None:
    lines = "\nint pci_vc_toy(int x)\n{\n\treturn x;\n}\n"
    ((patch, rule, text),) = errors(
        cache, linux, write_series(tmp_path, linux, {LINUX_FILE: lines})
    )
    assert (patch, rule) == ("0001", "build")
    assert "no previous prototype for 'pci_vc_toy'" in text


def test_a_pointer_that_is_compared_with_0(
    cache: Cache, linux: validate.Base, tmp_path: Path
) -> None:
    lines = "\nstatic bool __maybe_unused pci_vc_toy(struct pci_dev *dev)\n"
    lines += "{\n\treturn dev->bus == 0;\n}\n"
    series = write_series(tmp_path, linux, {LINUX_FILE: lines})
    ((patch, rule, text),) = errors(cache, linux, series, "sparse")
    assert (patch, rule) == ("0001", "sparse")
    assert "Using plain integer as NULL pointer" in text


def test_trailing_whitespace_in_qemu(cache: Cache, qemu: validate.Base, tmp_path: Path) -> None:
    lines = "\n/* A port. */ \n"
    found = errors(cache, qemu, write_series(tmp_path, qemu, {QEMU_FILE: lines}))
    assert [(patch, rule) for patch, rule, _ in found] == [("0001", "checkpatch")]
    assert "trailing whitespace" in found[0][2]


def test_a_new_warning_in_qemu(cache: Cache, qemu: validate.Base, tmp_path: Path) -> None:
    lines = "\nint pcie_port_toy(int x);\nint pcie_port_toy(int x)\n{\n    int y;\n\n"
    lines += "    return x;\n}\n"
    found = errors(cache, qemu, write_series(tmp_path, qemu, {QEMU_FILE: lines}))
    assert [(patch, rule) for patch, rule, _ in found] == [("0001", "build")]
    assert "unused variable 'y'" in found[0][2]
