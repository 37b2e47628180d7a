# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits counted in the host's kernel, by hist triggers on KVM's tracepoints.

The kernel counts (Documentation/trace/histogram.rst), so nothing can overrun, and the guest
itself starts and stops the counting: CPUID with leaf 0x4e4d0000 enables the histograms
(enable_hist triggers on kvm:kvm_cpuid), a write to port 0x5f1 disables them (disable_hist
triggers on kvm:kvm_pio; one tracepoint cannot hold both for the same event). What ran before
and after, sshd in the guest for one, is not in the numbers.

Which port accesses left the kernel is told by a synthetic event: kvm:kvm_userspace_exit with
reason KVM_EXIT_IO or KVM_EXIT_X86_PCI_CONFIG, matched in the same vCPU thread to the
kvm:kvm_pio before it. For a read of 0xCFC that is the write of 0xCF8 before it, since KVM
traces a read when it completes: so the value tells the config register.

What a mediated PMU was loaded for is told in the same way: the write (or read) of a register that
comes with each load, matched in the same thread to the last kvm:kvm_exit, and to the last
kvm:kvm_userspace_exit, if there was one since the load before: the kernel forgets a variable that
is read in an expression (read_once, kernel/trace/trace_events_hist.c), and one that it does not
have makes no match.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..core.errors import MeasurementError
from ..machines.shell import Shell

MARK_LEAF = 0x4E4D0000
MARK_PORT = 0x5F1

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC

KVM_EXIT_IO = 2
KVM_EXIT_X86_PCI_CONFIG = 44
"""include/uapi/linux/kvm.h; the latter as the series pci-config-cache numbers it"""

_T = "/sys/kernel/tracing"
_USER_PIO = "nm_pio_user"
_LOAD = "nm_pmu_load"
_LOAD_USER = "nm_pmu_load_user"
_SYNTHETIC = {
    _USER_PIO: "unsigned int port; unsigned int rw; unsigned int val",
    _LOAD: "unsigned int exit_reason",
    _LOAD_USER: "unsigned int reason",
}
"""Events of our own, by their fields."""
_LOADS = (_LOAD, _LOAD_USER)
"""Those that say what a mediated PMU is loaded for."""
_EVENTS = ("kvm_exit", "kvm_userspace_exit", "kvm_pio", "kvm_mmio", "kvm_msr")
_HISTS = {
    "kvm_exit": "hist:keys=exit_reason:size=512:pause",
    "kvm_userspace_exit": "hist:keys=reason:size=256:pause",
    "kvm_pio": "hist:keys=port,rw,size:size=1024:pause",
    "kvm_mmio": "hist:keys=type,gpa.buckets=4096:size=8192:pause",
    "kvm_msr": "hist:keys=ecx,write:size=2048:pause",
}


@dataclass(frozen=True)
class Switches:
    """How loads of a mediated PMU show in the tracepoints of MSRs: ``accesses`` for each load.

    ``event`` is ``read_msr`` or ``write_msr``.
    """

    event: str
    msr: int
    accesses: int


AMD_SWITCHES = Switches("write_msr", 0xC0000303, 1)
"""PERF_CNTR_GLOBAL_STATUS_SET: the kernel writes it whenever it loads a mediated PMU, and nowhere
else (amd_mediated_pmu_load)."""
INTEL_SWITCHES = Switches("read_msr", 0x38E, 2)
"""IA32_PERF_GLOBAL_STATUS: the kernel reads it whenever it loads a mediated PMU and again when it
puts it (intel_mediated_pmu_load, intel_mediated_pmu_put). So does the host's perf at an overflow,
so this is sound only while a mediated PMU keeps perf's events out."""
_ACCESSES = {one.event: one.accesses for one in (AMD_SWITCHES, INTEL_SWITCHES)}

MMIO_READ_UNSATISFIED, MMIO_READ, MMIO_WRITE = 0, 1, 2
"""include/trace/events/kvm.h, KVM_TRACE_MMIO_*"""


def _start(switches: Switches | None) -> str:
    """All triggers; ``switches``: those on the host's own accesses to an MSR, too."""
    counted = [*(("kvm", name) for name in _EVENTS), ("synthetic", _USER_PIO)]
    lines = [f"cd {_T} || exit 1", _stop()]
    for event in (_USER_PIO, *(_LOADS if switches else ())):
        lines.append(f"echo '{event} {_SYNTHETIC[event]}' >> synthetic_events || exit 1")
    # the variables that the match needs: the last port access of each vCPU thread
    lines.append(
        "echo 'hist:keys=common_pid:nmport=port,nmrw=rw,nmval=val' "
        ">> events/kvm/kvm_pio/trigger || exit 1"
    )
    lines.append(
        "echo 'hist:keys=common_pid:onmatch(kvm.kvm_pio)."
        f"{_USER_PIO}($nmport,$nmrw,$nmval) "
        f"if reason == {KVM_EXIT_IO} || reason == {KVM_EXIT_X86_PCI_CONFIG}' "
        ">> events/kvm/kvm_userspace_exit/trigger || exit 1"
    )
    for event, hist in _HISTS.items():
        lines.append(f"echo '{hist}' >> events/kvm/{event}/trigger || exit 1")
    lines.append(
        "echo 'hist:keys=port,rw,val:size=8192:pause' >> "
        f"events/synthetic/{_USER_PIO}/trigger || exit 1"
    )
    if switches:
        loads = f"events/msr/{switches.event}/trigger"
        lines.append(
            f"echo 'hist:keys=msr:size=128:pause if msr == {switches.msr}' >> {loads} || exit 1"
        )
        counted.append(("msr", switches.event))
        for event, cause, field in (
            (_LOAD, "kvm_exit", "exit_reason"),
            (_LOAD_USER, "kvm_userspace_exit", "reason"),
        ):
            lines.append(
                f"echo 'hist:keys=common_pid:nm{field}={field}' "
                f">> events/kvm/{cause}/trigger || exit 1"
            )
            lines.append(
                f"echo 'hist:keys=common_pid:nmfor{field}=$nm{field}*1:"
                f"onmatch(kvm.{cause}).{event}($nmfor{field}) "
                f"if msr == {switches.msr}' >> {loads} || exit 1"
            )
            lines.append(
                f"echo 'hist:keys={field}:size=512:pause' "
                f">> events/synthetic/{event}/trigger || exit 1"
            )
            counted.append(("synthetic", event))
    for system, event in counted:
        lines.append(
            f"echo 'enable_hist:{system}:{event} if function == {MARK_LEAF}' "
            ">> events/kvm/kvm_cpuid/trigger || exit 1"
        )
        lines.append(
            f"echo 'disable_hist:{system}:{event} if port == {MARK_PORT}' "
            ">> events/kvm/kvm_pio/trigger || exit 1"
        )
    return "\n".join(lines)


def _stop() -> str:
    """Remove every trigger of ours, those that refer to others first; may be run at any time."""
    events = " ".join(f"kvm/{event}" for event in ("kvm_cpuid", "kvm_pio", *_EVENTS))
    synthetic = " ".join(_SYNTHETIC)
    ours = " ".join(f"synthetic/{event}" for event in _SYNTHETIC)
    return rf"""
for try in 1 2 3; do
  for e in {events} {ours} msr/read_msr msr/write_msr; do
    f=events/$e/trigger
    [ -e $f ] || continue
    grep -v '^#' $f | sed -e 's/ \[[a-z]*\]$//' -e 's/:unlimited//' | while read -r t; do
      echo "!$t" >> $f 2>/dev/null
    done
  done
done
for e in {synthetic}; do
  [ -e events/synthetic/$e ] && echo "!$e" >> synthetic_events 2>/dev/null
done
true
"""


_READ = f"cd {_T} && " + " && ".join(
    [
        *(
            f"echo '=== {system}/{event}' && cat events/{system}/{event}/hist"
            for system, event in (
                *(("kvm", name) for name in _EVENTS),
                ("synthetic", _USER_PIO),
                *(("msr", name) for name in _ACCESSES),
            )
        ),
        *(
            f"if [ -e events/synthetic/{event} ]; then echo '=== synthetic/{event}' && "
            f"cat events/synthetic/{event}/hist; fi"
            for event in _LOADS
        ),
    ]
)


@dataclass(frozen=True)
class Hist:
    """One histogram: how many events, by the values of its keys."""

    keys: tuple[str, ...]
    hits: Mapping[tuple[str, ...], int]
    dropped: int


@dataclass(frozen=True)
class Exits:
    """The exits between two marks of the guest, the marks' own already taken out.

    ``reasons``: all exits by hardware exit reason; ``userspace``: returns of KVM_RUN by
    KVM_EXIT_* reason; ``pio``: port accesses by (port, "in" or "out"); ``pio_user``: those of
    them that left the kernel; ``config_user``: exits to userspace for a config register, by
    what was last written to 0xCF8; ``mmio``: (type, page of the guest's physical address in bytes);
    ``msr``: (MSR, "read" or "write"); ``pmu_switches``: loads of a mediated PMU into hardware,
    None where they were not counted; ``loads``: those after an exit, by its hardware exit reason;
    ``loads_userspace``: those of them after a return of KVM_RUN, by KVM_EXIT_* reason.
    """

    reasons: Mapping[str, int]
    userspace: Mapping[int, int]
    pio: Mapping[tuple[int, str], int]
    pio_user: Mapping[tuple[int, str], int]
    config_user: Mapping[int, int]
    mmio: Mapping[tuple[int, int], int]
    msr: Mapping[tuple[int, str], int]
    pmu_switches: int | None = None
    loads: Mapping[str, int] = field(default_factory=dict)
    loads_userspace: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Exits of all reasons."""
        return sum(self.reasons.values())

    @property
    def total_userspace(self) -> int:
        """Exits that returned to QEMU."""
        return sum(self.userspace.values())

    def ports(self, first: int, last: int) -> int:
        """Accesses to the ports of a range, both directions."""
        return sum(n for (port, _), n in self.pio.items() if first <= port <= last)

    def ports_userspace(self, first: int, last: int) -> int:
        """Those of them that left the kernel."""
        return sum(n for (port, _), n in self.pio_user.items() if first <= port <= last)

    def mmio_reads(self, start: int, end: int) -> int:
        """MMIO reads of the guest's physical addresses from ``start`` to below ``end``."""
        return sum(
            n for (kind, page), n in self.mmio.items() if kind == MMIO_READ and start <= page < end
        )

    def mmio_reads_userspace(self, start: int, end: int) -> int:
        """Those of them that the kernel could not answer."""
        return sum(
            n
            for (kind, page), n in self.mmio.items()
            if kind == MMIO_READ_UNSATISFIED and start <= page < end
        )


def parse_hists(text: str) -> dict[str, list[Hist]]:
    """The ``hist`` files of the events, one after another, each behind ``=== system/event``."""
    found: dict[str, list[Hist]] = {}
    for part in re.split(r"^=== ", text, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [_parse_hist(chunk) for chunk in body.split("# event histogram")[1:]]
    return found


_ENTRY = re.compile(r"^\{ (?P<keys>.*?) \} .*?hitcount:\s*(?P<hits>\d+)", re.M)


def _parse_hist(chunk: str) -> Hist:
    info = re.search(r"trigger info: hist:keys=([^:\s]+)", chunk)
    keys = tuple(key.split(".")[0] for key in (info[1].split(",") if info else ()))
    hits: dict[tuple[str, ...], int] = {}
    for entry in _ENTRY.finditer(chunk):
        values = dict(re.findall(r"([a-z_]+)\s*:\s*(~?\s*[^,]+?)\s*(?:,|$)", entry["keys"]))
        key = tuple(values.get(name, "?").strip() for name in keys)
        hits[key] = hits.get(key, 0) + int(entry["hits"])
    dropped = re.search(r"Dropped: (\d+)", chunk)
    return Hist(keys, hits, int(dropped[1]) if dropped else 0)


def parse_exits(text: str) -> Exits:
    """The counts of one measured interval; MeasurementError if any event was lost."""
    hists = parse_hists(text)

    def one(name: str, keys: tuple[str, ...]) -> Mapping[tuple[str, ...], int]:
        for hist in hists.get(name, []):
            if hist.keys == keys:
                if hist.dropped:
                    raise MeasurementError(
                        f"the trace lost {hist.dropped} events of {name}",
                        hint="its histogram is too small for this load",
                    )
                return hist.hits
        raise MeasurementError(f"the trace has no histogram of {name} by {', '.join(keys)}")

    def direction(value: str) -> str:
        return "out" if _number(value) else "in"

    def by_cause(event: str, key: str) -> Mapping[tuple[str, ...], int]:
        return one(f"synthetic/{event}", (key,)) if hists.get(f"synthetic/{event}") else {}

    pio = {
        (_number(port), direction(rw)): 0
        for port, rw, _ in one("kvm/kvm_pio", ("port", "rw", "size"))
    }
    for (port, rw, _), count in one("kvm/kvm_pio", ("port", "rw", "size")).items():
        pio[_number(port), direction(rw)] += count
    user: dict[tuple[int, str], int] = {}
    config_user: dict[int, int] = {}
    for (port, rw, val), count in one(f"synthetic/{_USER_PIO}", ("port", "rw", "val")).items():
        key = (_number(port), direction(rw))
        user[key] = user.get(key, 0) + count
        if key == (CONFIG_ADDRESS, "out"):
            address = _number(val) & ~3
            config_user[address] = config_user.get(address, 0) + count
    reasons = {key[0]: count for key, count in one("kvm/kvm_exit", ("exit_reason",)).items()}
    userspace = {
        _number(key[0]): count for key, count in one("kvm/kvm_userspace_exit", ("reason",)).items()
    }
    # The end mark's exit is counted before its port access stops the counting; the begin mark's
    # exit comes before the counting, and never leaves the kernel.
    for table in (pio, user):
        table.pop((MARK_PORT, "out"), None)
    for reason in list(reasons):
        if reason in IO_REASONS and reasons[reason]:
            reasons[reason] -= 1
            break
    return Exits(
        reasons=reasons,
        userspace=userspace,
        pio=pio,
        pio_user=user,
        config_user=config_user,
        mmio={
            (_number(kind), _number(page.strip("~ ").split("-")[0])): count
            for (kind, page), count in one("kvm/kvm_mmio", ("type", "gpa")).items()
        },
        msr={
            (_number(ecx), "write" if _number(write) else "read"): count
            for (ecx, write), count in one("kvm/kvm_msr", ("ecx", "write")).items()
        },
        pmu_switches=next(
            (
                sum(one(f"msr/{event}", ("msr",)).values()) // accesses
                for event, accesses in _ACCESSES.items()
                if hists.get(f"msr/{event}")
            ),
            None,
        ),
        loads={reason: count for (reason,), count in by_cause(_LOAD, "exit_reason").items()},
        loads_userspace={
            _number(reason): count for (reason,), count in by_cause(_LOAD_USER, "reason").items()
        },
    )


IO_REASONS = ("123", "30")
"""Exit reason of a port access: SVM_EXIT_IOIO 0x7b, EXIT_REASON_IO_INSTRUCTION 30."""


def _number(text: str) -> int:
    text = text.strip().lstrip("~").strip()
    return int(text, 16) if text.lower().startswith("0x") else int(text)


@dataclass(frozen=True)
class Tracer:
    """The counting on one host; made by ``counting``."""

    shell: Shell

    def on(self, *, switches: Switches | None = None) -> None:
        """Put the triggers on, all counts zero; ``switches``: on loads of the PMU, too."""
        self.shell.run(_start(switches), deadline_s=60)

    def off(self) -> None:
        """Take the triggers off: counting slows every exit, so nothing is timed under it."""
        self.shell.run(f"cd {_T} && {_stop()}", deadline_s=60)

    def raw(self) -> str:
        """The histograms' text as the kernel prints it."""
        return self.shell.run(_READ, deadline_s=60).stdout

    def read(self) -> Exits:
        """The counts since ``on``."""
        return parse_exits(self.raw())


@contextmanager
def counting(shell: Shell) -> Iterator[Tracer]:
    """A tracer for the host's tracepoints; its triggers are gone when the context ends."""
    missing = shell.run(
        f"for e in {' '.join(_EVENTS)}; do [ -e {_T}/events/kvm/$e ] || echo $e; done; "
        f"[ -e {_T}/synthetic_events ] || echo synthetic_events; "
        f"[ -e {_T}/events/kvm/kvm_pio/hist ] || echo hist",
        deadline_s=60,
    ).stdout.split()
    if missing:
        raise MeasurementError(
            f"{shell.name}: the host's kernel lacks {', '.join(missing)} in {_T}",
            hint="it needs CONFIG_HIST_TRIGGERS, CONFIG_SYNTH_EVENTS and the kvm module",
        )
    tracer = Tracer(shell)
    try:
        yield tracer
    finally:
        with contextlib.suppress(MeasurementError):
            tracer.off()
