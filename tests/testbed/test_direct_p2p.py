# SPDX-License-Identifier: GPL-2.0-or-later
"""Series direct-p2p in the emulated host: nobody else's functions are ever within reach.

The program nm-vfio stands for a VMM that does whatever suits it: it has an NVMe read and write
any bus address. Four functions are below the switch: ``peer`` and ``disk`` are its own,
``third`` (with memory behind a BAR, in a hotplug slot) and ``virtual`` (with SR-IOV, in a slot
that is none for hotplug) are, in turn, nobody's, the host's or another process's.

Nothing that is under test is asked whether it did right: ACS Control is read from the ports'
config space, the routes from the emulator's counters, and the third function's memory from its
BAR.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from errno import E2BIG, EACCES, EAGAIN, EBUSY, EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EPERM
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from nearmetal import builds
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError
from nearmetal.core.settings import Settings
from nearmetal.machines.host import Host, count_iommu_faults
from nearmetal.machines.lab import Lab
from nearmetal.measure import p2p
from nearmetal.patches import series, variants
from nearmetal.probes import routes
from nearmetal.sources import archive as sources

pytestmark = pytest.mark.testbed

NEEDED = ("linux/direct-p2p",)

_PORT = "xio3130-downstream,bus=up0,acs=on"
BELOW = (
    *("-device", f"{_PORT},id=dn2,port=3,chassis=13,slot=13"),
    *("-device", "nvme,serial=nmthird,id=third,cmb_size_mb=2,bus=dn2"),
    *("-device", f"{_PORT},id=dn3,port=4,chassis=14,slot=14,hotplug=off"),
    *("-device", "nvme-subsys,id=subsystem"),
    "-device",
    "nvme,serial=nmvirtual,subsys=subsystem,bus=dn3,sriov_max_vfs=2,sriov_vq_flexible=4,"
    "sriov_vi_flexible=2,max_ioqpairs=6,msix_qsize=7",
)
"""What the emulator has below the switch beside the two functions of every testbed."""

CMB_BAR = 2
"""The BAR that QEMU's NVMe has its controller memory buffer behind."""
PLACE = 1 << 20
"""Offset in it; the host's driver may have queues at its start."""
BYTES = 4096
"""What one command of nm-vfio writes."""
SEED = 0x6E6D
PARAMETER = "/sys/module/vfio_pci_core/parameters/direct_p2p"
PCI = "/sys/bus/pci/devices"
ACS_ID, DVSEC_ID = 0x0D, 0x23
IO, MEMORY, MASTER = 1, 2, 4
"""Of the Command register: I/O Space Enable, Memory Space Enable, Bus Master Enable."""
TOKEN = 0x5A
"""What the user of a PF gives to those whom he lets have its VFs."""
NOT_RESTORED = "ACS Control is not restored"
NOT_KEPT = "a reset changed ACS Control of a claimed switch"
NOT_OWNED = "claimed, although a function below belongs to the host"
ADDED = "a function was added below a claimed switch"
ARRIVED = "bytes arrived at a function of nobody"
STRANGER = "claimed, although a function below was removed and is still there"
ENABLED = "a function of nobody was enabled below a claimed switch"
"""What proofs say when they fail: tests/mutants holds each mutant against its proof's."""
ENABLE, FAILED = 1, 2
"""VFIO_PCI_DIRECT_P2P_ENABLE, VFIO_PCI_DIRECT_P2P_FAILED"""


class Program:
    """A running nm-vfio: one command, one answer."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.running = host.shell.start("exec nm-vfio")
        self._rest = b""
        self.pid = int(self._answer(60)["pid"])

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        channel = self.running.channel
        channel.settimeout(2)
        end = time.monotonic() + deadline_s
        while b"\n" not in self._rest:
            try:
                got = channel.recv(1 << 16)
            except TimeoutError:
                if self.host.shell.watch is not None:
                    self.host.shell.watch()
                if time.monotonic() > end:
                    raise MeasurementError("nm-vfio does not answer") from None
                continue
            if not got:
                raise MeasurementError("nm-vfio has ended")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def tell(self, *words: object) -> None:
        """A command whose answer is fetched later."""
        self.running.channel.sendall((" ".join(map(str, words)) + "\n").encode())

    def answer(self, deadline_s: float = 120.0) -> dict[str, Any]:
        return self._answer(deadline_s)

    def ask(self, *words: object) -> dict[str, Any]:
        self.tell(*words)
        return self._answer(120)

    def do(self, *words: object) -> dict[str, Any]:
        """A command that must succeed."""
        found = self.ask(*words)
        assert found["errno"] == 0, (words, found)
        return found

    def end(self, signal: str = "TERM") -> None:
        self.host.shell.run(
            f"kill -{signal} {self.pid} 2>/dev/null; "
            f"for i in $(seq 900); do [ -d /proc/{self.pid} ] || exit 0; sleep 0.1; done; exit 1",
            deadline_s=180,
        )
        self.running.close()


@dataclass
class Place:
    """The host, its functions below the switch by name, and who uses them."""

    host: Host
    functions: dict[str, str]
    ports: dict[str, str]
    """The downstream port above each function."""
    root_port: str
    acs_at: dict[str, int]
    """Where ACS Control is in a port's config space."""
    before: Mapping[str, int]
    """ACS Control of each port when nothing was claimed yet."""
    qmp_socket: Path
    programs: list[Program] = field(default_factory=list)

    def sh(self, command: str, check: bool = True) -> str:
        return self.host.shell.run(command, check=check, deadline_s=120).stdout.strip()

    def program(self) -> Program:
        one = Program(self.host)
        self.programs.append(one)
        return one

    def acs(self) -> Mapping[str, int]:
        """ACS Control of all ports, as they answer."""
        return self.routes().acs

    def routes(self) -> routes.Ports:
        """As measure.routes reads it, by one program a port instead of fifteen."""
        names = list(self.acs_at)
        files = " ".join(f"{PCI}/{port}/config" for port in names)
        listing = self.sh(f"for f in {files}; do base64 -w 0 $f; echo; done").splitlines()
        acs, routed = {}, {}
        for port, line in zip(names, listing, strict=True):
            config = base64.b64decode(line)
            acs[port] = word(config, self.acs_at[port], 2)
            first = extended_capability(config, DVSEC_ID) + 0x10
            count = len(fields(routes.Routed))
            routed[port] = routes.Routed(*(word(config, first + 8 * i, 8) for i in range(count)))
        return routes.Ports(acs, routed)

    def redirects(self, name: str) -> bool:
        """Whether the port above a function sends peers' requests to the root complex."""
        control = self.acs()[self.ports[name]] & p2p.REDIRECT
        assert control in (0, p2p.REDIRECT)
        return control != 0

    def wait_restored(self, deadline_s: float = 30.0) -> None:
        end = time.monotonic() + deadline_s
        while (now := self.acs()) != self.before:
            assert time.monotonic() < end, f"{NOT_RESTORED}: {now}, was {self.before}"

    def is_restored(self) -> None:
        """Nothing is left of a claim in the ports."""
        now = self.acs()
        assert now == self.before, f"{NOT_RESTORED}: {now}, was {self.before}"

    def settle(self) -> None:
        """All functions are there, and wait for a user of VFIO."""
        if any(not self.there(address) for address in self.functions.values()):
            self.sh("echo 1 > /sys/bus/pci/rescan")
        self.sh(f"echo 0 > {PCI}/{self.functions['virtual']}/sriov_numvfs", check=False)
        for address in self.functions.values():
            self.host.bind_vfio(address)

    def there(self, address: str) -> bool:
        return self.host.shell.run(f"test -d {PCI}/{address}", check=False).status == 0

    def to_host(self, name: str) -> None:
        """Let the host's driver have a function."""
        self.host.unbind_vfio(self.functions[name])
        assert self.driver(name) == "nvme"

    def to_nobody(self, name: str) -> None:
        """Neither a driver of the host nor vfio-pci has the function."""
        self.host.unbind_vfio(self.functions[name])
        self.sh(f"echo {self.functions[name]} > {PCI}/{self.functions[name]}/driver/unbind")
        assert self.driver(name) == ""

    def stay_awake(self, name: str) -> None:
        """A function that nobody uses goes to D3, where its memory doesn't answer."""
        control = f"{PCI}/{self.functions[name]}/power/control"
        # without CONFIG_PM there is none
        self.sh(f"[ ! -e {control} ] || echo on > {control}")

    def command(self, name: str) -> int:
        """The Command register of a function."""
        return int(self.sh(f"setpci -s {self.functions[name]} COMMAND"), 16)

    def driver(self, name: str) -> str:
        address = self.functions[name]
        return self.sh(f"basename $(readlink {PCI}/{address}/driver)", check=False)

    def bus_address(self, name: str) -> int:
        """Where the memory of a function lies on the bus, at PLACE."""
        lines = self.sh(f"cat {PCI}/{self.functions[name]}/resource").splitlines()
        return int(lines[CMB_BAR].split()[0], 16) + PLACE

    def memory(self, name: str) -> str:
        return f"{PCI}/{self.functions[name]}/resource{CMB_BAR}"

    def acs_words(self) -> list[str]:
        """The ports above the two functions, as nm-vfio wants them."""
        ports = (self.ports["peer"], self.ports["disk"])
        return [f"{PCI}/{port}/config:{self.acs_at[port]}" for port in ports]

    def acs_from_outside(self) -> Mapping[str, int]:
        """ACS Control of all ports, as the emulator has it: the host needn't run."""
        found = {}
        for port, at in self.acs_at.items():
            bus, device, function = (int(part, 16) for part in re.split("[:.]", port)[1:])
            address = self.ecam + (bus << 20 | device << 15 | function << 12) + at
            words = {"command-line": f"xp /1hx {address:#x}"}
            found[port] = int(self.qmp("human-monitor-command", **words).split()[1], 16)
        return found

    @cached_property
    def ecam(self) -> int:
        """Where the host's config space begins."""
        (line,) = (x for x in self.sh("cat /proc/iomem").splitlines() if "PCI ECAM 0000" in x)
        return int(line.split("-")[0], 16)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command to the emulator, and its answer."""
        import socket

        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.qmp_socket))
            stream = connection.makefile("rw")
            stream.readline()
            for words in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                stream.write(json.dumps(words) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    pass
                assert "error" not in answer, answer
        return answer["return"]


def patched_config(conf: Settings) -> variants.Config:
    """Variant ``off``, which holds every patch; skips while one that is needed is a draft.

    There is no guest, so QEMU's patches are left out.
    """
    every = series.load_series(conf.repo / "patches")
    drafts = [one.label for one in every if one.draft and one.label in NEEDED]
    if drafts:
        pytest.skip(f"not built into what is run yet: {', '.join(drafts)}")
    return dataclasses.replace(variants.configs(every, ("off",))[0], qemu_patches=())


FIND = r"""
for c in /sys/class/nvme/nvme*; do
  echo "$(cat $c/serial) $(basename $(readlink -f $c/device)) $(readlink -f $c/device)"
done
"""


def word(config: bytes, at: int, size: int) -> int:
    return int.from_bytes(config[at : at + size], "little")


def extended_capability(config: bytes, wanted: int) -> int:
    """Offset of an extended capability (PCIe r7.0, 7.6.3)."""
    at = 0x100
    while at:
        head = word(config, at, 4)
        if head & 0xFFFF == wanted:
            return at
        at = head >> 20
    raise MeasurementError(f"there is no extended capability {wanted:#x}")


def kernel_with(
    conf: Settings, cache: Cache, config: variants.Config, fragment: str
) -> builds.Kernel:
    """The variant's kernel with a fragment of guest-images/kernel laid over its configuration."""
    linux = sources.obtain(conf, cache, "linux")
    folder = conf.repo / "guest-images" / "kernel"
    fragments = (folder / "base.config", folder / fragment)
    return builds.kernel(conf, cache, linux, patches=config.linux_patches, fragments=fragments)


def debug_kernel(conf: Settings, cache: Cache, config: variants.Config) -> builds.Kernel:
    """The variant's kernel with KASAN, lockdep and KUnit."""
    return kernel_with(conf, cache, config, "debug.config")


@contextmanager
def place_for(
    conf: Settings,
    cache: Cache,
    config: variants.Config,
    logs: Path,
    extra: tuple[str, ...] = BELOW,
    debug: bool = False,
) -> Iterator[Place]:
    """An emulated host with a patched kernel and four functions below its switch.

    With ``debug`` the kernel looks for its own mistakes (debug.config).
    """
    made = Lab.build(conf, cache, [config])
    if debug:
        made.kernels[config.linux_patches] = debug_kernel(conf, cache, config)
    qmp = logs / "qmp"
    words = (*extra, "-qmp", f"unix:{qmp},server=on,wait=off")
    with (
        cache.lock("testbed"),
        made.host(config, logs, extra=words) as host,
    ):
        yield found_place(host, qmp)


def found_place(host: Host, qmp: Path) -> Place:
    """Finds the functions and ports of an emulated host, and allows claims."""
    names = {"nmpeer": "peer", "nmdisk": "disk", "nmthird": "third", "nmvirtual": "virtual"}
    functions, ports, root_port = {}, {}, ""
    for line in host.shell.run(FIND).stdout.splitlines():
        serial, address, path = line.split()
        if address in host.cascade.values():
            continue
        functions[names.get(serial, serial)] = address
        *_, root_port, _, port, _ = path.split("/")
        ports[names.get(serial, serial)] = port
    acs_at = {}
    before = routes.read(host.shell).acs
    for port in before:
        text = host.shell.run(f"base64 {PCI}/{port}/config").stdout
        acs_at[port] = extended_capability(base64.b64decode(text), ACS_ID) + 6
    assert set(before) >= set(ports.values())
    assert all(control & p2p.REDIRECT == p2p.REDIRECT for control in before.values()), before
    assert host.shell.read(PARAMETER).strip() == "N", "it is off unless somebody wants it"
    place = Place(host, functions, ports, root_port, acs_at, before, qmp)
    place.settle()
    owner = place.program()
    peer = open_both(place, owner)
    assert claim(place, owner, peer) == EPERM
    end_programs(place)
    host.shell.run(f"echo Y > {PARAMETER}; echo Y > /sys/module/vfio_pci/parameters/enable_sriov")
    host.forget_log()
    return place


def end_programs(place: Place) -> None:
    while place.programs:
        place.programs.pop().end("KILL")


@pytest.fixture(scope="module")
def machine(
    conf: Settings, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    logs = tmp_path_factory.mktemp("logs")
    with place_for(conf, cache, patched_config(conf), logs) as place:
        yield place


@pytest.fixture
def place(machine: Place) -> Iterator[Place]:
    """The functions wait for users; after the test all is as before, and the kernel is silent."""
    with settled(machine):
        yield machine


@contextmanager
def settled(place: Place) -> Iterator[None]:
    place.settle()
    try:
        yield
    finally:
        end_programs(place)
    assert place.acs() == place.before
    place.host.check()


def open_both(place: Place, program: Program) -> int:
    """The program opens disk and peer; returns the peer's ID in its context."""
    program.do("open", place.functions["disk"])
    return int(program.do("open", place.functions["peer"])["id"])


def start_traffic(place: Place, program: Program) -> None:
    """The initiator runs, and the peer's memory is mapped at its own bus address."""
    address = place.bus_address("peer") - PLACE
    program.do("map", place.functions["peer"], CMB_BAR, hex(address))
    program.do("nvme", place.functions["disk"])


def claim(place: Place, program: Program, peer: int) -> int:
    """Claims the switch for the disk and the function with that ID; returns errno."""
    code = EAGAIN
    for _ in range(100):
        code = int(program.ask("set", place.functions["disk"], ENABLE, 1, 0, peer)["errno"])
        # else the kernel was at work elsewhere
        if code != EAGAIN:
            break
        time.sleep(0.1)
    return code


def release(place: Place, program: Program) -> None:
    program.do("set", place.functions["disk"], 0, 0, 0)


def flags(place: Place, program: Program, name: str = "disk") -> int:
    return int(program.do("get", place.functions[name])["flags"])


def write_to_peer(place: Place, program: Program) -> routes.Routed:
    """The disk writes into the peer's memory: how the bytes went there, and they are all right."""
    program.do("fill", place.memory("peer"), PLACE, BYTES, SEED)
    before = place.routes()
    written = program.do("write", place.functions["disk"], hex(place.bus_address("peer")), 4)
    assert written["bytes"] == 4 * BYTES
    # an NVMe's answer to Identify differs from the pattern nearly everywhere
    assert program.do("differ", place.memory("peer"), PLACE, BYTES, SEED)["bytes"] > BYTES // 2
    return place.routes().total - before.total


def read_from_peer(place: Place, program: Program) -> routes.Routed:
    """The disk takes eight bytes of the peer's memory for its clock, and the right ones."""
    program.do("fill", place.memory("peer"), PLACE, BYTES, SEED)
    wanted = SEED * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFF
    before = place.routes()
    seen = program.do("read", place.functions["disk"], hex(place.bus_address("peer")))["value"]
    # it is a clock: milliseconds have passed since
    assert 0 <= seen - wanted < 60_000
    return place.routes().total - before.total


def attack(place: Place, program: Program, victim: str) -> None:
    """The disk writes to and reads from somebody else's function: nothing arrives."""
    program.do("fill", place.memory(victim), PLACE, BYTES, SEED)
    before, log = place.routes(), place.host.kernel_log().last
    address = hex(place.bus_address(victim))
    program.ask("write", place.functions["disk"], address, 1)
    program.ask("read", place.functions["disk"], address)
    after = place.routes()
    assert program.do("differ", place.memory(victim), PLACE, BYTES, SEED)["bytes"] == 0
    assert (after.total - before.total).direct == 0
    assert (after.total - before.total).translated == 0
    # the attempt was one: it came as far as to the IOMMU
    assert count_iommu_faults(place.host.kernel_log(log).lines) > 0


def nothing_arrives(place: Place, program: Program, victim: str) -> None:
    """The disk writes to and reads from a function of nobody, below a claimed switch.

    That the bytes are where they were is seen when the function answers again.
    """
    before = place.routes()
    address = hex(place.bus_address(victim))
    program.ask("write", place.functions["disk"], address, 1)
    program.ask("read", place.functions["disk"], address)
    seen = place.routes().total - before.total
    assert (seen.direct, seen.redirected, seen.translated) == (0, 0, 0), f"{ARRIVED}: {seen}"
    # the attempt was one: the switch, or the port above the function, had nowhere to send it
    assert seen.unsupported > 0


# -- what is short


def test_only_a_claim_lets_bytes_pass_directly(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    for _ in range(2):
        for seen in (write_to_peer(place, owner), read_from_peer(place, owner)):
            assert seen.direct == 0
            assert seen.redirected > 0
        assert claim(place, owner, peer) == 0
        assert flags(place, owner) == ENABLE
        now = place.acs()
        for name, port in place.ports.items():
            want = place.before[port]
            if name in ("peer", "disk"):
                want = want & ~(p2p.REDIRECT | routes.EC) | routes.TB
            assert now[port] == want, name
        seen = write_to_peer(place, owner)
        assert seen.direct == 4 * BYTES
        assert (seen.redirected, seen.translated, seen.violation, seen.unsupported) == (0, 0, 0, 0)
        seen = read_from_peer(place, owner)
        assert seen.direct == 8
        assert seen.redirected == 0
        release(place, owner)
        assert flags(place, owner) == 0
        place.is_restored()


def test_a_function_of_the_host_keeps_the_switch_from_users(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    for name in ("third", "virtual"):
        place.to_host(name)
        code = claim(place, owner, peer)
        assert code == EPERM, f"{NOT_OWNED}: {name}"
        assert place.acs() == place.before
        if name == "third":
            attack(place, owner, name)
        place.host.bind_vfio(place.functions[name])
    assert claim(place, owner, peer) == 0


def test_a_function_of_another_process_keeps_the_switch_from_users(place: Place) -> None:
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    for name in ("third", "virtual"):
        theirs = other.do("open", place.functions[name])["id"]
        assert claim(place, owner, peer) == EPERM
        # nor does it help to name it: the ID is that of another context
        words = ("set", place.functions["disk"], ENABLE, 2, 0, peer, theirs)
        assert owner.ask(*words)["errno"] in (ENODEV, EINVAL)
        assert flags(place, owner) == 0
        assert place.acs() == place.before
        if name == "third":
            attack(place, owner, name)
        other.do("close", place.functions[name])
    assert claim(place, owner, peer) == 0


def test_a_function_of_nobody_is_kept_from_all(place: Place) -> None:
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    assert claim(place, owner, peer) == 0
    third = place.functions["third"]
    for name in ("third", "virtual"):
        assert other.ask("open", place.functions[name])["errno"] == EPERM
    # nor can a driver of the host have it
    place.sh(
        f"echo > {PCI}/{third}/driver_override; echo {third} > {PCI}/{third}/driver/unbind; "
        f"echo {third} > /sys/bus/pci/drivers/nvme/bind",
        check=False,
    )
    assert place.driver("third") == ""
    # nor is a driver needed to have it decode addresses
    assert place.command("third") & (MEMORY | IO) == 0
    place.sh(f"echo 1 > {PCI}/{third}/enable", check=False)
    assert place.sh(f"cat {PCI}/{third}/enable") == "0", ENABLED
    assert place.command("third") & (MEMORY | IO) == 0
    assert flags(place, owner) == ENABLE
    assert write_to_peer(place, owner).direct == 4 * BYTES
    release(place, owner)
    place.sh(f"echo 1 > {PCI}/{third}/enable")
    assert place.command("third") & MEMORY
    place.sh(f"echo 0 > {PCI}/{third}/enable")
    place.sh(f"echo {third} > /sys/bus/pci/drivers/nvme/bind")
    assert place.driver("third") == "nvme"
    attack(place, owner, "third")
    place.host.bind_vfio(third)
    other.do("open", third)
    assert claim(place, owner, peer) == EPERM
    attack(place, owner, "third")


def test_nothing_reaches_a_function_of_nobody(place: Place) -> None:
    """Who has it next must not find there what the claim's user wrote."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    third = place.functions["third"]
    for bound in (True, False):
        if not bound:
            place.to_nobody("third")
        place.stay_awake("third")
        found = place.command("third")
        assert found & (MEMORY | MASTER) == MEMORY
        other.do("fill", place.memory("third"), PLACE, BYTES, SEED)
        assert claim(place, owner, peer) == 0
        nothing_arrives(place, owner, "third")
        # what is reset gets back what it had
        place.sh(f"echo 1 > {PCI}/{third}/reset")
        assert place.command("third") & (MEMORY | IO) == 0
        nothing_arrives(place, owner, "third")
        assert write_to_peer(place, owner).direct == 4 * BYTES
        release(place, owner)
        assert place.command("third") == found
        assert other.do("differ", place.memory("third"), PLACE, BYTES, SEED)["bytes"] == 0
    # one that may send is for nobody
    place.sh(f"setpci -s {third} COMMAND={found | MASTER:x}")
    assert claim(place, owner, peer) == EBUSY
    assert place.command("third") == found | MASTER
    place.sh(f"setpci -s {third} COMMAND={found:x}")
    # nor one that somebody wants to use
    place.sh(f"echo 1 > {PCI}/{third}/enable")
    assert claim(place, owner, peer) == EBUSY
    place.sh(f"echo 0 > {PCI}/{third}/enable")
    # the claim's user can have it, and is within reach of his other functions then
    place.host.bind_vfio(third)
    assert claim(place, owner, peer) == 0
    owner.do("open", third)
    assert place.command("third") & MEMORY
    assert flags(place, owner) == ENABLE
    owner.do("close", third)
    assert flags(place, owner) == 0
    assert place.command("third") & MEMORY
    # its driver lets it sleep
    place.stay_awake("third")
    attack(place, owner, "third")


def test_nonsense_is_refused_and_changes_nothing(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    disk, big = place.functions["disk"], 0xFFFFFFFF
    own = owner.do("open", place.functions["third"])["id"]
    table: list[tuple[int, tuple[int, ...]]] = [
        (EINVAL, (2, 1, 0, peer)),
        (EINVAL, (4, 1, 0, peer)),
        (EINVAL, (ENABLE | 4, 1, 0, peer)),
        (EINVAL, (ENABLE | 16, 1, 0, peer)),
        (EINVAL, (FAILED, 1, 0, peer)),
        (EINVAL, (ENABLE | FAILED, 1, 0, peer)),
        (EINVAL, (big, 1, 0, peer)),
        (EINVAL, (0, 1, 0, peer)),
        (EINVAL, (ENABLE, 0, 0)),
        (E2BIG, (ENABLE, 257, 0)),
        (E2BIG, (ENABLE, big, 32, peer)),
        (E2BIG, (ENABLE, 0x40000000, 24, peer)),
        (EINVAL, (ENABLE, 1, 8, peer)),
        (EINVAL, (ENABLE, 1, 16, peer)),
        (EINVAL, (ENABLE, 1, 24, peer)),
        (EINVAL, (ENABLE, 1, 27, peer)),
        (EINVAL, (ENABLE, 2, 28, peer)),
        (ENODEV, (ENABLE, 1, 0, 0)),
        (ENODEV, (ENABLE, 1, 0, big)),
        (ENODEV, (ENABLE, 1, 0, 0x7FFFFFFF)),
        (ENODEV, (ENABLE, 2, 0, peer, 0xFFFFFFED)),
        (EINVAL, (ENABLE, 2, 0, peer, peer)),
        (EINVAL, (ENABLE, 3, 0, peer, own, peer)),
        (ENOENT, (0, 0, 0)),
    ]
    for code, words in table:
        assert owner.ask("set", disk, *words)["errno"] == code, words
    assert place.acs() == place.before
    assert flags(place, owner) == 0
    assert owner.ask("set", disk, ENABLE, 2, 0, peer, own)["errno"] == 0
    for words in ((ENABLE, 1, 0, peer), (ENABLE, 1, 0, own)):
        assert owner.ask("set", disk, *words)["errno"] == EBUSY
    for name in ("disk", "peer", "third"):
        assert not place.redirects(name)
    assert place.redirects("virtual")


def test_kill_under_load_ends_the_claim_before_anything_else(place: Place) -> None:
    """Whoever gets the third function then must find redirection on, at that moment."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    assert claim(place, owner, peer) == 0
    owner.do("flood", place.functions["disk"], hex(place.bus_address("peer")))
    other.tell("opens", place.functions["third"], 100, 50, *place.acs_words())
    before = place.routes()
    time.sleep(2)
    loaded = place.routes().total - before.total
    assert loaded.direct > 0
    assert loaded.redirected == 0
    place.sh(f"kill -9 {owner.pid}")
    place.wait_restored()
    at_end = place.routes().total
    seen = other.answer()
    assert (place.routes().total - at_end).direct == 0
    assert seen["refused"] > 0, seen
    assert seen["won"] > 0, seen
    assert (seen["wrong"], seen["other"]) == (0, 0), seen


def test_a_claim_and_an_open_never_both_succeed(place: Place) -> None:
    race(place, 4)


def race(place: Place, seconds: float) -> None:
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    words = place.acs_words()
    owner.tell("claims", place.functions["disk"], peer, seconds, *words)
    other.tell("opens", place.functions["third"], seconds, 0, *words)
    claimed, opened = owner.answer(), other.answer()
    print(claimed, opened)
    for seen in (claimed, opened):
        assert (seen["errno"], seen["wrong"], seen["other"]) == (0, 0, 0), (claimed, opened)
        assert seen["won"] > 0, (claimed, opened)
    assert claimed["refused"] + opened["refused"] > 0, (claimed, opened)


def test_two_users_below_one_switch_never_succeed(place: Place) -> None:
    first, second = place.program(), place.program()
    peer = open_both(place, first)
    second.do("open", place.functions["third"])
    theirs = second.do("open", place.functions["virtual"])["id"]
    first.tell("claims", place.functions["disk"], peer, 2)
    second.tell("claims", place.functions["third"], theirs, 2)
    for program in (first, second):
        seen = program.answer()
        assert (seen["won"], seen["other"]) == (0, 0), seen
        assert seen["refused"] > 0, seen
    assert place.acs() == place.before


def test_resets_leave_the_claim_as_it_is(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    assert claim(place, owner, peer) == 0
    claimed = place.acs()
    disk = place.functions["disk"]
    bus_reset = f"echo 1 > {PCI}/{place.root_port}/reset_subordinate"
    for reset in (
        lambda: owner.do("reset", disk),
        lambda: owner.do("hot-reset", place.functions["peer"]),
        lambda: place.sh(bus_reset),
    ):
        reset()
        now = place.acs()
        assert now == claimed, f"{NOT_KEPT}: {now}, was {claimed}"
        assert flags(place, owner) == ENABLE
        owner.do("nvme", disk)
        assert write_to_peer(place, owner).direct == 4 * BYTES
    release(place, owner)
    assert place.acs() == place.before
    place.sh(bus_reset)
    assert place.acs() == place.before


def test_a_function_that_was_removed_is_still_there(place: Place) -> None:
    """Nobody can own it, and it decodes addresses as before."""
    owner = place.program()
    peer = open_both(place, owner)
    address = place.functions["virtual"]
    place.sh(f"echo 1 > {PCI}/{address}/remove")
    assert not place.there(address)
    code = claim(place, owner, peer)
    assert code == EOPNOTSUPP, STRANGER
    assert place.acs() == place.before
    # the same for a port: what is below it is not known either
    port = place.ports["virtual"]
    place.sh("echo 1 > /sys/bus/pci/rescan")
    place.host.bind_vfio(address)
    assert claim(place, owner, peer) == 0
    release(place, owner)
    place.sh(f"echo 1 > {PCI}/{port}/remove")
    assert claim(place, owner, peer) == EOPNOTSUPP
    place.sh("echo 1 > /sys/bus/pci/rescan")
    assert place.there(address)
    assert claim(place, owner, peer) == EPERM
    place.host.bind_vfio(address)
    assert claim(place, owner, peer) == 0


def test_what_comes_by_a_rescan_waits_for_the_end(place: Place) -> None:
    """It doesn't answer at first: the bus number of its port leads nowhere."""
    owner = place.program()
    peer = open_both(place, owner)
    address, port = place.functions["virtual"], place.ports["virtual"]
    # what sleeps gets its bus numbers back when it wakes up
    place.sh(f"[ ! -e {PCI}/{port}/power/control ] || echo on > {PCI}/{port}/power/control")
    place.sh(f"echo 1 > {PCI}/{address}/remove")
    secondary = place.sh(f"setpci -s {port} SECONDARY_BUS.B")
    place.sh(f"setpci -s {port} SECONDARY_BUS=ff")
    try:
        assert claim(place, owner, peer) == 0
    finally:
        place.sh(f"setpci -s {port} SECONDARY_BUS={secondary}")
    claimed = place.acs()
    place.sh("echo 1 > /sys/bus/pci/rescan")
    place.sh(f"echo 1 > {PCI}/{port}/rescan")
    assert not place.there(address), f"{ADDED}: {address}"
    assert place.acs() == claimed
    release(place, owner)
    assert claim(place, owner, peer) == EOPNOTSUPP
    place.sh("echo 1 > /sys/bus/pci/rescan")
    assert place.there(address)
    assert claim(place, owner, peer) == EPERM


def test_virtual_functions_wait_for_the_end(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    physical = f"{PCI}/{place.functions['virtual']}"
    create = f"echo 2 > {physical}/sriov_numvfs"
    assert claim(place, owner, peer) == 0
    assert place.host.shell.run(create, check=False).status != 0
    assert place.sh(f"cat {physical}/sriov_numvfs") == "0"
    assert flags(place, owner) == ENABLE
    release(place, owner)
    # those that are there decode addresses whatever their Command registers say
    place.sh(create)
    found = place.command("third")
    assert claim(place, owner, peer) == EBUSY
    assert place.acs() == place.before
    assert place.command("third") == found
    place.sh(f"echo 0 > {physical}/sriov_numvfs")
    assert claim(place, owner, peer) == 0


def test_a_function_that_is_being_reset_is_given_back_later(place: Place) -> None:
    """Neither a claim nor its end waits for whoever resets a function of nobody."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    third = place.functions["third"]
    place.stay_awake("third")
    found = place.command("third")
    reset = f"echo 1 > {PCI}/{third}/reset"
    resets = place.host.shell.start(f"for i in $(seq 40); do {reset}; sleep 0.02; done")
    claims = 0
    while not resets.ended:
        claims += claim(place, owner, peer) == 0
        if flags(place, owner) == ENABLE:
            release(place, owner)
        assert place.acs() == place.before
    resets.close()
    assert claims > 0
    wait_for(lambda: place.command("third") == found)
    wait_for(lambda: other.ask("open", third)["errno"] == 0)
    other.do("close", third)
    assert claim(place, owner, peer) == 0


# -- what takes longer


SELFTEST = "vfio_pci_direct_p2p_test"
SELFTEST_DEADLINE_S = 600.0


def run_selftest(conf: Settings, cache: Cache, host: Host, functions: Sequence[str]) -> str:
    """What the kernel's own selftest says about the functions; it must not fail."""
    config = patched_config(conf)
    linux = sources.obtain(conf, cache, "linux")
    folder = builds.kernel_selftests(
        conf, cache, linux, "vfio", (SELFTEST,), patches=config.linux_patches
    )
    done = host.shell.run(
        " ".join([host.place(folder / SELFTEST), *functions]),
        deadline_s=SELFTEST_DEADLINE_S,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.status == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def skipped(told: str) -> list[str]:
    """The tests that a selftest skipped, from TAP (Linux: Documentation/dev-tools/ktap.rst)."""
    return re.findall(r"^ok \d+ (\S+) # SKIP", told, re.M)


def selftest(conf: Settings, cache: Cache, place: Place) -> None:
    """With a third function; but for the test of functions without an IOMMU a skip is no pass."""
    names = [place.functions[name] for name in ("peer", "disk", "third")]
    told = run_selftest(conf, cache, place.host, names)
    assert skipped(told) == ["global.noiommu"]


@pytest.mark.nightly
def test_selftest_passes(conf: Settings, cache: Cache, place: Place) -> None:
    selftest(conf, cache, place)


@pytest.mark.nightly
def test_a_function_that_its_driver_leaves_ends_the_claim(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    address = place.functions["peer"]
    assert claim(place, owner, peer) == 0
    waiting = place.host.shell.start(
        f"echo > {PCI}/{address}/driver_override; echo {address} > {PCI}/{address}/driver/unbind; "
        f"echo {address} > /sys/bus/pci/drivers_probe"
    )
    time.sleep(2)
    # it waits for its user, who is asked to leave, and is still the owner
    assert not waiting.ended
    assert not place.redirects("peer")
    owner.do("close", address)
    place.wait_restored()
    wait_for(lambda: place.driver("peer") == "nvme")
    assert flags(place, owner) == 0
    attack(place, owner, "peer")


@pytest.mark.nightly
def test_a_member_that_is_removed_ends_the_claim(place: Place) -> None:
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    address = place.functions["peer"]
    assert claim(place, owner, peer) == 0
    waiting = place.host.shell.start(f"echo 1 > {PCI}/{address}/remove")
    time.sleep(2)
    assert not waiting.ended
    assert not place.redirects("peer")
    owner.do("close", address)
    place.wait_restored()
    wait_for(lambda: not place.there(address))
    assert flags(place, owner) == 0
    # its slot is one for hotplug, and empty now
    third = owner.do("open", place.functions["third"])["id"]
    assert claim(place, owner, third) == EOPNOTSUPP
    place.sh("echo 1 > /sys/bus/pci/rescan")
    wait_for(lambda: place.driver("peer") == "nvme")
    attack(place, owner, "peer")


@pytest.mark.nightly
def test_a_function_that_is_unplugged_ends_the_claim(place: Place) -> None:
    """And one that is plugged in belongs to the host."""
    owner = place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    third = place.functions["third"]
    assert claim(place, owner, peer) == 0
    place.qmp("device_del", id="third")
    wait_for(lambda: not place.there(third), 60)
    assert flags(place, owner) == 0
    assert place.acs() == place.before
    # the port of a slot that is empty now redirects what will be plugged in there
    assert claim(place, owner, peer) == 0
    release(place, owner)
    # the slot is powered on again only after a while
    time.sleep(5)
    words = {"serial": "nmthird", "cmb_size_mb": 2, "bus": "dn2", "id": "third"}
    place.qmp("device_add", driver="nvme", **words)
    wait_for(lambda: place.there(third) and place.driver("third") == "nvme", 60)
    assert claim(place, owner, peer) == EPERM
    attack(place, owner, "third")
    place.host.bind_vfio(third)
    assert claim(place, owner, peer) == 0


@pytest.mark.nightly
def test_virtual_functions_belong_to_somebody(place: Place) -> None:
    """All to the claim's user: they are his. One to another: refused."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    physical = place.functions["virtual"]
    owner.do("open", physical)
    owner.do("token", physical, TOKEN)
    place.sh(f"echo 2 > {PCI}/{physical}/sriov_numvfs")
    try:
        first, second = (
            place.sh(f"basename $(readlink {PCI}/{physical}/virtfn{i})") for i in range(2)
        )
        assert other.ask("open", second)["errno"] == EACCES
        owner.do("open", first, TOKEN)
        other.do("open", second, TOKEN)
        assert claim(place, owner, peer) == EPERM
        other.do("close", second)
        assert claim(place, owner, peer) == EBUSY
        owner.do("open", second, TOKEN)
        assert claim(place, owner, peer) == 0
        assert write_to_peer(place, owner).direct == 4 * BYTES
        assert other.ask("open", second, TOKEN)["errno"] != 0
        owner.do("close", second)
        assert flags(place, owner) == 0
        assert place.acs() == place.before
    finally:
        end_programs(place)
        place.sh(f"echo 0 > {PCI}/{physical}/sriov_numvfs")


@pytest.mark.nightly
def test_a_switch_that_does_not_answer_is_kept_from_all(place: Place) -> None:
    """The bus number above it leads elsewhere when the claim ends: nobody gets anything."""
    owner, other = place.program(), place.program()
    peer = open_both(place, owner)
    start_traffic(place, owner)
    assert claim(place, owner, peer) == 0
    secondary = place.sh(f"setpci -s {place.root_port} SECONDARY_BUS.B")
    log = place.host.kernel_log().last
    place.sh(f"setpci -s {place.root_port} SECONDARY_BUS=40")
    try:
        place.sh(f"kill -9 {owner.pid}")
        wait_for(lambda: "ACS is not restored" in "\n".join(place.host.kernel_log(log).lines))
        # the owner had none of them open: it is the claim that keeps them
        for name in ("third", "virtual"):
            assert other.ask("open", place.functions[name])["errno"] == EPERM
    finally:
        place.sh(f"setpci -s {place.root_port} SECONDARY_BUS={secondary}")
    place.wait_restored()
    wait_for(lambda: other.ask("open", place.functions["third"])["errno"] == 0)


@pytest.mark.nightly
def test_long_races(place: Place) -> None:
    race(place, 60)


def wait_for(what: Any, deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.3)
