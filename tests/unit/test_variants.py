# SPDX-License-Identifier: GPL-2.0-or-later
"""Variants: what is in each, from the series at hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lib import results as made

from nearmetal.core.errors import UsageError
from nearmetal.patches.series import Enable, Series
from nearmetal.patches.variants import Config, available, configs, names_of
from nearmetal.runs.plan import grouped, measured_by


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


def test_two_series_are_also_measured_together(every: list[Series]) -> None:
    some = [
        dataclasses.replace(one, together={"cache": ("lspci",)}) if one.name == "p2p" else one
        for one in every
    ]
    *_, both = configs(some, ("on",))
    assert both.label == "on-cache+p2p"
    assert (both.modules, both.qemu_args) == (
        {"kvm": {"cache": "1"}},
        ("-global", "q35.cache=on"),
    )
    assert both.guest_patches == both.linux_patches
    assert (both.tests, both.named) == (("lspci",), ())
    assert names_of(some) == ("cache", "p2p", "routing", "cache+p2p")


def test_series_without_a_switch_has_no_on(every: list[Series], tmp_path: Path) -> None:
    plain = [one for one in every if one.enable == Enable()]
    plain.append(series(tmp_path, "later", "linux", 3, Enable()))
    assert available(plain) == ("vanilla", "off")
    with pytest.raises(UsageError, match="no series defines"):
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


def labels(*args: Any) -> list[str]:
    return [f"{one.test.name} {one.subject.label}" for one in made.work(*args)]


def test_mediated_pmu_is_a_setup_of_vanilla_for_vmexit(every: list[Series]) -> None:
    plan = configs(every, ("vanilla", "off"))
    assert labels(("lspci", "vmexit"), plan, "amd") == [
        *("lspci vanilla", "vmexit vanilla", "vmexit vanilla-mediated"),
        *("lspci off", "vmexit off"),
    ]
    (mediated,) = [
        one for one in made.work(("vmexit",), plan, "amd") if one.setup.name == "mediated"
    ]
    assert mediated.setup.modules["kvm_amd"] == {"enable_mediated_pmu": "Y"}
    assert labels(("vmexit",), configs(every, ("vanilla",)), None) == ["vmexit vanilla"]


def test_on_runs_only_the_tests_that_its_series_names(every: list[Series]) -> None:
    some = [dataclasses.replace(one, tests=("vmexit",) * (one.name == "cache")) for one in every]
    plan = configs(some, ("on",))
    assert [measured_by(one, ("lspci", "vmexit")) for one in plan if one.series == "cache"] == [
        ("vmexit",)
    ]
    assert labels(("lspci",), plan, "amd") == ["lspci on-p2p"]


def test_set_ups_that_a_series_names_take_the_plain_one_s_place() -> None:
    named = Config("on", "direct-p2p", setups=("iommufd", "direct"), tests=("p2p", "tools"))
    assert labels(("p2p",), [named], "amd") == [
        "p2p on-iommufd-direct-p2p",
        "p2p on-direct-direct-p2p",
    ]
    assert labels(("tools",), [named], None) == [
        "tools on-iommufd-direct-p2p",
        "tools on-direct-direct-p2p",
        "tools on-outside-direct-p2p",
    ]
    assert labels(("p2p",), ["vanilla"], "amd") == [
        "p2p vanilla-iommu",
        "p2p vanilla-bare",
        "p2p vanilla-ats",
    ]
    assert labels(("p2p",), ["vanilla"], None) == ["p2p vanilla-iommu"]


def test_units_are_grouped_by_host_and_guest() -> None:
    every = made.work(("lspci", "vmexit", "p2p"), ["vanilla"], "amd")
    groups = [
        [[f"{one.test.name} {one.subject.label}" for one in guest] for guest in host]
        for host in grouped(every)
    ]
    assert groups == [
        [["lspci vanilla", "vmexit vanilla", "p2p vanilla-iommu"], ["vmexit vanilla-mediated"]],
        [["p2p vanilla-bare"]],
        [["p2p vanilla-ats"]],
    ]
