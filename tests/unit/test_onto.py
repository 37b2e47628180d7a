# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches on another tree than theirs: what applies, merges, conflicts, or is there already."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from lib.repositories import git

from nearmetal.cli.main import main
from nearmetal.core.cache import Cache
from nearmetal.core.errors import UsageError
from nearmetal.core.settings import Settings
from nearmetal.sources.archive import Source
from nearmetal.upstream import bases, onto, ontocmd, trees
from nearmetal.upstream.onto import Commit, Conflict, Tried

LINES = [f"int value_{number};" for number in range(60)]


def save(folder: Path, name: str, lines: list[str]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def base_sources(folder: Path) -> Path:
    """A tree of QEMU with three files of 60 lines."""
    save(folder, "qemu-options.hx", ["x"])
    save(folder, "VERSION", ["11.1.1"])
    save(folder, "configure", ["x"])
    save(folder, "qapi/qapi-schema.json", ["x"])
    for name in ("a.c", "b.c", "c.c", "gone.c"):
        save(folder, f"hw/{name}", LINES)
    return folder


def changed(lines: list[str], **new: str) -> list[str]:
    """The lines with some of them replaced: ``line_7="text"``."""
    found = list(lines)
    for name, text in new.items():
        found[int(name.removeprefix("line_"))] = text
    return found


def other_sources(folder: Path) -> Path:
    """The same in another release: lines next to those that patches change are others."""
    base_sources(folder)
    save(folder, "VERSION", ["10.2.2"])
    # line 20 is within the context of a patch for line 22, and 22 itself is as it was
    save(folder, "hw/b.c", changed(LINES, line_20="int other_20;"))
    save(folder, "hw/c.c", changed(LINES, line_30="int here_30;", line_50="int here_50;"))
    (folder / "hw/gone.c").unlink()
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with patches/, the base's sources and those of another release."""
    folder = tmp_path_factory.mktemp("written")
    sources = base_sources(folder / "sources")
    other_sources(folder / "other")
    tree = trees.tree_checkout("qemu", sources, "11.1.1", [], folder / "author").folder

    def record(message: str) -> None:
        git(tree, "add", "--all")
        git(tree, "commit", "--quiet", "--file=-", stdin=f"{message}\n\nWhy.\n")

    trees.tree_new_series(tree, "below", "hw: Prepare")
    save(tree, "hw/a.c", changed(LINES, line_3="int prepared_3;"))
    record("hw: Prepare a")
    trees.tree_new_series(tree, "fits", "hw: Change")
    save(tree, "hw/a.c", changed(LINES, line_3="int patched_3;"))
    record("hw: Change a, with what is below")
    save(tree, "hw/b.c", changed(LINES, line_22="int patched_22;"))
    record("hw: Change b next to a line that others changed")
    save(tree, "hw/c.c", changed(LINES, line_30="int patched_30;", line_50="int patched_50;"))
    record("hw: Change c where others changed it")
    save(tree, "hw/c.c", changed(LINES, line_30="int twice_30;", line_50="int patched_50;"))
    record("hw: Change c again")
    save(tree, "hw/gone.c", changed(LINES, line_1="int patched_1;"))
    record("hw: Change what others removed")
    trees.tree_export(tree, folder / "patches", [])
    entry = '{{name: {0}, tree: qemu, order: {1}, base: "11.1", purpose: x.{2}}}'
    (folder / "patches/series.yaml").write_text(
        "series:\n"
        f"  - {entry.format('below', 1, '')}\n"
        f"  - {entry.format('fits', 2, ', requires: {below: all}')}\n"
    )
    return folder


@pytest.fixture
def place(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "repo"))


def committed(sources: Path, name: str) -> Commit:
    folder = sources.with_name(f"{sources.name}.git")
    commit = trees.make_base_repository(sources, "qemu", name, folder)
    return Commit(name, folder / "objects", commit)


def tried(place: Path, target: Commit, work: Path) -> tuple[Tried, ...]:
    base = committed(place / "sources", "qemu 11.1.1")
    work.mkdir()
    repository = onto.work_repository(work, (base.objects, target.objects))
    patches = sorted((place / "patches/qemu/fits").glob("*.patch"))
    below = sorted((place / "patches/qemu/below").glob("*.patch"))
    return onto.try_series(repository, "qemu/fits", base, target, patches, below)


def test_each_result(tmp_path: Path, place: Path) -> None:
    target = committed(place / "other", "qemu 10.2.2")
    found = tried(place, target, tmp_path / "work")
    assert [(one.number, one.result) for one in found] == [
        (1, "applies"),
        (2, "merges"),
        (3, "conflicts"),
        (4, "applies"),
        (5, "conflicts"),
    ]
    assert found[0].subject == "hw: Change a, with what is below"
    assert found[2].conflicts == (Conflict("hw/c.c", 31, 2, "+int here_30;", "+int patched_30;"),)
    assert found[4].conflicts == (
        Conflict("hw/gone.c", why="the patch changes it, and it is not in this tree"),
    )


def test_what_a_patch_does_is_on_top_of_the_other_tree(tmp_path: Path, place: Path) -> None:
    target = committed(place / "other", "qemu 10.2.2")
    tried(place, target, tmp_path / "work")
    work = tmp_path / "work"

    def line(name: str, number: int) -> str:
        return git(work, "show", f"HEAD:hw/{name}").splitlines()[number]

    assert line("a.c", 3) == "int patched_3;"
    assert (line("b.c", 20), line("b.c", 22)) == ("int other_20;", "int patched_22;")
    assert line("c.c", 30) == "int twice_30;"
    assert line("gone.c", 1) == "int patched_1;"
    assert git(work, "show", "HEAD:VERSION") == "10.2.2"
    assert [path.name for path in work.iterdir()] == [".git"]


def test_on_its_own_base_all_applies(tmp_path: Path, place: Path) -> None:
    found = tried(place, committed(place / "sources", "qemu 11.1.1"), tmp_path / "work")
    assert {one.result for one in found} == {"applies"}
    assert onto.summary(found) == "all 5 apply"


def test_what_is_there_already_is_told(tmp_path: Path, place: Path) -> None:
    for name, line in (("b.c", "line_22"), ("c.c", "line_30")):
        path = place / "other/hw" / name
        lines = path.read_text().splitlines()
        number = line.removeprefix("line_")
        save(place / "other", f"hw/{name}", changed(lines, **{line: f"int patched_{number};"}))
    found = tried(place, committed(place / "other", "x"), tmp_path / "work")
    assert [one.result for one in found] == [
        "applies",
        "is there",
        "conflicts",
        "applies",
        "conflicts",
    ]
    assert found[2].conflicts[0] == Conflict("hw/c.c", 51, 1, "+int here_50;", "+int patched_50;")


def test_a_series_that_is_broken_is_not_tried(tmp_path: Path, place: Path) -> None:
    shutil.copytree(place / "sources", place / "odd")
    save(place / "sources", "hw/c.c", ["nothing"])
    with pytest.raises(UsageError, match=r"0003-.* does not apply to its own base, qemu 11\.1\.1"):
        tried(place, committed(place / "odd", "x"), tmp_path / "work")


@pytest.mark.parametrize(
    ("here", "base", "patch", "wanted"),
    [
        ("  x\n", "", "", ("+x", "(order or space)")),
        ("a\n\nb\n", "a\nc\n", "a\n\nc\nd\n", ("+b", "+d")),
        ("a\n", "a\nc\n", "c\na\n", ("-c", "(order or space)")),
        ("\ta\n", "a\n", "\n", ("(order or space)", "-a")),
    ],
)
def test_the_first_conflict_of_a_file(
    here: str, base: str, patch: str, wanted: tuple[str, str]
) -> None:
    text = f"1\n<<<<<<< H\n{here}||||||| b\n{base}=======\n{patch}>>>>>>> p\n"
    assert onto.first_conflict("f", f"{text}{text}") == Conflict("f", 2, 2, *wanted)
    assert onto.first_conflict("f", "nothing\n") is None


def test_conflicts_in_words() -> None:
    assert str(Conflict("f.c", 3, 2, "+a b", "-c")) == "f.c:3, 2 places: here +a b  patch -c"
    assert str(Conflict("f.c", why="it is gone")) == "f.c: it is gone"
    assert len(str(Conflict("f.c", 3, 1, "x" * 200, "y" * 200))) < 160
    many = tuple(Conflict(f"{number}.c", why="gone") for number in range(9))
    text = onto.render([Tried("s", 1, "p", "t", "conflicts", many)], {"s": "b"}, "x")
    assert "5.c: gone\n       and 3 more files\n" in text and "6.c" not in text


# -- the command


@pytest.fixture
def conf(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose base is the toy tree, and one release, 10.2."""

    def source(name: str, version: str) -> Source:
        return Source("qemu", version, version, "somewhere", place / name)

    def repository(settings: Settings, cache: Cache, tree: str) -> tuple[Source, Path]:
        one = source("sources", "1:11.1.1+ds-1")
        return one, bases.repository_of(cache, one, "qemu")

    monkeypatch.setattr(bases, "repository", repository)
    monkeypatch.setattr(ontocmd, "obtain_release", lambda *_: source("other", "1:10.2.2+ds-1"))
    return Settings(place, tmp_path / "cache", tmp_path / "results")


def run(conf: Settings, where: str, **more: object) -> tuple[str, int]:
    options = {"patches": None, "tree": None, "only": "fits", **more}
    cache = Cache(conf.cache_dir).open()
    return ontocmd.run(conf, cache, where, **options)  # type: ignore[arg-type]


TABLE = """\
qemu/fits (made for qemu 11.1.1) onto qemu 10.2.2: 2 apply, 1 by three-way merge, 2 conflict
   1 applies          hw: Change a, with what is below
   2 three-way merge  hw: Change b next to a line that others changed
   3 conflict         hw: Change c where others changed it
       hw/c.c:31, 2 places: here +int here_30;  patch +int patched_30;
   4 applies          hw: Change c again
   5 conflict         hw: Change what others removed
       hw/gone.c: the patch changes it, and it is not in this tree
"""


@pytest.mark.parametrize("where", ["10.2", "10.2.2", "v10.2", "qemu-10.2"])
def test_a_release_by_its_name(conf: Settings, where: str) -> None:
    text, status = run(conf, where)
    assert text.startswith(TABLE)
    assert status == 0
    assert not list((conf.cache_dir / "tmp").iterdir())


def test_the_status_is_1_when_it_is_asked_for(conf: Settings) -> None:
    assert run(conf, "10.2", strict=True)[1] == 1
    assert run(conf, "10.2", strict=True, only="below")[1] == 0


def test_json(conf: Settings) -> None:
    document = json.loads(run(conf, "10.2", as_json=True)[0])
    assert document["onto"] == "qemu 10.2.2"
    assert [one["result"] for one in document["patches"]][1:3] == ["merges", "conflicts"]
    assert document["patches"][2]["conflicts"][0]["file"] == "hw/c.c"


def test_a_series_that_is_broken_leaves_the_others(
    conf: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = next((conf.repo / "patches/qemu/fits").glob("0003-*"))
    patch.write_text(patch.read_text().replace("int value_30;", "int nothing;"))
    text, status = run(conf, "10.2", only=None)
    assert text.startswith("qemu/below (made for qemu 11.1.1) onto qemu 10.2.2: it applies")
    assert "qemu/fits" not in text
    assert status == 1
    assert "qemu/fits: 0003-" in capsys.readouterr().err


def test_a_git_tree_is_tried_as_it_is_committed(
    conf: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = conf.repo / "other"
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message=x")
    before = sorted(str(path) for path in tree.rglob("*"))
    text, _ = run(conf, str(tree))
    assert text.splitlines()[1:8] == TABLE.splitlines()[1:]
    assert f"onto {tree} (" in text
    assert sorted(str(path) for path in tree.rglob("*")) == before
    save(tree, "hw/a.c", ["nothing"])
    assert run(conf, str(tree))[0] == text
    assert "not committed" in capsys.readouterr().err


def test_a_folder_and_a_tarball(conf: Settings, tmp_path: Path) -> None:
    (conf.repo / "other/pc-bios").mkdir()
    (conf.repo / "other/pc-bios/meson.build").touch()
    text, _ = run(conf, str(conf.repo / "other"))
    assert text.splitlines()[1:8] == TABLE.splitlines()[1:]
    with tarfile.open(tmp_path / "q.tar", "w") as archive:
        archive.add(conf.repo / "other", "qemu-10.2.2")
    text, _ = run(conf, str(tmp_path / "q.tar"))
    assert text.splitlines()[1:8] == TABLE.splitlines()[1:]


def test_trees_that_are_none(conf: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"not a tree of linux: it has no Kbuild, or of qemu: it"):
        run(conf, str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="is not a tarball"):
        run(conf, str(tmp_path / "file"))
    git(tmp_path / "empty", "init", "--quiet")
    with pytest.raises(UsageError, match="has no commit at HEAD"):
        run(conf, str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="is not a git tree, folder, tarball or release"):
        run(conf, "/no/such/tree")
    with pytest.raises(UsageError, match=r"no release 9\.9 is known") as caught:
        run(conf, "9.9")
    assert "qemu 10.2" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"no release linux-10\.2 is known"):
        run(conf, "linux-10.2")


def test_a_series_for_another_tree(conf: Settings) -> None:
    linux = conf.repo / "linux"
    for name in ("Kbuild", "init/main.c", "Makefile", "Kconfig"):
        save(linux, name, ["x"])
    with pytest.raises(UsageError, match="fits has no patches for linux, and"):
        run(replace(conf, linux_tree=linux), str(linux))


def test_words_that_need_onto(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["validate", "--fail-on-conflict", "--cache-dir", str(tmp_path)]) == 2
    assert "add --onto TREE" in capsys.readouterr().err
