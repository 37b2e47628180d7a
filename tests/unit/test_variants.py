# SPDX-License-Identifier: GPL-2.0-or-later
"""Variants: what is in each, from the series at hand."""

import dataclasses
from pathlib import Path

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.patches.series import Enable, Series
from nearmetal.patches.variants import available, configs
from nearmetal.runs.execute import measured_by, with_setups


def series(tmp_path: Path, name: str, tree: str, order: int, enable: Enable) -> Series:
    folder = tmp_path / tree / name
    folder.mkdir(parents=True)
    (folder / "0001-one.patch").touch()
    return Series(name, tree, order, "7.3", "why", (), enable, folder)  # type: ignore[arg-type]


@pytest.fixture
def every(tmp_path: Path) -> list[Series]:
    return [
        series(tmp_path, "cache", "linux", 1, Enable(modules={"kvm": {"cache": "1"}})),
        series(tmp_path, "p2p", "linux", 2, Enable(guest_kernel="patched")),
        series(tmp_path, "cache", "qemu", 1, Enable(qemu_args=("-global", "q35.cache=on"))),
        series(tmp_path, "routing", "testbed-qemu", 1, Enable()),
    ]


def test_without_series_there_is_only_vanilla() -> None:
    assert available([]) == ("vanilla",)
    (only,) = configs([], ("vanilla",))
    assert (only.variant, only.linux_patches, only.qemu_patches) == ("vanilla", (), ())
    with pytest.raises(UsageError, match="no variant 'on'"):
        configs([], ("vanilla", "on"))


def test_testbed_series_make_no_variant(every: list[Series]) -> None:
    assert available([one for one in every if one.tree == "testbed-qemu"]) == ("vanilla",)


def test_off_has_every_product_patch_and_nothing_on(every: list[Series]) -> None:
    (off,) = configs(every, ("off",))
    assert len(off.linux_patches) == 2
    assert len(off.qemu_patches) == 1
    assert off.modules == {}
    assert off.qemu_args == ()
    assert off.guest_patches == ()


def test_on_is_one_series_at_a_time(every: list[Series]) -> None:
    found = configs(every, ("vanilla", "off", "on"))
    assert [one.label for one in found] == ["vanilla", "off", "on-cache", "on-p2p"]
    cache, p2p = found[2:]
    assert cache.modules == {"kvm": {"cache": "1"}}
    assert cache.qemu_args == ("-global", "q35.cache=on")
    assert cache.guest_patches == ()
    assert p2p.modules == {}
    assert p2p.qemu_args == ()
    assert p2p.guest_patches == p2p.linux_patches == cache.linux_patches


def test_set_ups_of_either_part_are_those_of_the_variant(every: list[Series]) -> None:
    with_setups = [
        dataclasses.replace(one, enable=dataclasses.replace(one.enable, setups=("direct",)))
        if one.label == "qemu/cache"
        else one
        for one in every
    ]
    found = configs(with_setups, ("on",))
    assert [(one.series, one.setups) for one in found] == [("cache", ("direct",)), ("p2p", ())]


def test_series_without_a_switch_has_no_on(every: list[Series], tmp_path: Path) -> None:
    plain = [one for one in every if one.enable == Enable()]
    plain.append(series(tmp_path, "later", "linux", 3, Enable()))
    assert available(plain) == ("vanilla", "off")
    with pytest.raises(UsageError, match="no series says"):
        configs(plain, ("on",))
    with_others = configs([*every, plain[-1]], ("on",))
    assert [one.series for one in with_others] == ["cache", "p2p"]
    assert "later" in with_others[0].applied


def test_draft_is_in_no_variant(every: list[Series]) -> None:
    drafts = [dataclasses.replace(one, draft=one.name == "p2p") for one in every]
    for config in configs(drafts, ("off", "on")):
        assert len(config.linux_patches) == 1
        assert "p2p" not in config.applied
    assert available([dataclasses.replace(one, draft=True) for one in every]) == ("vanilla",)


def test_mediated_pmu_is_a_setup_of_vanilla_for_vmexit(every: list[Series]) -> None:
    plan = with_setups(configs(every, ("vanilla", "off")), ("lspci", "vmexit"), testbed=True)
    assert [one.label for one in plan] == ["vanilla", "vanilla-mediated", "off"]
    assert measured_by(plan[1], ("lspci", "vmexit")) == ("vmexit",)
    assert plan[1].modules["kvm_amd"] == {"enable_mediated_pmu": "Y"}
    without = with_setups(configs(every, ("vanilla",)), ("lspci",), testbed=True)
    assert [one.label for one in without] == ["vanilla"]
    server = with_setups(configs(every, ("vanilla",)), ("vmexit",), testbed=False)
    assert [one.label for one in server] == ["vanilla"]


def test_on_runs_only_the_tests_that_its_series_names(every: list[Series]) -> None:
    some = [dataclasses.replace(one, tests=("vmexit",) * (one.name == "cache")) for one in every]
    plan = configs(some, ("on",))
    assert [measured_by(one, ("lspci", "vmexit")) for one in plan if one.series == "cache"] == [
        ("vmexit",)
    ]
    assert with_setups(plan, ("lspci",), testbed=True) == tuple(
        one for one in plan if one.series != "cache"
    )
