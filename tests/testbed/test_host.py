# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated host as a host by SSH, and what happens when things go wrong on it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pci_config_cache import patched_qemu, start_qemu

from nearmetal.cli import main as cli
from nearmetal.core import ui
from nearmetal.core.cache import Cache
from nearmetal.core.errors import EnvironmentBroken, MeasurementError, UsageError
from nearmetal.core.model import Measurement, Missing, Subject
from nearmetal.core.settings import Settings
from nearmetal.machines.equipment import Equipment
from nearmetal.machines.guest import running_guest
from nearmetal.machines.host import Host, reach
from nearmetal.machines.inventory import HOST, End, Server, Tool
from nearmetal.machines.lab import Lab
from nearmetal.machines.shell import connect
from nearmetal.measure import tools
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.patches import variants
from nearmetal.probes import routes, topology
from nearmetal.probes.tracing import counting
from nearmetal.runs import execute
from nearmetal.runs import plan as plans

pytestmark = pytest.mark.testbed


def test_host_says_that_it_is_emulated(host: Host) -> None:
    assert host.facts.provenance == "emulated"
    assert host.facts.kvm_module == "kvm_amd"
    assert host.shell.run("test -c /dev/kvm", check=False).status == 0


def test_two_runs_do_not_share_a_host(host: Host) -> None:
    with pytest.raises(UsageError, match="another run is in progress"):
        reach("second", host.shell.address, work=host.work)


def in_an_inventory(host: Host, folder: Path, **more: object) -> Path:
    """A file that knows the host as ``by-address``, with further keys."""
    address = host.shell.address
    entry = {
        "address": address.host,
        "port": address.port,
        "key": str(address.key),
        "host_key": address.host_key,
        **more,
    }
    path = folder / "inventory.yaml"
    path.write_text(json.dumps({"hosts": {"by-address": entry}}))
    return path


def test_doctor_shows_the_switch_of_a_host_of_an_inventory(
    host: Host,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host given by its address: its switch as the host's own registers have it."""
    peer, disk = host.p2p["peer"], host.p2p["disk"]
    inventory = in_an_inventory(host, tmp_path)
    monkeypatch.setattr(ui.out, "width", 400)  # no cell of the table on two lines
    saved = tmp_path / "survey"
    words = ["doctor", "--host", "by-address", "--inventory", str(inventory)]
    files = "find / -xdev -newer /tmp/before -type f; find / -xdev -newer /tmp/before -type d"
    with host.vfio([peer]):
        host.shell.run("touch /tmp/before; sleep 1")
        status = cli.main([*words, "--save-survey", str(saved)])
        said = capfd.readouterr().out
        # logs of logins aside
        written = host.shell.run(files).stdout.split()
        assert [one for one in written if not one.startswith(("/var/log", "/run"))] == []
        assert cli.main(["doctor", "--survey", str(saved)]) == 0
        assert "owner nobody" in capfd.readouterr().out
    assert status == 0
    ports = dict(
        line.split()
        for line in host.shell.run(
            "for p in $(lspci -D -d 104c:8233 | cut -d' ' -f1); do "
            "echo $p $(setpci -s $p ECAP_ACS+6.W); done"
        ).stdout.splitlines()
    )
    assert set(ports.values()) == {"001d"}
    counted = routes.read(host.shell)
    assert set(counted.acs) == set(ports)
    assert counted.total == routes.NOTHING
    for port in ports:
        assert f"  {port} 104c:8233 port, ACS SV+RR+CR+UF (redirects)" in said
    assert f"{peer} 1b36:0010 class 010802, driver vfio-pci, " in said
    assert "owner nobody" in said
    in_the_way = re.findall("no direct peer-to-peer: ([^│]*)", said)
    assert f"{disk} is the host's (driver nvme) [not the user's]" in map(str.strip, in_the_way)
    # both below the other root port; the inner one of its two switches has one of them alone
    others = sorted(host.cascade.values())
    assert sorted(one.strip() for one in in_the_way if disk not in one) == [
        *(f"{one} is the host's (driver nvme) [not the user's]" for one in others),
        "does not have two functions below different ports",
    ]


def test_survey_sees_who_has_a_function_open(host: Host) -> None:
    disk = host.p2p["disk"]
    device = f"$(ls /sys/bus/pci/devices/{disk}/vfio-dev)"
    with host.vfio([disk]):
        program = host.shell.start(f"exec 9<> /dev/vfio/devices/{device}; echo open; exec cat")
        assert program.channel.recv(16) == b"open\n"
        owner = topology.survey(host.shell).functions[disk].owner
        program.close()
    assert owner.startswith("cat (pid ")


COPIES = "device_to_device_memcpy_write_ce"


def stand_in(host: Host) -> str:
    """A program on the host that prints what nvbandwidth prints of COPIES, by its source."""
    sample = Path(__file__).parents[1] / "unit" / "data" / "tools" / "from-source-nvbandwidth.json"
    host.shell.put(sample, "/tmp/sample")
    host.shell.run(
        "printf '#!/bin/sh\\ncat /tmp/sample\\n' > /tmp/nvbandwidth; chmod 755 /tmp/nvbandwidth"
    )
    return "/tmp/nvbandwidth"


def test_a_tool_s_figures_have_the_host_s_registers_with_them(host: Host, tmp_path: Path) -> None:
    """A stand-in prints what NVIDIA's tool would; ports and functions are the host's own."""
    functions = (host.p2p["peer"], host.p2p["disk"])
    program = stand_in(host)
    there = Tool("nvbandwidth", program, (End(HOST),), functions, tests=(COPIES,), runs=1)
    missing = Tool("perftest", "ib_write_bw", (End(HOST), End(HOST)), functions)
    asked = dataclasses.replace(host, equipment=Equipment(tools=(there, missing)))
    unit = Unit(Subject("vanilla", None, tools.OUTSIDE.name))
    found = tools.measure(Bench(asked, None, None, unit, tmp_path, tools.OUTSIDE))
    assert [one.reason for one in found if isinstance(one, Missing)] == [
        "perftest: testbed has no program ib_write_bw"
    ]
    rows = [one for one in found if isinstance(one, Measurement)]
    assert len(rows) == 6
    for one in rows:
        assert one.provenance == "emulated"
        assert one.context["acs"] == "SV+RR+CR+UF"
        assert (one.context["ats"], one.context["relaxed_ordering"]) == ("absent", "off")


def test_failing_and_endless_commands(host: Host) -> None:
    with pytest.raises(MeasurementError, match="ended with status 3"):
        host.shell.run("echo why; exit 3")
    begun = time.monotonic()
    with pytest.raises(MeasurementError, match="did not end within 2 s") as caught:
        host.shell.run("echo hello; sleep 60", deadline_s=2)
    assert "hello" in str(caught.value.detail)
    # where both CPUs are, twice: a host that hangs may say nothing on its console
    assert str(caught.value.detail).count(" RIP=") == 4
    assert str(caught.value.detail).count(" IRR=") == 2
    assert time.monotonic() - begun < 15


def test_no_access_goes_astray_while_the_memory_map_changes(host: Host) -> None:
    """A CPU of QEMU 10.0's TCG used entries of its TLB with the memory map of later.

    The disk has lower addresses than the peer's memory, so that what lies above it moves in the
    emulator's table of sections when it is switched off and on.
    """
    peer, disk = host.p2p["peer"], host.p2p["disk"]
    place = "/sys/bus/pci/devices"
    for one in (peer, disk):
        host.shell.run(f"echo {one} > {place}/{one}/driver/unbind && setpci -s {one} COMMAND=6:6")
    try:
        done = host.shell.run(
            f"nm-remap {place}/{disk}/config {place}/{peer}/resource2 5", deadline_s=120
        )
    finally:
        for one in (peer, disk):
            host.shell.run(f"echo {one} > /sys/bus/pci/drivers_probe")
    found = json.loads(done.stdout)
    assert found["switches"] > 50
    assert found["reads"] > 10000
    assert found["wrong"] == 0


@pytest.mark.parametrize("value", ["on", "auto", "nonsense"])
def test_config_cache_on_a_kernel_without_it(
    conf: Settings, cache: Cache, host: Host, value: str
) -> None:
    """QEMU refuses those who insist, and tells the others."""
    done = start_qemu(host, patched_qemu(conf, cache), value)
    if value == "on":
        assert done.status == 1
        assert "KVM can't serve PCI config reads" in done.stdout
    elif value == "auto":
        assert done.status == 0, done.stdout
        assert "PCI config reads are served by QEMU: KVM can't" in done.stdout
    else:
        assert done.status == 1
        assert "'nonsense'" in done.stdout


def test_wrong_key(host: Host, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with pytest.raises(UsageError, match="refuses the login"):
        connect("testbed", dataclasses.replace(host.shell.address, key=key), deadline_s=30)


def test_wrong_host_key(host: Host) -> None:
    assert host.shell.address.key is not None
    other = " ".join(host.shell.address.key.with_suffix(".pub").read_text().split()[:2])
    with pytest.raises(UsageError, match="another host key"):
        connect("testbed", dataclasses.replace(host.shell.address, host_key=other), deadline_s=30)


def test_nobody_answers() -> None:
    from nearmetal.machines.shell import Address

    with pytest.raises(EnvironmentBroken, match=r"no SSH at root@127\.0\.0\.1:1 "):
        connect("nobody", Address("127.0.0.1", 1), deadline_s=2)


def test_a_splat_on_the_host_is_noticed(host: Host) -> None:
    host.forget_log()
    host.check()
    # level 7 stays off the console, which is read as well when the host goes down
    host.shell.run("echo '<7>WARNING: CPU: 0 PID: 1 at test' > /dev/kmsg")
    with pytest.raises(MeasurementError, match="the host's kernel says"):
        host.check()
    host.check()


def test_counting_leaves_no_trigger_behind(host: Host) -> None:
    left = "cat /sys/kernel/tracing/events/kvm/*/trigger | grep -v '^#' | wc -l"
    with counting(host.shell) as tracer:
        tracer.on()
        tracer.on()
        assert int(host.shell.run(left).stdout) > 10
        assert tracer.read().total == 0
        tracer.off()
        assert int(host.shell.run(left).stdout) == 0
        tracer.on()
    assert int(host.shell.run(left).stdout) == 0
    assert "nm_pio_user" not in host.shell.read("/sys/kernel/tracing/synthetic_events")


def test_guest_that_cannot_start_says_why(
    conf: Settings, cache: Cache, built: Lab, vanilla: variants.Config, host: Host,
    tmp_path: Path,
) -> None:  # fmt: skip
    parts = built.guest_parts(vanilla, host, [])
    broken = dataclasses.replace(parts, extra=("-device", "no-such-device"))
    with (
        pytest.raises(MeasurementError, match="QEMU did not start") as caught,
        running_guest(host, broken, logs=tmp_path, label="broken"),
    ):
        pass
    assert "no-such-device" in str(caught.value.detail)


def test_function_without_iommu_group_is_refused(host: Host) -> None:
    with pytest.raises(MeasurementError, match="ended with status 1") as caught:
        host.bind_vfio("0000:7f:00.0")
    assert "no function 0000:7f:00.0" in str(caught.value.detail)


KILLED = """
import sys
from pathlib import Path
from nearmetal.core import settings
from nearmetal.core.cache import Cache
from nearmetal.core.settings import Settings
from nearmetal.machines.lab import Lab
from nearmetal.patches import variants
cache_dir, logs = Path(sys.argv[1]), Path(sys.argv[2])
conf = Settings(settings.repository(), cache_dir, logs)
cache = Cache(cache_dir).open()
config = variants.configs((), ("vanilla",))[0]
lab = Lab.build(conf, cache, [config])
with lab.host(config, logs) as host:
    print("up", flush=True)
    sys.stdin.read()
"""


def test_kill_9_takes_the_emulator_along(conf: Settings, cache: Cache, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(conf.cache_dir), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    emulators = emulators_of(child.pid)
    assert len(emulators) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{emulators[0]}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{emulators[0]}").exists()


def emulators_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and b"nearmetal-testbed" in line:
            found.append(int(folder.name))
    return found


@pytest.mark.nightly
def test_host_given_only_by_its_address_gives_the_same_measurements(
    conf: Settings, cache: Cache, built: Lab, vanilla: variants.Config, host: Host,
    tmp_path: Path,
) -> None:  # fmt: skip
    """As a server of an inventory: what it needs is copied there; counts are the same.

    Its inventory asks for a tool that the guest does not have, and says that it may be missing.

    Nightly: it takes two minutes.
    """
    tool = Tool("nvbandwidth", "nvbandwidth", (End(),), tuple(host.p2p.values()), optional=True)
    server = Server("by-address", host.shell.address, host.p2p, 1, 2048, tools=(tool,))
    lab = dataclasses.replace(built, server=server)
    found = execute.Gathered()
    with lab.host(vanilla, tmp_path) as other:
        assert other.store is None
        work = plans.work([vanilla], ("lspci", "p2p", "tools"), other.equipment)
        execute.measure_units(lab, other, work, tmp_path, found)
    assert found.missing == []
    reason = "nvbandwidth: guest (vanilla) has no program nvbandwidth"
    assert [one.reason for one in found.skipped] == [reason]
    (row,) = [
        one
        for one in found.measurements
        if one.name == "lspci.exits"
        and one.context.get("path") == "cf8"
        and one.context.get("pass") == "second"
    ]
    assert row.values == (13 * 64 * 2.0,) * 3
    assert row.provenance == "emulated"
    assert row.subject.testbed is None


@pytest.mark.nightly
def test_a_run_on_a_host_of_an_inventory_has_its_tools_figures(
    conf: Settings, host: Host, tmp_path: Path
) -> None:
    """The main job as a user of a server starts it. Nightly: it boots a guest."""
    tool = {
        "tool": "nvbandwidth",
        "command": stand_in(host),
        "at": "host",
        "functions": list(host.p2p.values()),
        "tests": [COPIES],
        "runs": 1,
    }
    inventory = in_an_inventory(host, tmp_path, p2p=dict(host.p2p), tools=[tool])
    words = ["run", "--host", "by-address", "--inventory", str(inventory), "--only", "tools"]
    words += ["--variant", "vanilla", "--results-dir", str(tmp_path / "results")]
    ran = subprocess.run(
        [sys.executable, "-m", "nearmetal", *words, "--cache-dir", str(conf.cache_dir)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    report = json.loads((tmp_path / "results" / "latest" / "report.json").read_text())
    bad = [check for check in report["checks"] if check["status"] in ("fail", "error")]
    assert (ran.returncode, bad) == (0, []), ran.stderr[-1000:]
    assert report["run"]["host"] == "by-address"
    told = [row for row in report["measurements"] if row["name"] == "p2p.tool_gb_s"]
    assert {row["context"]["acs"] for row in told} == {"SV+RR+CR+UF"}
    moved = [row for row in report["measurements"] if row["name"] == "p2p.corrupt_bytes"]
    assert [any(row["values"]) for row in moved] == [False, False]
    assert "pass" in {check["status"] for check in report["checks"]}


def test_reach_needs_root(host: Host) -> None:
    host.shell.run(
        "grep -q ^plain: /etc/passwd || { echo 'plain:x:1000:1000::/tmp:/bin/sh' >> /etc/passwd; "
        "mkdir -p /tmp/.ssh; cp /root/.ssh/authorized_keys /tmp/.ssh/; "
        "chown -R 1000:1000 /tmp/.ssh; "
        "chmod 755 /tmp; }"
    )
    with pytest.raises(UsageError):
        reach("plain", dataclasses.replace(host.shell.address, user="plain"), deadline_s=20)
