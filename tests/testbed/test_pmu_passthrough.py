# SPDX-License-Identifier: GPL-2.0-or-later
"""Series pmu-passthrough in the emulated host: KVM's selftests, and a guest that multiplexes.

Needs an emulator whose CPU has performance counters (series tcg-core-pmu). It is AMD's: what the
series does on Intel CPUs is run by test_intel.py.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pci_config_cache_migration import migrate

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.guest import Guest, GuestParts, running_guest, waiting_guest
from nearmetal.machines.host import Host
from nearmetal.machines.lab import Lab
from nearmetal.machines.shell import Result
from nearmetal.patches import series, variants
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

NEEDED = (
    "linux/pmu-fastpath",
    "linux/pmu-passthrough",
    "qemu/pmu-passthrough",
    "testbed/tcg-core-pmu",
)
MEDIATED = {"kvm": {"mediated_pmu_fastpath": "Y"}, "kvm_amd": {"enable_mediated_pmu": "Y"}}
SELFTESTS = (
    "x86/pmu_eventsel_test",
    "x86/pmu_fastpath_test",
    "x86/pmu_counters_test",
    "x86/pmu_event_filter_test",
    "x86/svm_pmu_host_guest_test",
)
EXACT = {"pmu_eventsel_test": " -e", "pmu_fastpath_test": " -e"}
"""The emulated CPU does not count VMRUN, so all counts of these tests must be exact."""
SELFTEST_DEADLINE_S = 400.0
"""pmu_eventsel_test takes 35-50 s on a machine of 2 cores with a load of 10."""

EVENTS = "instructions,branches,cycles,instructions:u,branches:u,cycles:u,r0c0,r0c2,r076"
"""More than the six counters, so that perf has to multiplex them."""
MULTIPLEX = (
    "echo 4 > /sys/bus/event_source/devices/cpu/perf_event_mux_interval_ms; "
    f"perf stat -x, -e {EVENTS} timeout 5 sh -c 'while :; do :; done' 2>&1; true"
)
"""For a time and not for an amount of work, with perf's own interval: at 1 ms, an emulated guest on
a busy machine does nothing but multiplex, and never ends."""
IN_FASTPATH = 0.5
"""Share of the selector writes that must not switch the PMU. It was 0.91 when measured on a busy
machine: an interrupt that is pending ends the fast path. Without the series it is below 0."""

COUNTED = "/run/counted"
OF_A_LOOP = {"instructions:u": 2, "branches:u": 1, "r00c0:u": 2}
"""Three counters; on Intel's CPUs one of them is fixed."""
COUNT_DEADLINE_S = 300.0
CALIBRATION_LOOPS = 20_000_000
COUNTING_S = 60.0
"""How long the loop is to last where a migration takes some seconds."""
WRONG_COUNT = "the guest's perf has counted wrong"

_HIST = "hist:keys=write,ecx.hex:size=1024"
_KVM_MSR = "/sys/kernel/tracing/events/kvm/kvm_msr"
_SELECTORS = "c001020[02468a]"
_TSC_DEADLINE = "6e0"
"""KVM has handled these in the fast path before."""


def patched_config(conf: Settings, needed: Sequence[str] = NEEDED) -> variants.Config:
    """Variant ``off``, which holds every patch; skips while one that is needed is a draft."""
    every = series.load_series(conf.repo / "patches")
    drafts = [one.label for one in every if one.draft and one.label in needed]
    if drafts:
        pytest.skip(f"not built into what is run yet: {', '.join(drafts)}")
    return variants.configs(every, ("off",))[0]


@pytest.fixture(scope="module")
def patched(conf: Settings) -> variants.Config:
    return patched_config(conf)


@contextmanager
def mediated(
    conf: Settings, cache: Cache, config: variants.Config, logs: Path
) -> Iterator[tuple[Host, Lab]]:
    """An emulated host with a PMU, whose KVM has a mediated PMU."""
    made = Lab.build(conf, cache, [config])
    with cache.lock("testbed"), made.host(config, logs) as machine:
        machine.shell.run("grep -qw perfmon_v2 /proc/cpuinfo")
        machine.load_kvm(MEDIATED)
        taken = machine.shell.run("cat /sys/module/kvm_amd/parameters/enable_mediated_pmu").stdout
        assert taken.strip() == "Y", "KVM has refused the mediated PMU"
        yield machine, made


def selftest(
    conf: Settings,
    cache: Cache,
    config: variants.Config,
    machine: Host,
    program: str,
    programs: Sequence[str] = SELFTESTS,
) -> None:
    """Run one of KVM's selftests; neither a failure nor a skip is taken for a pass."""
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kernel_selftests(
        conf, cache, linux, "kvm", programs, patches=config.linux_patches
    )
    name = Path(program).name
    machine.forget_log()
    done = machine.shell.run(
        machine.place(folder / name) + EXACT.get(name, ""),
        deadline_s=SELFTEST_DEADLINE_S,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    machine.check()


@pytest.fixture(scope="module")
def place(
    conf: Settings,
    cache: Cache,
    patched: variants.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Host, Lab]]:
    with mediated(conf, cache, patched, tmp_path_factory.mktemp("logs")) as pair:
        yield pair


@pytest.mark.parametrize("program", SELFTESTS)
def test_selftest_passes(
    conf: Settings,
    cache: Cache,
    patched: variants.Config,
    place: tuple[Host, Lab],
    program: str,
) -> None:
    selftest(conf, cache, patched, place[0], program)


def _stat(machine: Host, name: str) -> int:
    return int(machine.shell.run(f"cat /sys/kernel/debug/kvm/{name}").stdout)


def writes(histogram: str, msrs: str) -> int:
    """Writes of the MSRs whose number in hexadecimal matches the pattern."""
    pattern = rf"\{{ write: +1, ecx: +(?:{msrs}) \}} hitcount: +(\d+)"
    return sum(int(hits) for hits in re.findall(pattern, histogram))


def test_a_guest_that_multiplexes_rarely_switches_the_pmu(
    conf: Settings,
    cache: Cache,
    patched: variants.Config,
    place: tuple[Host, Lab],
    tmp_path: Path,
) -> None:
    """Without the series, every selector write is an exit that switches the PMU.

    And the kernel's rule: while such a VM exists, no event of the host counts in guests.
    """
    machine, made = place
    parts = made.guest_parts(patched, machine, [])
    with running_guest(machine, parts, logs=tmp_path, label="multiplex") as guest:
        machine.shell.run(f"echo '{_HIST}' > {_KVM_MSR}/trigger")
        before = {name: _stat(machine, name) for name in ("exits", "mediated_pmu_loads")}
        said = guest.shell.run(MULTIPLEX, deadline_s=300).stdout
        after = {name: _stat(machine, name) for name in before}
        histogram = machine.shell.run(f"cat {_KVM_MSR}/hist").stdout
        machine.shell.run(f"echo '!{_HIST}' > {_KVM_MSR}/trigger")
        refused = machine.shell.run("perf stat -a -e cycles:HG true", check=False)
        allowed = machine.shell.run("perf stat -a -x, -e cycles:H true 2>&1").stdout
    print(said)
    exits, loads = (after[name] - before[name] for name in before)
    selectors, timers = writes(histogram, _SELECTORS), writes(histogram, _TSC_DEADLINE)
    print(f"{selectors} selector writes, {exits} exits, {loads} loads of the PMU, {timers} timers")
    assert "<not" not in said, "an event was not counted"
    assert selectors > 500, "the guest has hardly multiplexed anything"
    assert exits - loads - timers > IN_FASTPATH * selectors
    assert "No supported events found" in refused.stderr
    assert "<not" not in allowed
    machine.check()


def counted(guest: Guest) -> bool:
    return guest.shell.run(f"test -e {COUNTED}", check=False).status == 0


def loops_for(guest: Guest, seconds: float) -> int:
    """How many turns of the loop take that long in a guest."""
    start = time.monotonic()
    guest.shell.run(f"nm-pmu spin {CALIBRATION_LOOPS}", deadline_s=120)
    return int(CALIBRATION_LOOPS * seconds / (time.monotonic() - start))


def counts_are_whole_in_a_guest_that_was_migrated(
    machine: Host, parts: GuestParts, logs: Path, loops: int | None = None
) -> None:
    """Perf counts a loop in a guest that goes to another QEMU meanwhile; it outlives the login."""
    with (
        running_guest(machine, parts, logs=logs, label="source") as source,
        waiting_guest(machine, parts, logs=logs, label="target") as target,
    ):
        turns = loops or loops_for(source, COUNTING_S)
        source.shell.run(
            f"rm -f {COUNTED}; setsid sh -c 'perf stat -x, -e {','.join(OF_A_LOOP)}"
            f" -o {COUNTED}.part nm-pmu spin {turns}; mv {COUNTED}.part {COUNTED}'"
            " </dev/null >/dev/null 2>&1 &"
        )
        time.sleep(2)
        assert not counted(source)
        migrate(source, target, f"unix:{machine.work}/migration")
        target.login()
        assert not counted(target), "the loop ended before the guest was on the other side"
        end = time.monotonic() + COUNT_DEADLINE_S
        while not counted(target):
            assert time.monotonic() < end, "the loop does not end"
            time.sleep(1)
        said = target.shell.read(COUNTED)
    print(said)
    counts = {
        words[2]: int(words[0])
        for words in (line.split(",") for line in said.splitlines())
        if len(words) > 2 and words[0].isdigit()
    }
    for event, instructions in OF_A_LOOP.items():
        wanted = pytest.approx(instructions * turns, rel=0.001)
        assert counts.get(event) == wanted, f"{WRONG_COUNT}: {said}"
    machine.check()


@pytest.mark.nightly
def test_counts_are_whole_in_a_guest_that_was_migrated(
    conf: Settings,
    cache: Cache,
    patched: variants.Config,
    place: tuple[Host, Lab],
    tmp_path: Path,
) -> None:
    """QEMU saves AMD's selectors and counters, and restores each into the register it is from."""
    machine, made = place
    parts = made.guest_parts(patched, machine, [])
    counts_are_whole_in_a_guest_that_was_migrated(machine, parts, tmp_path)


def start_qemu(
    place: tuple[Host, Lab], patched: variants.Config, accel: str, cpu: str = "host"
) -> Result:
    """Start QEMU with one virtual CPU that does not run, and let it end at once."""
    machine, made = place
    qemu = made.qemus[patched.qemu_patches]
    words = shlex.join(
        [
            *(machine.place(qemu.program), "-L", machine.place(qemu.firmware)),
            *("-machine", "q35", "-accel", accel, "-cpu", cpu, "-m", "64", "-S"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio"),
        ]
    )
    return machine.shell.run(f"echo quit | {words}", deadline_s=120, check=False)


def test_qemu_starts_with_a_mediated_pmu(patched: variants.Config, place: tuple[Host, Lab]) -> None:
    """Else its refusals below would say nothing."""
    done = start_qemu(place, patched, "kvm")
    assert done.status == 0, done.stderr


@contextmanager
def counting_in_guests(machine: Host) -> Iterator[str]:
    """A perf stat on the host that counts in guests, too; its process ID."""
    pid = machine.shell.run(
        "perf stat -a -e cycles sleep 600 < /dev/null > /dev/null 2>&1 & echo $!"
    ).stdout.strip()
    try:
        seen = f"ls -l /proc/{pid}/fd | grep -q perf_event"
        machine.shell.run(f"for i in $(seq 100); do {seen} && exit; sleep 0.2; done; exit 1")
        yield pid
    finally:
        machine.shell.run(f"kill {pid}; while [ -e /proc/{pid} ]; do sleep 0.2; done")


def test_qemu_names_the_process_whose_events_are_in_the_way(
    patched: variants.Config, place: tuple[Host, Lab]
) -> None:
    with counting_in_guests(place[0]) as pid:
        done = start_qemu(place, patched, "kvm")
    print(done.stderr)
    assert done.status == 1
    assert "Device or resource busy" in done.stderr
    assert f"process {pid} (perf) has perf events" in done.stderr
    assert "watchdog" not in done.stderr, "there is none in this kernel"
    again = start_qemu(place, patched, "kvm")
    assert again.status == 0, again.stderr


def test_a_cpu_without_pmu_has_no_mediated_pmu(
    patched: variants.Config, place: tuple[Host, Lab]
) -> None:
    """QEMU tells KVM so (KVM_PMU_CAP_DISABLE): nothing is in the way of such a VM."""
    with counting_in_guests(place[0]):
        refused = start_qemu(place, patched, "kvm")
        done = start_qemu(place, patched, "kvm", "host,pmu=off")
    assert refused.status == 1, "else the other would say nothing"
    assert done.status == 0, done.stderr


def test_qemu_names_the_watchdog(patched: variants.Config, place: tuple[Host, Lab]) -> None:
    """The testbed's kernel has no NMI watchdog: its sysctl is made to say 1, another event is."""
    machine = place[0]
    sysctl = "/proc/sys/kernel/nmi_watchdog"
    machine.shell.run(f"echo 1 > /run/one; mount --bind /run/one {sysctl}")
    try:
        with counting_in_guests(machine):
            done = start_qemu(place, patched, "kvm")
    finally:
        machine.shell.run(f"umount {sysctl}")
    print(done.stderr)
    assert "'sysctl kernel.nmi_watchdog=0' turns it off" in done.stderr


def test_qemu_refuses_what_the_host_cannot_do(
    patched: variants.Config, place: tuple[Host, Lab]
) -> None:
    """Selectors cannot be passed through on AMD CPUs."""
    done = start_qemu(place, patched, "kvm,pmu-passthrough=on")
    print(done.stderr)
    assert done.status == 1
    assert "the host can't pass event selectors through" in done.stderr
