# SPDX-License-Identifier: GPL-2.0-or-later
"""How units are carried out: what a set-up arranges on host and guest, and what is derived."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes
from lib import results as made

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.model import Measurement, Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.equipment import Equipment, GuestShape
from nearmetal.machines.guest import GuestParts
from nearmetal.machines.host import Host
from nearmetal.machines.shell import Shell
from nearmetal.measure import bench
from nearmetal.measure.api import Metric, Setup, Test, Unit
from nearmetal.patches.variants import Config
from nearmetal.runs import execute
from nearmetal.runs import plan as plans

ON = Config("on", "mine", modules={"kvm": {"mine": "Y"}}, qemu_args=("-global", "mine.on=on"))


def larger(host: Host, parts: GuestParts) -> GuestParts:
    return dataclasses.replace(parts, memory_mib=4321)


def nothing_measured(place: bench.Bench) -> list[bench.Found]:
    return []


SETUPS = (
    Setup("bare", bare=True, iommu=False),
    Setup("ats", ats=True),
    Setup("fd", iommufd=True),
    Setup("off", control=True),
    Setup("shaped", shape=larger),
    Setup("modules", modules={"kvm_amd": {"other": "Y"}}),
)


def at_the_end(rows: list[Measurement]) -> list[Measurement]:
    return [made.row(len(rows), name="toy.rows", unit="rows")]


METRIC = Metric("toy.rows", "rows", "rows before this one", derived=at_the_end)
TOY = Test("toy", "A toy", nothing_measured, (METRIC,), order=1, setups=SETUPS)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fakes.FakeLab:
    """A lab that has carried out the plain unit and one in each set-up."""
    settings = Settings(tmp_path, tmp_path, tmp_path)
    found = fakes.FakeLab(settings, Cache(tmp_path))
    fakes.install(monkeypatch, found)
    work = [
        plans.Work(ON, TOY, setup, Unit(Subject("on", "mine", setup.name, "amd")))
        for setup in (TOY.plain, *SETUPS)
    ]
    equipment = plans.equipment_of("amd")
    share = execute.Share(settings, ("toy",), equipment, tuple(work), None)
    gathered = execute._measure(cast(Any, found), share, tmp_path, keep=False)
    assert gathered.missing == []
    assert [row.values for row in gathered.measurements] == [(0.0,)]
    return found


def test_hosts_are_booted_as_set_ups_want_them(lab: fakes.FakeLab) -> None:
    hosts = [label for label in lab.booted if label.startswith("vanilla")]
    assert hosts == ["vanilla", "vanilla without iommu", "vanilla with ats"]


def test_guests_are_made_as_set_ups_want_them(lab: fakes.FakeLab) -> None:
    plain = lab.guests["on-mine"]
    assert plain["parts"].extra == ON.qemu_args
    assert plain["modules"] == ON.modules
    assert not plain["parts"].iommufd
    assert set(lab.guests) == {"on-mine", *(f"on-{one.name}-mine" for one in SETUPS[1:])}
    assert lab.guests["on-fd-mine"]["parts"].iommufd
    assert lab.guests["on-off-mine"]["parts"].extra == ()
    assert lab.guests["on-shaped-mine"]["parts"].memory_mib == 4321
    assert lab.guests["on-modules-mine"]["modules"] == {"kvm_amd": {"other": "Y"}}


def test_what_the_emulator_cannot_tell_is_not_expected_and_says_why() -> None:
    work = made.work(("vmexit",), ["vanilla"], "intel")
    found = plans.expected(work, made.equipment("intel"))
    names = found.names[Subject("vanilla"), "vmexit"]
    assert "pmu.count_error_pct" in names
    assert "pmu.leaked_host_instructions" not in names
    assert {one.reason for one in found.skipped} == {
        "Bochs has no plugin that counts instructions beside its counters"
    }
    assert {one.names for one in found.skipped} == {
        (
            "pmu.leaked_host_instructions",
            "pmu.selector_write_instructions",
            "pmu.kernel_pair_instructions",
        )
    }


def test_counters_are_measured_of_the_series_that_is_for_them_and_of_no_pair() -> None:
    every = [
        Config("on", "pmu-passthrough", tests=("vmexit",)),
        Config("on", "pci-config-cache"),
        Config("on", "pci-config-cache+pci-ecam", tests=("lspci", "vmexit")),
    ]
    found = plans.expected(made.work(("vmexit",), every, "amd"), made.equipment("amd"))
    counted = {
        subject.series: "pmu.count_error_pct" in names
        for (subject, _), names in found.names.items()
    }
    assert counted == {
        "pmu-passthrough": True,
        "pci-config-cache": False,
        "pci-config-cache+pci-ecam": False,
    }


def test_a_row_with_a_context_that_its_metric_lacks_is_a_fault() -> None:
    host = fakes.QuietHost(cast(Shell, fakes.LocalShell("host")), fakes.FACTS, "/nowhere")
    row = bench.rows(host, Subject("vanilla"))
    assert row("lspci.exits", [1], path="cf8").context == {"path": "cf8"}
    for context in ({"path": "cf9"}, {"pth": "cf8"}):
        with pytest.raises(ValueError, match="does not declare the context"):
            row("lspci.exits", [1], **context)


def test_ratios_are_derived_at_the_end_of_a_share() -> None:
    name = "lspci.dword_instructions"
    rows = [
        made.row(9000, name=name, path="cf8"),
        made.row(3000, name=name, variant="on", series="x", path="cf8"),
    ]
    found = execute.Gathered(measurements=list(rows))
    execute.derive(made.work(("lspci",), ["vanilla"], "amd"), found)
    (ratio,) = found.measurements[2:]
    assert (ratio.name, ratio.values) == ("lspci.dword_instructions_ratio", (3.0,))


# --- guests of a shape ------------------------------------------------------------------------


def test_a_shape_is_in_place_of_what_the_host_says() -> None:
    here = Equipment(guest_cpus=4, guest_memory_mib=4096)
    assert GuestShape().on(here) == here
    found = GuestShape(cpus=2, cpu="EPYC-Rome").on(here)
    assert (found.guest_cpus, found.guest_memory_mib, found.guest_cpu) == (2, 4096, "EPYC-Rome")
    assert GuestShape(2, 2048, "EPYC-Rome").label == "cpus=2,memory=2048,cpu=EPYC-Rome"
    assert GuestShape().label == ""


def here_mib() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemTotal:")[1].split()[0]) // 1024 + 1


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        (GuestShape(cpus=os.cpu_count()), None),
        (GuestShape(cpus=(os.cpu_count() or 1) + 1), "CPUs and not"),
        (GuestShape(memory_mib=here_mib()), None),
        (GuestShape(memory_mib=here_mib() * 2), "MiB of memory and not"),
        (GuestShape(memory_mib=here_mib() // 2), "MiB of memory and not"),
        (GuestShape(cpu="EPYC-Rome"), None),
        (GuestShape(cpu="EPYC"), "CPUs of the type EPYC-Rome-x86_64-cpu and not EPYC"),
    ],
)
def test_a_guest_is_looked_at(shape: GuestShape, wrong: str | None) -> None:
    guest = fakes.guest(cast(Any, None))
    said = {"query-cpus-fast": [{"qom-path": "/c"}], "qom-get": "EPYC-Rome-x86_64-cpu"}
    guest.qmp = lambda command, **_: said[command]  # type: ignore[method-assign]
    if wrong is None:
        execute.has_shape(guest, shape)
        return
    with pytest.raises(MeasurementError, match=wrong):
        execute.has_shape(guest, shape)


def test_rows_of_a_shape_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(place: bench.Bench) -> list[bench.Found]:
        return [made.row(place.host.equipment.guest_cpus, name="toy.rows", unit="rows")]

    settings = Settings(tmp_path, tmp_path, tmp_path)
    found = fakes.FakeLab(settings, Cache(tmp_path))
    fakes.install(monkeypatch, found)
    toy = dataclasses.replace(TOY, measure=one_row, setups=(), metrics=())
    work = plans.Work(ON, toy, toy.plain, Unit(Subject("on", "mine", None, "amd")))
    share = execute.Share(settings, ("toy",), plans.equipment_of("amd"), (work,), None)
    shape = GuestShape(cpus=os.cpu_count())
    asked = dataclasses.replace(share, guest=shape)
    gathered = execute._measure(cast(Any, found), asked, tmp_path, keep=False)
    assert gathered.missing == []
    (row,) = gathered.measurements
    assert row.values == (os.cpu_count(),)
    assert row.context["guest"] == shape.label
    assert gathered.equipment is not None
    wrong = dataclasses.replace(share, guest=GuestShape(cpus=(os.cpu_count() or 1) + 1))
    gathered = execute._measure(cast(Any, found), wrong, tmp_path, keep=False)
    assert gathered.measurements == []
    assert "CPUs and not" in gathered.missing[0].reason
