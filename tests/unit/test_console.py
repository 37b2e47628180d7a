# SPDX-License-Identifier: GPL-2.0-or-later
"""Consoles: what counts as a kernel that broke."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines import lab
from nearmetal.machines.console import Console, find_splats
from nearmetal.machines.host import count_iommu_faults, parse_facts, parse_kmsg, reported_errors
from nearmetal.machines.inventory import Server
from nearmetal.machines.lab import Lab, following
from nearmetal.patches.variants import Config

HEALTHY = """\
[    0.000000] Linux version 7.3.4 (nearmetal@nearmetal) (gcc (Debian 12.2.0) 12.2.0)
[    0.112233] pci 0000:00:1f.0: quirk: [io  0x0600-0x067f] claimed by ICH6 ACPI/GPIO/TCO
[    1.500000] EXT4-fs warning (device vda): mounting unchecked fs
[   33.002769] kvm [144]: vcpu0, guest rIP: 0xffffffff81006be6 Unhandled WRMSR(0xc0010007) = 0xffff
nearmetal: up
"""

# the shapes of include/asm-generic/bug.h, kernel/panic.c, kernel/locking/lockdep.c,
# kernel/rcu/tree_stall.h, kernel/watchdog.c, kernel/hung_task.c and arch/x86/mm/fault.c
BROKEN = [
    "[    9.1] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
    "[    9.1] WARNING: arch/x86/kvm/x86.c:1234 at kvm_arch_vcpu_ioctl_run+0x1/0x2, CPU#0: qemu/1",
    "[    9.1] WARNING: CPU: 1 PID: 77 at fs/inode.c:1 iput+0x1/0x2",
    "[    9.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "[    9.1] BUG: unable to handle page fault for address: ffffa0",
    "[    9.1] Oops: int3: 0000 [#1] SMP NOPTI",
    "[    9.1] WARNING: possible circular locking dependency detected",
    "[    9.1] WARNING: possible recursive locking detected",
    "[    9.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "[    9.1] rcu: INFO: rcu_sched self-detected stall on CPU",
    "[    9.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [qemu:1]",
    "[    9.1] INFO: task kworker/0:1:12 blocked for more than 120 seconds.",
    "[    9.1] BUG: KASAN: slab-out-of-bounds in foo+0x1/0x2",
    "[    9.1] Oops: general protection fault, probably for non-canonical address 0x1: 0000",
    "[    9.1] kernel BUG at mm/slub.c:1!",
    "[    9.1] refcount_t: underflow; use-after-free.",
]


def test_healthy_console() -> None:
    assert find_splats(HEALTHY) == []


@pytest.mark.parametrize("line", BROKEN)
def test_every_kind_of_splat(line: str) -> None:
    (found,) = find_splats(HEALTHY + line + "\n[    9.2] more\n")
    assert found.line == line
    assert found.context == (line, "[    9.2] more")


def test_one_splat_is_told_once() -> None:
    text = "\n".join(BROKEN[:3]) + "\n" + HEALTHY
    assert len(find_splats(text)) == 1


def test_check_counts_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    console = Console("guest", path)
    console.check()
    path.write_text(HEALTHY)
    console.check()
    path.write_text(HEALTHY + BROKEN[0] + "\n")
    with pytest.raises(MeasurementError, match=r"guest: the kernel says: .*Kernel panic"):
        console.check()
    console.check()


def test_wait_shows_the_console_s_end(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text(HEALTHY.replace("nearmetal: up", "still booting"))
    console = Console("guest", path)
    with pytest.raises(MeasurementError, match="did not come up within 0 s") as caught:
        console.wait_for("nearmetal: up", deadline_s=0.2, alive=lambda: None)
    assert str(caught.value.detail).endswith("still booting")


def test_wait_ends_at_a_panic(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text(HEALTHY.replace("nearmetal: up", BROKEN[0]))
    with pytest.raises(MeasurementError, match=r"broke at boot.*Kernel panic"):
        Console("host", path).wait_for("nearmetal: up", deadline_s=30, alive=lambda: None)


def test_wait_ends_when_the_machine_is_gone(tmp_path: Path) -> None:
    def dead() -> None:
        raise MeasurementError("QEMU ended by itself")

    path = tmp_path / "console.log"
    path.write_text("last words\n")
    with pytest.raises(MeasurementError, match="ended by itself") as caught:
        Console("guest", path).wait_for("nearmetal: up", deadline_s=30, alive=dead)
    assert caught.value.detail == "last words"


def test_iommu_faults_of_both_vendors() -> None:
    log = """\
[   12.1] DMAR: DRHD: handling fault status reg 2
[   12.1] DMAR: [DMA Read NO_PASID] Request device [04:00.0] fault addr 0xf0010000
[   12.2] DMAR: [DMA Write NO_PASID] Request device [04:00.0] fault addr 0xf0010000
[   13.0] AMD-Vi: Event logged [IO_PAGE_FAULT device=04:00.0 domain=0x0001]
[   14.0] DMAR: Intel-IOMMU force enabled
"""
    assert count_iommu_faults(log.splitlines()) == 3


def test_errors_that_a_kernel_reports() -> None:
    log = """\
[   11.0] pcieport 0000:00:04.0: AER: enabled with IRQ 25
[   12.1] pcieport 0000:00:04.0: AER: Uncorrectable (Non-Fatal) error message received from 03:00.0
[   12.1] nvme 0000:03:00.0: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Transaction
[   12.1] nvme 0000:03:00.0:    [20] UnsupReq               (First)
[   12.3] pcieport 0000:01:00.0: AER: device recovery failed
[   13.0] nvme nvme0: 2/0/0 default/read/poll queues
"""
    assert len(reported_errors(log.splitlines())) == 3


FACTS = """\
kernel=7.3.4
cpu=AMD EPYC Processor
flags=fpu vme svm hypervisor
vendor=QEMU
product=Standard PC (Q35 + ICH9, 2009)
memory=6101000
"""


def test_facts_of_the_testbed() -> None:
    facts = parse_facts(FACTS)
    assert facts.kvm_module == "kvm_amd"
    assert facts.provenance == "emulated"
    assert facts.memory_mib == 5958


@pytest.mark.parametrize(
    ("flags", "vendor", "provenance"),
    [
        ("fpu vmx", "Dell Inc.", "hardware"),
        ("fpu vmx hypervisor", "Dell Inc.", "emulated"),
        ("fpu vmx", "QEMU", "emulated"),
        ("fpu vmx", "Bochs", "emulated"),
    ],
)
def test_emulation_does_not_pass_for_metal(flags: str, vendor: str, provenance: str) -> None:
    text = FACTS.replace("fpu vme svm hypervisor", flags).replace("vendor=QEMU", f"vendor={vendor}")
    assert parse_facts(text).provenance == provenance


KMSG = """\
6,101,15000000,-;vfio-pci 0000:03:00.0: resetting
 SUBSYSTEM=pci
4,102,15971103,-;WARNING: CPU: 0 PID: 1 at test
12,103,16000000,-;hello; world
"""


def test_kernel_log_from_a_message_on() -> None:
    whole = parse_kmsg(KMSG)
    assert whole.lines[1] == "[   15.971103] WARNING: CPU: 0 PID: 1 at test"
    assert len(whole.lines) == 3
    later = parse_kmsg(KMSG, since=103)
    assert later.lines == ("[   16.000000] hello; world",)
    assert (later.last, later.lost) == (104, 0)
    assert parse_kmsg(KMSG, since=104).lines == ()


def test_lost_kernel_messages_are_counted() -> None:
    assert parse_kmsg(KMSG, since=99).lost == 2
    assert parse_kmsg("", since=99).last == 99


def test_a_servers_console_is_followed_and_left(tmp_path: Path) -> None:
    mark = f"sleep 6{os.getpid()}.5"
    command = f"echo up; echo 'Kernel panic - not syncing'; {mark} & wait"
    with following("gpu1", command, tmp_path) as console:
        assert console is not None
        end = time.monotonic() + 10
        while "panic" not in console.text() and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(MeasurementError, match="gpu1: the kernel says: Kernel panic"):
            console.broken()
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert mark not in done.stdout.splitlines()
    assert "panic" in (tmp_path / "host-console.log").read_text()
    with following("gpu1", None, tmp_path) as console:
        assert console is None


def test_a_server_that_went_is_named_with_its_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = fakes.piped("gpu1")
    up = [True]
    shell._client.is_active = lambda: up[0]  # type: ignore[attr-defined]
    shell.close = lambda: None  # type: ignore[method-assign]
    host = fakes.QuietHost(shell, fakes.FACTS, "/nowhere")
    monkeypatch.setattr(lab, "reach", lambda *_, **__: host)
    command = "echo the power fails; sleep 60"
    server = Server("gpu1", fakes.HERE, console=command)
    nothing = cast(Any, None)
    settings = Settings(tmp_path, tmp_path, tmp_path)
    made = Lab(settings, Cache(tmp_path).open(), nothing, None, {}, {}, (), False, server)
    with made.host(Config("vanilla"), tmp_path) as found:
        assert found.shell.watch
        found.shell.watch()
        end = time.monotonic() + 10
        while "power" not in (tmp_path / "host-console.log").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        up[0] = False
        with pytest.raises(MeasurementError, match="gpu1: the SSH connection is gone") as caught:
            found.shell.watch()
        assert "the power fails" in (caught.value.detail or "")
