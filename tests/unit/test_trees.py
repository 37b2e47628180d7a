# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches become commits and patches again without the loss of a byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from lib.repositories import commit, git, make_sources

from nearmetal.cli.main import main
from nearmetal.core.errors import UsageError
from nearmetal.patches.series import Enable, Series
from nearmetal.upstream import trees

TRICKY = """kvm: x86: Cache what the bus says about a device that is asked again and again

From something that was said on the list: a reader asks for the same byte
thousands of times a second.

 ---
---- 8< ---- not a cut
-- >8 --
A line of the text with naïve bytes, then one that begins like a header:
Subject: [PATCH] not this one

Reported-by: Ünal <unal@example.org>
Link: https://example.org/a?b=c
"""


def one(patches: Path, name: str, order: int) -> Series:
    return Series(name, "linux", order, "7.3", "x", (), Enable(), patches / "linux" / name)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return make_sources(tmp_path / "sources")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series with everything that mail and git like to change."""
    folder = tmp_path_factory.mktemp("written")
    patches = folder / "patches"
    sources = make_sources(folder / "sources")
    tree = trees.tree_checkout("linux", sources, "7.3.4", [], folder / "author").folder
    trees.tree_new_series(tree, "config-cache", "KVM: Cache config reads, naïvely")
    text = (tree / "kvm/x86.c").read_text()
    (tree / "kvm/x86.c").write_text(text.replace("return 7;", "return 77;  \t"))
    commit(tree, TRICKY)
    (tree / "kvm/run").chmod(0o755)
    commit(tree, "kvm: Let the script run\n\nIt could not.\n")
    (tree / "kvm/old.c").rename(tree / "kvm/new.c")
    (tree / "kvm/new.c").write_text((tree / "kvm/new.c").read_text() + "-- \nFrom here on\n")
    commit(tree, "kvm: Rename a file\n")
    trees.tree_new_series(tree, "direct-p2p", "PCI: Go straight")
    (tree / "kvm/dos.txt").write_bytes(b"one\r\ntwo and a half  \r\nthree\r\nfour")
    (tree / "kvm/latin.txt").write_bytes(b"caf\xe9 au lait\n")
    commit(tree, "[RFC] pci: Change a file with carriage returns\n\nNo newline at its end.\n")
    (tree / "kvm/empty.h").write_text("")
    commit(tree, 'pci: Add a file without contents\n\nFixes: 123456789abc ("x")\n')
    trees.tree_export(tree, patches, [])
    return patches


@pytest.fixture
def patches(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "patches"))


def both(patches: Path) -> list[Series]:
    return [one(patches, "config-cache", 1), one(patches, "direct-p2p", 2)]


def test_an_unchanged_tree_exports_the_same_bytes(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    before = contents(patches)
    assert len(before) == 7
    made = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "again")
    (patches / "linux/config-cache/0001-stale.patch").write_text("left from an older version\n")
    exported = trees.tree_export(made.folder, patches, both(patches))
    assert contents(patches) == before
    assert [(part.name, part.patches, part.changed) for part in exported] == [
        ("config-cache", 3, True),
        ("direct-p2p", 2, False),
    ]
    shutil.rmtree(patches)
    trees.tree_export(made.folder, patches, both(patches))
    assert contents(patches) == before


def test_what_is_in_the_patches_is_what_was_committed(patches: Path) -> None:
    first, second, third = sorted((patches / "linux/config-cache").glob("*.patch"))
    text = first.read_text()
    assert text.startswith("From " + "0" * 40 + " Mon Sep 17 00:00:00 2001\n")
    assert "Date: Wed, 4 Mar 2026 05:06:07 +0530\n" in text
    assert "From: =?UTF-8?q?" in text
    assert "Subject: [PATCH] kvm: x86:" in text
    assert "\nFrom something that was said" in text
    assert "+\treturn 77;  \t\n" in text
    assert "@@ int f7(void)" in text
    assert "Signed-off-by" not in text
    assert not text.rstrip().endswith("--")
    assert "old mode 100644\nnew mode 100755" in second.read_text()
    assert "rename from kvm/old.c" in third.read_text()
    cover = (patches / "linux/config-cache/cover.txt").read_text()
    assert cover == "KVM: Cache config reads, naïvely\n"


def test_the_same_input_gives_the_same_commits(
    tmp_path: Path, sources: Path, patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "one")
    config = tmp_path / ".gitconfig"
    config.write_text(
        "[user]\n\tname = Me\n\temail = me@example.org\n[core]\n\tautocrlf = true\n"
        "[diff]\n\talgorithm = patience\n\tnoprefix = true\n\tcontext = 9\n\tstatGraphWidth = 1\n"
        "[format]\n\tsignature = Me\n\tsignOff = true\n[am]\n\tthreeWay = true\n"
        "[commit]\n\tgpgSign = true\n[apply]\n\twhitespace = fix\n"
    )
    # What a hook, a rebase --exec or a developer's shell may hand down.
    for key, value in {
        "HOME": str(tmp_path),
        "GIT_CONFIG_GLOBAL": str(config),
        "GIT_DIR": str(tmp_path / "elsewhere"),
        "GIT_INDEX_FILE": str(tmp_path / "index"),
        "GIT_COMMITTER_NAME": "Me",
        "GIT_COMMITTER_DATE": "2020-01-01T00:00:00+0000",
        "GIT_DIFF_OPTS": "-u9",
        "GIT_EXTERNAL_DIFF": "false",
        "TZ": "Asia/Tokyo",
    }.items():
        monkeypatch.setenv(key, value)
    repository = tmp_path / "base.git"
    base = trees.make_base_repository(sources, "linux", "7.3.4", repository)
    second = trees.tree_checkout(
        "linux", sources, "7.3.4", both(patches), tmp_path / "two", base_repository=repository
    )
    assert (first.base, first.head) == (second.base, second.head)
    assert base == first.base
    before = contents(patches)
    trees.tree_export(second.folder, patches, both(patches))
    assert contents(patches) == before


def test_the_base_is_the_sources_to_the_byte(tmp_path: Path, sources: Path) -> None:
    made = trees.tree_checkout("linux", sources, "7.3.4", [], tmp_path / "tree")
    shutil.rmtree(made.folder / ".git")
    assert contents(made.folder) == contents(sources)


def test_a_base_that_ignores_every_file_does_not_hide_new_ones(
    tmp_path: Path, sources: Path
) -> None:
    # What Debian's linux-source packages end with.
    (sources / ".gitignore").write_text("*.o\n\n# Debian packaging\n/*\n!/debian/\n")
    tree = trees.tree_checkout("linux", sources, "7.3.4", [], tmp_path / "t").folder
    assert (tree / "kvm/x86.c").exists()
    trees.tree_new_series(tree, "a", "A series")
    (tree / "kvm/forgotten.c").write_text("int x;\n")
    with pytest.raises(UsageError, match=r"not committed \(kvm/forgotten\.c\)"):
        trees.tree_export(tree, tmp_path / "patches", [])


def test_plain_git_am_applies_a_series(tmp_path: Path, sources: Path, patches: Path) -> None:
    made = trees.tree_checkout("linux", sources, "7.3.4", [], tmp_path / "tree")
    files = sorted((patches / "linux/config-cache").glob("*.patch"))
    git(made.folder, "am", "--quiet", *map(str, files))
    assert "return 77;" in (made.folder / "kvm/x86.c").read_text()
    wanted = TRICKY.rstrip("\n")
    assert git(made.folder, "log", "-1", "--format=%B", "HEAD~2") == wanted


def test_the_cover_letter_is_kept_as_b4_keeps_it(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    made = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "tree")
    found = git(made.folder, "log", "--grep", trees.COVER_MARKER, "-F", "--format=%H").split()
    assert len(found) == 2
    assert git(made.folder, "show", "--format=", found[0]) == ""
    text, tracking = trees.split_cover(git(made.folder, "show", "-s", "--format=%B", found[1]))
    assert text == "KVM: Cache config reads, naïvely\n"
    assert tracking == trees.default_tracking("config-cache")


def test_what_b4_writes_into_a_cover_letter_comes_back(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    cover = patches / "linux/direct-p2p/cover.txt"
    cover.write_text(
        "PCI: Go straight\n\nText.\n\n--- b4-submit-tracking ---\n"
        "# This section is used internally by b4 prep for tracking purposes.\n"
        '{\n  "series": {\n    "revision": 2,\n'
        '    "change-id": "20260505-direct-p2p-0123456789ab",\n    "prefixes": [\n'
        '      "RFC"\n    ]\n  }\n}\n'
    )
    before = contents(patches)
    made = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "tree")
    trees.tree_export(made.folder, patches, both(patches))
    assert contents(patches) == before


def test_new_commits_belong_to_the_cover_letter_before_them(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    (tree / "kvm/extra.c").write_text("int extra;\n")
    commit(tree, "pci: Add an extra\n")
    trees.tree_new_series(tree, "third", "A third thing")
    (tree / "kvm/third.c").write_text("int third;\n")
    commit(tree, "x: Add a third\n")
    assert "direct-p2p: 3 patches, differs" in trees.tree_status(tree, patches)
    assert "third: 1 patch, new" in trees.tree_status(tree, patches)
    exported = trees.tree_export(tree, patches, both(patches))
    assert [(part.name, part.patches, part.changed) for part in exported] == [
        ("config-cache", 3, False),
        ("direct-p2p", 3, True),
        ("third", 1, True),
    ]
    assert (patches / "linux/third/cover.txt").read_text() == "A third thing\n"
    assert "direct-p2p: 3 patches, as exported" in trees.tree_status(tree, patches)


def test_the_status_for_programs(
    tmp_path: Path, sources: Path, patches: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    (tree / "kvm/extra.c").write_text("int extra;\n")
    commit(tree, "pci: Add an extra\n")
    trees.tree_new_series(tree, "third", "A third thing")
    git(tree, "config", "--add", "nearmetal.series", "lost")
    (tree / "kvm/run").unlink()
    found = trees.status_of(tree, patches)
    assert [(one.name, one.patches, one.state) for one in found.series] == [
        ("config-cache", 3, "exported"),
        ("direct-p2p", 3, "differs"),
        ("third", 0, "new"),
        ("lost", 0, "gone"),
    ]
    assert (found.dirty, found.in_progress, found.error) == (1, None, None)

    shutil.rmtree(tree / "kvm")
    git(tree, "checkout", "-q", "--", "kvm")
    assert main(["tree", "status", "linux", "--dir", str(tree), "--json"]) == 0
    captured = capfd.readouterr()
    (document,) = json.loads(captured.out)["trees"]
    assert (document["tree"], document["version"], document["dirty"]) == ("linux", "7.3.4", 0)
    assert document["folder"] == str(tree)
    assert [sorted(one) for one in document["series"]] == [["name", "patches", "state", "text"]] * 4


def test_a_tree_that_is_no_stack_has_an_error_for_programs(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", [], tmp_path / "t").folder
    (tree / "kvm/extra.c").write_text("int extra;\n")
    commit(tree, "pci: Add an extra\n")
    found = trees.status_of(tree, patches)
    assert "belongs to no series" in str(found.error)
    assert found.series == ()
    assert f"cannot be exported: {found.error}" in trees.tree_status(tree, patches)


def test_other_files_of_a_series_stay(tmp_path: Path, sources: Path, patches: Path) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    (patches / "linux/direct-p2p/NOTES").write_text("keep me\n")
    (tree / "kvm/extra.c").write_text("int extra;\n")
    commit(tree, "pci: Add an extra\n")
    trees.tree_export(tree, patches, both(patches))
    assert (patches / "linux/direct-p2p/NOTES").read_text() == "keep me\n"
    assert sorted(path.name for path in patches.iterdir()) == ["linux"]


def refused(tree: Path, patches: Path, match: str) -> None:
    """An export is refused with one line and a mend, and writes nothing."""
    before = contents(patches)
    with pytest.raises(UsageError, match=match) as caught:
        trees.tree_export(tree, patches, both(patches))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert contents(patches) == before


def test_a_tree_that_is_not_ready_is_not_exported(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    head = git(tree, "rev-parse", "HEAD")
    (tree / "kvm/x86.c").write_text("changed\n")
    refused(tree, patches, "not committed")
    git(tree, "reset", "--quiet", "--hard")
    (tree / "kvm/forgotten.c").write_text("int x;\n")
    refused(tree, patches, "not committed")
    (tree / "kvm/forgotten.c").unlink()
    (tree / ".git/rebase-merge").mkdir()
    refused(tree, patches, "in the middle of a rebase")
    (tree / ".git/rebase-merge").rmdir()
    git(tree, "commit", "--quiet", "--allow-empty", "--message=x: Nothing at all")
    refused(tree, patches, "is empty")
    git(tree, "reset", "--quiet", "--hard", f"{head}~3")
    refused(tree, patches, "direct-p2p was checked out and is no longer")
    git(tree, "reset", "--quiet", "--hard", trees.BASE_TAG)
    (tree / "kvm/alone.c").write_text("int x;\n")
    commit(tree, "x: Stand alone\n")
    refused(tree, patches, "there is no cover letter before it")
    git(tree, "reset", "--quiet", "--hard", head)
    (tree / "kvm/side.c").write_text("int x;\n")
    message = git(tree, "show", "-s", "--format=%B", f"{head}~2")
    commit(tree, message.replace("direct-p2p", "other"))
    refused(tree, patches, "carries changes")


@pytest.mark.parametrize(
    "body",
    [
        "Before.\n---\nlost\n",
        "diff --git a/x b/x\n",
        "--- a/x\n",
        "From 0123 Mon Sep 17 00:00:00 2001\n",
        "From: Another Author <other@example.org>\n\nText.\n",
        "Two\n\n\n\nblank lines.\n",
    ],
)
def test_a_message_that_git_am_would_alter_is_refused(
    tmp_path: Path, sources: Path, body: str
) -> None:
    patches = tmp_path / "patches"
    patches.mkdir()
    tree = trees.tree_checkout("linux", sources, "7.3.4", [], tmp_path / "t").folder
    trees.tree_new_series(tree, "a", "A series")
    (tree / "kvm/x.c").write_text("int x;\n")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--cleanup=verbatim", "--file=-", stdin=f"x: Y\n\n{body}")
    refused(tree, patches, "would be changed by")


def test_the_order_must_be_that_of_series_yaml(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    turned = [one(patches, "config-cache", 2), one(patches, "direct-p2p", 1)]
    with pytest.raises(UsageError, match="in the order config-cache, direct-p2p"):
        trees.tree_export(tree, patches, turned)


def test_what_another_series_requires_is_not_lost_by_an_export(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    tree = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t").folder
    first, second = both(patches)
    enough = [first, dataclasses.replace(second, requires={"config-cache": 3})]
    trees.tree_export(tree, patches, enough)
    more = [first, dataclasses.replace(second, requires={"config-cache": 4})]
    with pytest.raises(UsageError, match="requires the first 4 patches of config-cache"):
        trees.tree_export(tree, patches, more)


def test_a_patch_that_does_not_apply_is_named(tmp_path: Path, sources: Path, patches: Path) -> None:
    (sources / "kvm/run").write_text("#!/bin/bash\n")
    (sources / "kvm/dos.txt").write_bytes(b"one\r\n2\r\n")
    with pytest.raises(trees.DoesNotApply, match=r"0001-RFC-pci.*linux 7\.3\.5") as caught:
        trees.tree_checkout("linux", sources, "7.3.5", both(patches), tmp_path / "t")
    assert caught.value.status == 1
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob(".t.*"))


def test_work_that_is_not_exported_is_never_replaced(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    made = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t")
    again = trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t")
    assert again == made
    (made.folder / "kvm/extra.c").write_text("int extra;\n")
    for _ in ("uncommitted", "committed"):
        with pytest.raises(UsageError, match="changes that are not in patches"):
            trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t")
        commit(made.folder, "pci: Add an extra\n")
        (made.folder / "kvm/extra.c").write_text("int again;\n")
    git(made.folder, "reset", "--quiet", "--hard")
    trees.tree_export(made.folder, patches, both(patches))
    trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t")
    assert (tmp_path / "t/kvm/extra.c").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not a tree made by nearmetal"):
        trees.tree_checkout("linux", sources, "7.3.4", both(patches), mine)


def test_a_series_without_a_cover_letter_is_refused(
    tmp_path: Path, sources: Path, patches: Path
) -> None:
    (patches / "linux/direct-p2p/cover.txt").unlink()
    with pytest.raises(UsageError, match=r"direct-p2p has no .*cover\.txt"):
        trees.tree_checkout("linux", sources, "7.3.4", both(patches), tmp_path / "t")


def test_an_unknown_tree_gets_a_hint() -> None:
    assert trees.trees_of("testbed") == ("testbed-qemu", "testbed-bochs")
    with pytest.raises(UsageError, match="there is no tree 'linus'"):
        trees.trees_of("linus")
