# SPDX-License-Identifier: GPL-2.0-or-later
"""What a series requires of others: what it means, and what a mistake in it gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.patches import requires, variants
from nearmetal.patches.series import Series, find_series, load_series

YAML = """
series:
  - {name: cache, tree: linux, order: 1, base: "7.3", purpose: x}
  - {name: ecam, tree: linux, order: 2, base: "7.3", purpose: x}
  - {name: other, tree: linux, order: 3, base: "7.3", purpose: x}
  - name: live
    tree: linux
    order: 4
    base: "7.3"
    purpose: x
    enable: {modules: {kvm: {live: true}}}
    requires: {ecam: 2, cache: 1}
  - {name: machine, tree: qemu, order: 1, base: "10.0", purpose: x}
"""
PATCHES = {"linux/cache": 3, "linux/ecam": 2, "linux/other": 1, "linux/live": 2, "qemu/machine": 1}


def write(folder: Path, text: str = YAML) -> tuple[Series, ...]:
    for name, count in PATCHES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            (folder / name / f"{number:04}-x.patch").touch()
    (folder / "series.yaml").write_text(text)
    return load_series(folder)


def names(paths: tuple[Path, ...]) -> list[str]:
    return [f"{path.parent.name}/{path.name[:4]}" for path in paths]


def test_what_is_required_comes_in_the_order_of_the_tree(tmp_path: Path) -> None:
    every = write(tmp_path)
    live = find_series(every, "live")
    assert live.requires == {"ecam": 2, "cache": 1}
    assert names(requires.patches_before(live, every)) == ["cache/0001", "ecam/0001", "ecam/0002"]
    said = "the first patch of cache, all patches of ecam"
    assert requires.in_words(live, every) == said
    assert requires.patches_before(find_series(every, "ecam"), every) == ()


def test_what_the_required_series_require_is_required_too(tmp_path: Path) -> None:
    needs = "order: 2, requires: {cache: 2}"
    every = write(tmp_path, YAML.replace("order: 2", needs, 1).replace("ecam: 2", "ecam: 1"))
    found = requires.patches_before(find_series(every, "live"), every)
    assert names(found) == ["cache/0001", "cache/0002", "ecam/0001"]


def test_all_means_what_there_is(tmp_path: Path) -> None:
    every = write(tmp_path, YAML.replace("{ecam: 2, cache: 1}", "{cache: all}"))
    found = requires.patches_before(find_series(every, "live"), every)
    assert names(found) == ["cache/0001", "cache/0002", "cache/0003"]


def test_the_variant_on_has_what_its_series_requires_below_it(tmp_path: Path) -> None:
    every = write(tmp_path)
    (on,) = variants.configs(every, ("on",))
    assert on.series == "live"
    before = requires.patches_before(find_series(every, "live"), every)
    own = find_series(every, "live").patches()
    places = [on.linux_patches.index(path) for path in (*before, *own)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("ecam: 2,", "eacm: 2,", "live: it requires 'eacm', and there is no", "'ecam'"),
        ("ecam: 2,", "machine: 1,", "which is for qemu", "own tree only"),
        ("ecam: 2,", "live: 1,", "live: it requires itself", "leave that out"),
        ("ecam: 2,", "ecam: 3,", "requires the first 3 patches of 'ecam', which has 2", "'all'"),
        (
            "ecam: 2,",
            "ecam: 0,",
            "live: requires: ecam: 0 is not a number of patches",
            "{series: N}",
        ),
        ("ecam: 2,", "ecam: some,", "live: requires: ecam: 'some' is not a number", "{series: N}"),
        (
            "{ecam: 2, cache: 1}",
            "[ecam]",
            "live: requires: ['ecam'] is not a number",
            "{series: N}",
        ),
        ("order: 2", "order: 5", "which comes after it (order 5, 4)", "a higher order than all"),
        ("order: 2", "order: 2, requires: {live: 1}", "ecam and live require each other", "move"),
        ("order: 2", "order: 2, draft: true", "'ecam', which is a draft", "both drafts"),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(
    tmp_path: Path, old: str, new: str, message: str, hint: str
) -> None:
    assert old in YAML
    with pytest.raises(UsageError) as caught:
        write(tmp_path, YAML.replace(old, new, 1))
    assert message in caught.value.message
    assert "series.yaml" in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_long_way_round_is_a_cycle_too(tmp_path: Path) -> None:
    text = YAML.replace("order: 1,", "order: 1, requires: {other: 1},", 1)
    text = text.replace("order: 3,", "order: 3, requires: {live: 1},")
    with pytest.raises(UsageError, match="require each other"):
        write(tmp_path, text)


def test_a_draft_may_require_a_draft(tmp_path: Path) -> None:
    text = YAML.replace("order: 2", "order: 2, draft: true")
    assert write(tmp_path, text.replace("order: 4", "order: 4\n    draft: true"))
