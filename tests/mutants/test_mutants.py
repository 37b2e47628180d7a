# SPDX-License-Identifier: GPL-2.0-or-later
"""Each mutant must be caught by the proof of what it takes out; a nightly job shows that it is."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nearmetal.core import settings
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.model import Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, running_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.measure import lspci
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.patches import series, variants
from nearmetal.probes.tracing import counting

REPO = settings.repository()
sys.path.insert(0, str(REPO / "tests" / "testbed"))

import test_direct_p2p as isolation  # noqa: E402
import test_direct_p2p_cascade as cascade  # noqa: E402
import test_direct_p2p_errors as errors  # noqa: E402
import test_direct_p2p_guest as placement  # noqa: E402
import test_direct_p2p_noiommu as noiommu  # noqa: E402
import test_intel as intel  # noqa: E402
import test_pci_config_cache as selftests  # noqa: E402
import test_pci_config_cache_guest as proofs  # noqa: E402
import test_pci_config_live as live_host  # noqa: E402
import test_pci_config_live_guest as live  # noqa: E402
import test_pci_ecam_guest as ecam  # noqa: E402
import test_pci_ecam_migration as ecam_migration  # noqa: E402
import test_pmu_passthrough as pmu  # noqa: E402
import test_uncore_pmu as uncore  # noqa: E402
import test_uncore_pmu_host as uncore_host  # noqa: E402

pytestmark = [pytest.mark.testbed, pytest.mark.nightly]

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        repo=REPO,
        cache_dir=settings.default_cache_dir().absolute(),
        results_dir=tmp_path_factory.mktemp("results"),
    )


@pytest.fixture(scope="module")
def cache(conf: Settings) -> Cache:
    return Cache(conf.cache_dir).open()


@pytest.fixture(scope="module")
def on(conf: Settings) -> variants.Config:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    return next(one for one in plan if one.series == "pci-config-cache")


@contextmanager
def machine(
    conf: Settings, cache: Cache, config: variants.Config, logs: Path
) -> Iterator[tuple[Host, Guest]]:
    made = Lab.build(conf, cache, [config])
    with cache.lock("testbed"), made.host(config, logs) as host:
        host.load_kvm(config.modules)
        assigned = [host.p2p["peer"], host.p2p["disk"]]
        parts = made.guest_parts(config, host, assigned)
        parts = dataclasses.replace(parts, extra=(*parts.extra, *proofs.PORT, *proofs.PF))
        with host.vfio(assigned), running_guest(host, parts, logs=logs, label="mutant") as guest:
            proofs.prepare(guest)
            yield host, guest


def misses_are_exact(host: Host, guest: Guest, logs: Path) -> None:
    """As the checks pci-config-cache.cacheable-… and other-reads-miss-exactly hold it."""
    with counting(host.shell) as tracer:
        place = Bench(host, guest, tracer, Unit(Subject("on", "pci-config-cache")), logs)
        window = lspci.ecam_window(guest.shell.read("/proc/iomem"))
        rows = {(row.name, row.context.get("pass")): row for row in lspci.passes_cf8(place, window)}
    (wanted,) = rows["lspci.uncacheable_dwords", None].values
    exits = set(rows["lspci.userspace_exits", "second"].values)
    assert exits == {wanted}, f"{exits} exits where no cache may keep {wanted} registers"
    kept = set(rows["lspci.userspace_exits_cacheable", "second"].values)
    assert kept == {0.0}, f"{kept} exits for registers that a cache may keep"


def hotplug_empties_the_table(guest: Guest) -> None:
    """The last proof of a guest: it is stopped, so that no write of its own can empty the table.

    A guest that runs writes to the slot's registers when a function comes, which forgets all.
    """
    guest.shell.run("lspci -xxx", deadline_s=120)
    guest.qmp("stop")
    assert proofs.states(guest)[0] > 0
    guest.qmp("device_add", driver="edu", bus="hp0", id="edu1")
    assert proofs.states(guest)[0] == 0, "KVM still knows what was there before"


def test_without_a_mutant_the_proofs_hold(
    conf: Settings, cache: Cache, on: variants.Config, tmp_path: Path
) -> None:
    """Else their failing with a mutant would say nothing."""
    with machine(conf, cache, on, tmp_path) as (host, guest):
        misses_are_exact(host, guest, tmp_path)
        proofs.test_plugged_functions_appear_and_unplugged_ones_go(guest)
        random_program(guest)
        hotplug_empties_the_table(guest)


RARE_OPERATIONS = 400
"""Of a hundred operations of the random program, two change virtual functions, and two the numbers
of a bus or what is on it."""
OLD_BYTE = r"^seed \d+: .* by port, .* by ECAM"
"""What the random program says of a byte that is not QEMU's."""

Proof = Callable[[Host, Guest, Path], None]
MUTANTS: dict[str, tuple[Proof, str]] = {
    "qemu-command-is-stable": (misses_are_exact, "exits where no cache may keep"),
    "qemu-lost-function-keeps-its-ids": (misses_are_exact, "exits where no cache may keep"),
    "qemu-power-limit-is-stable": (misses_are_exact, "exits where no cache may keep"),
    "qemu-write-forgets-nothing": (
        lambda host, guest, logs: proofs.test_random_program_sees_no_stale_register(guest),
        OLD_BYTE,
    ),
    "qemu-hotplug-forgets-nothing": (
        lambda host, guest, logs: hotplug_empties_the_table(guest),
        "KVM still knows what was there before",
    ),
    "qemu-virtual-functions-go-unnoticed": (
        lambda host, guest, logs: random_program(guest),
        OLD_BYTE,
    ),
}
"""The proof of what each takes out, and what that proof says when it fails."""


def random_program(guest: Guest) -> None:
    proofs.random_program(guest, RARE_OPERATIONS)


def ecam_moves(place: ecam.Place) -> None:
    with ecam.booted(place, "mutant", *ecam.NO_HINT) as guest:
        ecam.random_program_sees_the_same(guest, RARE_OPERATIONS)


def ecam_plugs(place: ecam.Place) -> None:
    with ecam.booted(place, "mutant") as guest:
        ecam.plugged_functions_are_mapped(place, guest)


def ecam_chooses(place: ecam.Place) -> None:
    with ecam.booted(place, "mutant", *ecam.NO_HINT) as guest:
        wrong = ecam.mapped(guest) ^ ecam.emulated(guest)
        assert not wrong, f"QEMU is wrong about {wrong}"


def ecam_leaves_the_ports(place: ecam.Place) -> None:
    with ecam.booted(place, "mutant") as guest:
        ecam.reads_leave_the_ports(place, guest)


ECAM_MUTANTS: dict[str, tuple[Callable[[ecam.Place], None], str]] = {
    "qemu-ecam-renumbering-moves-nothing": (ecam_moves, r"^seed \d+: "),
    "qemu-ecam-hotplug-leaves-all-ones": (
        ecam_plugs,
        "the guest's seeing the plugged device did not happen",
    ),
    "qemu-ecam-hint-takes-ports-for-served": (ecam_leaves_the_ports, "exits at the ports for"),
    "qemu-ecam-maps-ports-above-assigned-functions": (ecam_chooses, "^QEMU is wrong about"),
}
"""Their proofs hold without a mutant: tests/testbed/test_pci_ecam_guest.py runs them."""


ECAM_GUEST_MUTANTS = {"linux-ecam-hint-is-looked-at-for-ever": "looks at a hint"}
"""Mutants of the guest's kernel, and what the proof says: tests/testbed/test_pci_ecam_migration.py
runs it without."""


LIVE_MUTANTS: dict[str, tuple[Callable[[ecam.Place, Guest], object], str]] = {
    "qemu-config-live-changes-go-unnoticed": (
        lambda place, guest: live.every_function_is_bound(guest),
        live.NOT_BOUND,
    ),
    "qemu-config-live-link-status-is-served": (live.only_link_status_exits, live.EXITS),
    "qemu-config-live-mask-is-forgotten": (
        lambda place, guest: live.bytes_are_those_of_qemu(guest),
        live.DIFFERS,
    ),
    "qemu-config-live-renumbering-moves-nothing": (
        lambda place, guest: live.sees_what_qemu_has(guest, RARE_OPERATIONS),
        r"^seed \d+: ",
    ),
    "qemu-config-live-unplugged-function-stays": (
        lambda place, guest: live.plugged_functions_come_and_go(guest),
        f"{live.GONE}|{live.NOT_BOUND}|{live.DIFFERS}",
    ),
}
"""Their proofs hold without a mutant: tests/testbed/test_pci_config_live_guest.py runs them."""


LiveProof = Callable[[Settings, Cache, variants.Config, Host], None]
LIVE_KERNEL_MUTANTS: dict[str, tuple[LiveProof, str]] = {
    "linux-config-live-bindings-come-back": (live_host.vfio_selftest, "'removal'"),
    "linux-config-live-ignores-the-mask": (live_host.vfio_selftest, "'mask'"),
    "linux-config-live-keeps-devices-awake": (live_host.vfio_selftest, "'low_power'"),
    "linux-config-live-reads-in-resets": (live_host.vfio_selftest, "'reset'"),
    "linux-config-live-remembers-values": (live_host.vfio_selftest, "'follows_writes'"),
    "linux-config-live-unbinds-without-waiting": (live_host.kvm_selftest, live_host.FAILED),
    "linux-config-live-window-stays": (live_host.kvm_selftest, live_host.FAILED),
}
"""Proof, and what of it fails; without, they hold: tests/testbed/test_pci_config_live.py."""


def config_cache_selftest(conf: Settings, cache: Cache, patch: Path, logs: Path) -> None:
    off = variants.configs(series.load_series(conf.repo / "patches"), ("off",))[0]
    with selftests.patched(conf, cache, mutated(off, patch), logs) as host:
        selftests.selftest(conf, cache, off, host, "x86/pci_config_cache_test")


def pmu_selftest(
    conf: Settings,
    cache: Cache,
    patch: Path,
    logs: Path,
    program: str = "x86/pmu_eventsel_test",
) -> None:
    off = pmu.patched_config(conf)
    with pmu.mediated(conf, cache, mutated(off, patch), logs) as (host, _):
        pmu.selftest(conf, cache, off, host, program)


def fastpath_selftest(conf: Settings, cache: Cache, patch: Path, logs: Path) -> None:
    pmu_selftest(conf, cache, patch, logs, "x86/pmu_fastpath_test")


def amd_migration(conf: Settings, cache: Cache, patch: Path, logs: Path) -> None:
    off = pmu.patched_config(conf)
    with pmu.mediated(conf, cache, mutated(off, patch), logs) as (host, made):
        parts = made.guest_parts(off, host, [])
        pmu.counts_are_whole_in_a_guest_that_was_migrated(host, parts, logs)


def intel_selftest(
    conf: Settings,
    cache: Cache,
    patch: Path,
    logs: Path,
    program: str = "x86/pmu_eventsel_test",
) -> None:
    conf = dataclasses.replace(conf, testbed="intel")
    off = pmu.patched_config(conf, intel.NEEDED)
    with intel.mediated(conf, cache, mutated(off, patch), logs) as (host, _):
        pmu.selftest(conf, cache, off, host, program, intel.SELFTESTS)


def intel_fastpath_selftest(conf: Settings, cache: Cache, patch: Path, logs: Path) -> None:
    intel_selftest(conf, cache, patch, logs, "x86/pmu_fastpath_test")


KERNEL_MUTANTS: dict[str, Callable[[Settings, Cache, Path, Path], None]] = {
    "linux-latch-without-snapshot": config_cache_selftest,
    "linux-pmu-fastpath-forgets-filter": pmu_selftest,
    "linux-pmu-fastpath-forgets-fixed-filter": intel_selftest,
    "linux-pmu-fastpath-leaves-lvtpc-masked": fastpath_selftest,
    "linux-pmu-fastpath-loses-instructions": pmu_selftest,
    "linux-pmu-fastpath-loses-overflow": fastpath_selftest,
    "linux-pmu-guest-only-is-dropped": pmu_selftest,
    "linux-pmu-l2-has-another-global-ctrl": intel_fastpath_selftest,
    "linux-pmu-passthrough-despite-filter": intel_selftest,
    "linux-pmu-selectors-are-read-only-on-put": intel_selftest,
    "linux-pmu-slots-counter-is-half-enabled": intel_selftest,
    "linux-pmu-unused-by-global-ctrl": fastpath_selftest,
    "linux-pmu-unused-in-l2": intel_fastpath_selftest,
    "linux-pmu-unused-keeps-what-was-open": fastpath_selftest,
    "linux-pmu-unused-rdpmc-is-open": fastpath_selftest,
}
"""Mutants of KVM that a selftest must catch; it is built without the mutant, and passes so."""


PMU_MUTANTS: dict[str, tuple[Callable[[Settings, Cache, Path, Path], None], str]] = {
    "qemu-pmu-amd-counters-are-mixed-up": (amd_migration, pmu.WRONG_COUNT),
}
"""Proof, and what it says when it fails: tests/testbed/test_pmu_passthrough.py runs it without."""


ISOLATION_MUTANTS: dict[str, tuple[Callable[[isolation.Place], None], str]] = {
    "linux-direct-p2p-acs-stays-off": (
        isolation.test_only_a_claim_lets_bytes_pass_directly,
        isolation.NOT_RESTORED,
    ),
    "linux-direct-p2p-close-restores-nothing": (
        isolation.test_kill_under_load_ends_the_claim_before_anything_else,
        isolation.NOT_RESTORED,
    ),
    "linux-direct-p2p-newcomers-are-added": (
        isolation.test_what_comes_by_a_rescan_waits_for_the_end,
        isolation.ADDED,
    ),
    "linux-direct-p2p-nobodys-function-decodes": (
        isolation.test_nothing_reaches_a_function_of_nobody,
        isolation.ARRIVED,
    ),
    "linux-direct-p2p-nobodys-function-is-enabled": (
        isolation.test_a_function_of_nobody_is_kept_from_all,
        isolation.ENABLED,
    ),
    "linux-direct-p2p-one-function-is-not-owned": (
        isolation.test_a_function_of_the_host_keeps_the_switch_from_users,
        isolation.NOT_OWNED,
    ),
    "linux-direct-p2p-override-is-forgotten": (
        isolation.test_resets_leave_the_claim_as_it_is,
        isolation.NOT_KEPT,
    ),
    "linux-direct-p2p-removed-function-is-not-seen": (
        isolation.test_a_function_that_was_removed_is_still_there,
        isolation.STRANGER,
    ),
}
"""Proof, and what it says when it fails: a mutant that breaks something else is not caught.

The proofs hold without a mutant: tests/testbed/test_direct_p2p.py runs them.
"""


ERROR_MUTANTS: dict[str, tuple[Callable[[isolation.Place], None], str]] = {
    "linux-direct-p2p-unsupported-requests-are-reported": (
        errors.test_what_nobody_answers_is_reported_to_nobody,
        errors.REPORTED,
    ),
    "linux-direct-p2p-user-unmasks": (
        errors.test_what_nobody_answers_is_reported_to_nobody,
        errors.NOT_MASKED,
    ),
    "linux-direct-p2p-silent-peer-is-reached": (
        errors.test_a_peer_that_decodes_nothing_is_not_reached_directly,
        errors.REACHED,
    ),
    "linux-direct-p2p-peer-in-reset-is-reached": (
        errors.test_a_peer_in_reset_is_not_reached_directly,
        errors.REACHED,
    ),
    "linux-direct-p2p-writes-are-overtaken": (
        errors.test_nothing_is_overtaken_when_it_comes_back,
        errors.OVERTAKING,
    ),
    "linux-direct-p2p-nvswitch-of-nobody-is-claimed": (
        errors.test_an_nvswitch_needs_an_owner,
        errors.UNOWNED,
    ),
}
"""The same, on a host whose functions report errors: tests/testbed/test_direct_p2p_errors.py."""


NOIOMMU_MUTANTS = {"linux-direct-p2p-noiommu-is-claimed": noiommu.DIED}
"""What the proof says when it fails; the host is gone then, and with it all that it had open."""


PLACEMENT_MUTANTS: dict[str, tuple[Callable[[placement.Place], None], str, tuple[str, ...]]] = {
    "qemu-direct-p2p-moved-bar-is-not-seen": (
        cascade.a_moved_bar_ends_the_claim,
        cascade.UNSEEN,
        cascade.CASCADE,
    ),
    "qemu-direct-p2p-ram-hole-is-off": (
        placement.ram_in_a_window_is_refused,
        placement.TAKEN,
        placement.WIDE,
    ),
    "qemu-direct-p2p-sets-by-the-nearest-switch": (
        cascade.a_cascade_is_one_claim,
        cascade.SPLIT,
        cascade.CASCADE,
    ),
}
"""The same, with a guest, and what the host has besides: tests/testbed/test_direct_p2p_guest.py and
test_direct_p2p_cascade.py."""


UNCORE_MUTANTS: dict[str, str] = {
    "linux-uncore-pmu-registers-for-ras-are-read": "imc.ras_registers_read",
    "linux-uncore-pmu-overflows-interrupt": "imc.overflows_enabled",
    "linux-uncore-pmu-close-resets-nothing": "the guest has left",
    "linux-uncore-pmu-perf-is-let-in": uncore_host.PERF_COUNTS,
}
"""What the proof says of it."""


def mutated(config: variants.Config, patch: Path) -> variants.Config:
    """The variant with a mutant on top of the product series of its tree."""
    if patch.name.startswith("qemu-"):
        return dataclasses.replace(config, qemu_patches=(*config.qemu_patches, patch))
    return dataclasses.replace(config, linux_patches=(*config.linux_patches, patch))


def test_every_mutant_is_listed() -> None:
    names = {
        *MUTANTS,
        *KERNEL_MUTANTS,
        *ECAM_MUTANTS,
        *ECAM_GUEST_MUTANTS,
        *ISOLATION_MUTANTS,
        *LIVE_MUTANTS,
        *LIVE_KERNEL_MUTANTS,
        *ERROR_MUTANTS,
        *PLACEMENT_MUTANTS,
        *PMU_MUTANTS,
        *NOIOMMU_MUTANTS,
        *UNCORE_MUTANTS,
    }
    assert {path.stem for path in FOLDER.glob("*.patch")} == names


@pytest.mark.parametrize("name", sorted(KERNEL_MUTANTS))
def test_kernel_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    """By an assertion of the selftest: a kernel that breaks instead is no catch."""
    with pytest.raises(AssertionError, match="Test Assertion Failure") as caught:
        KERNEL_MUTANTS[name](conf, cache, FOLDER / f"{name}.patch", tmp_path)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(ECAM_MUTANTS))
def test_ecam_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    plan = variants.configs(series.load_series(conf.repo / "patches"), ("on",))
    on = next(one for one in plan if one.series == "pci-ecam")
    proof, said = ECAM_MUTANTS[name]
    with (
        ecam.place_for(conf, cache, mutated(on, FOLDER / f"{name}.patch"), tmp_path) as place,
        pytest.raises(AssertionError, match=said) as caught,
    ):
        proof(place)
    print(f"{name}: {caught.value}")


@pytest.mark.parametrize("name", sorted(LIVE_MUTANTS))
def test_live_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    on = mutated(live.on_config(conf), FOLDER / f"{name}.patch")
    proof, said = LIVE_MUTANTS[name]
    with (
        live.place_for(conf, cache, on, tmp_path) as place,
        live.booted(place, "mutant") as guest,
        pytest.raises(AssertionError, match=said) as caught,
    ):
        proof(place, guest)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(LIVE_KERNEL_MUTANTS))
def test_live_kernel_mutant_is_caught(
    conf: Settings, cache: Cache, tmp_path: Path, name: str
) -> None:
    clean = live.on_config(conf)
    on = mutated(clean, FOLDER / f"{name}.patch")
    proof, said = LIVE_KERNEL_MUTANTS[name]
    with (
        selftests.patched(conf, cache, on, tmp_path) as host,
        pytest.raises(AssertionError, match=said) as caught,
    ):
        proof(conf, cache, clean, host)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(ECAM_GUEST_MUTANTS))
def test_ecam_guest_mutant_is_caught(
    conf: Settings, cache: Cache, tmp_path: Path, name: str
) -> None:
    off, on = ecam_migration.configs(conf)
    with pytest.raises(AssertionError, match=ECAM_GUEST_MUTANTS[name]) as caught:
        ecam_migration.guest_without_its_hint_uses_the_ports(
            conf, cache, off, mutated(on, FOLDER / f"{name}.patch"), tmp_path
        )
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(ISOLATION_MUTANTS))
def test_isolation_mutant_is_caught(
    conf: Settings, cache: Cache, tmp_path: Path, name: str
) -> None:
    off = isolation.patched_config(conf)
    proof, says = ISOLATION_MUTANTS[name]
    with (
        isolation.place_for(conf, cache, mutated(off, FOLDER / f"{name}.patch"), tmp_path) as place,
        pytest.raises(AssertionError, match=re.escape(says)) as caught,
    ):
        proof(place)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(ERROR_MUTANTS))
def test_error_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    off = mutated(isolation.patched_config(conf), FOLDER / f"{name}.patch")
    proof, says = ERROR_MUTANTS[name]
    with (
        isolation.place_for(conf, cache, off, tmp_path, errors.EXTRA) as place,
        pytest.raises(AssertionError, match=re.escape(says)) as caught,
    ):
        proof(place)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(NOIOMMU_MUTANTS))
def test_noiommu_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    off = mutated(isolation.patched_config(conf), FOLDER / f"{name}.patch")
    with (
        pytest.raises(AssertionError, match=re.escape(NOIOMMU_MUTANTS[name])) as caught,
        noiommu.unprotected(conf, cache, off, tmp_path) as host,
    ):
        noiommu.has_no_feature(host)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(PLACEMENT_MUTANTS))
def test_placement_mutant_is_caught(
    conf: Settings, cache: Cache, tmp_path: Path, name: str
) -> None:
    on = mutated(placement.on_config(conf), FOLDER / f"{name}.patch")
    proof, says, extra = PLACEMENT_MUTANTS[name]
    with (
        placement.place_for(conf, cache, on, tmp_path, extra) as place,
        pytest.raises(AssertionError, match=re.escape(says)) as caught,
    ):
        proof(place)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(PMU_MUTANTS))
def test_pmu_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    proof, says = PMU_MUTANTS[name]
    with pytest.raises(AssertionError, match=re.escape(says)) as caught:
        proof(conf, cache, FOLDER / f"{name}.patch", tmp_path)
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(UNCORE_MUTANTS))
def test_uncore_mutant_is_caught(conf: Settings, cache: Cache, tmp_path: Path, name: str) -> None:
    off = mutated(pmu.patched_config(conf, uncore.NEEDED), FOLDER / f"{name}.patch")
    says = UNCORE_MUTANTS[name]
    with pytest.raises((AssertionError, MeasurementError), match=re.escape(says)) as caught:
        if says == uncore_host.PERF_COUNTS:
            uncore_host.perf_and_a_user(conf, cache, off, tmp_path)
        else:
            with uncore.place_for(conf, cache, off, tmp_path) as place:
                uncore.the_guest_counts(place, "trap")
    print(f"{name}: {str(caught.value)[:600]}")


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_mutant_is_caught(
    conf: Settings, cache: Cache, on: variants.Config, tmp_path: Path, name: str
) -> None:
    config = mutated(on, FOLDER / f"{name}.patch")
    proof, said = MUTANTS[name]
    with (
        machine(conf, cache, config, tmp_path) as (host, guest),
        pytest.raises(AssertionError, match=said) as caught,
    ):
        proof(host, guest, tmp_path)
    print(f"{name}: {caught.value}")
