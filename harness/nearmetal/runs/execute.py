# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job: build, boot, measure on every variant, check, report.

It knows no test, set-up or emulator by name: what is measured is in the plan (``plan``), how is in
the tests (``measure``), on what is the lab's (``machines.lab``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..core import ui
from ..core.beside import beside
from ..core.cache import Cache
from ..core.errors import EnvironmentBroken, Exit, MeasurementError, NearmetalError, UsageError
from ..core.model import (
    CheckResult,
    Measurement,
    Missing,
    Report,
    RunInfo,
    Skipped,
    Variant,
)
from ..core.settings import Settings
from ..core.text import nearest
from ..judging import judge
from ..judging.load import Check, load_checks
from ..machines import session
from ..machines.equipment import Equipment, GuestShape, of_server
from ..machines.guest import Guest
from ..machines.host import Host
from ..machines.inventory import Server
from ..machines.lab import Lab
from ..machines.shell import connect
from ..measure.api import Setup
from ..measure.bench import Bench
from ..patches.series import Series, features, load_series
from ..patches.variants import Config, available, configs, names_of
from ..probes.tracing import counting
from ..report import document, tables
from . import plan as plans
from .plan import Work

CPUS_A_TESTBED = 1
"""Emulated hosts are measured beside each other where each has so many CPUs."""
GUEST = "guest"
"""The context key of rows that were measured in guests of a shape that was asked for."""
ANSWER_DEADLINE_S = 15.0
"""For a server's first login, before anything is built."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for; empty ``tests``, ``variants`` and ``series`` mean all.

    Of a kernel or QEMU of the user's no ``variants`` mean vanilla.
    """

    tests: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    series: tuple[str, ...] = ()
    """Those that ``on`` is measured of."""
    testbeds: tuple[str, ...] = ()
    """The emulated hosts, one after another; none means that of the settings."""
    server: Server | None = None
    checks: tuple[Path, ...] = ()
    guest: GuestShape = field(default_factory=GuestShape)
    keep: bool = False
    command: str = ""


@dataclass
class Gathered:
    """What a run gathers."""

    measurements: list[Measurement] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    boot_retries: int = 0
    equipment: Equipment | None = None
    """What the host had when it was up."""


@dataclass(frozen=True)
class Share:
    """What a run does on one host: on an emulated one, or on a server."""

    settings: Settings
    tests: tuple[str, ...]
    equipment: Equipment
    work: tuple[Work, ...]
    server: Server | None
    guest: GuestShape = field(default_factory=GuestShape)

    @property
    def name(self) -> str:
        """The testbed's name, or the server's."""
        return self.equipment.testbed or (self.server.name if self.server else "")


def execute(settings: Settings, options: Options) -> tuple[Exit, Path]:
    """A whole run. Returns the exit status and the run's folder.

    Usage and environment errors are raised before anything is measured; what goes wrong in a
    measurement is in the report, as an error.
    """
    begun, ticks = time.time(), time.monotonic()
    every = load_series(settings.repo / "patches", known=plans.known())
    wanted = chosen(settings, every, options.variants, options.series)
    shares = _shares(settings, options, wanted)
    # checks that come with tests may be of series that these patches lack; a user's are not
    names = names_of(every) if options.checks else None
    rules = load_checks(options.checks or None, series=names)
    cache = Cache(settings.cache_dir).open()
    if options.server is not None:
        answers(options.server)
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime(begun)) + f"-{os.getpid()}"
    folder = settings.results_dir / run_id
    with _folder(folder) as logs:
        labs = [
            Lab.build(share.settings, cache, _configs(share.work), server=share.server)
            for share in shares
        ]
        with cache.lock(f"run-{options.server.name}" if options.server else "testbed"):
            gathered = _measure_all(labs, shares, logs, keep=options.keep)
    results = judge.together(
        {
            share.name: verdicts(share, rules, found)
            for share, found in zip(shares, gathered, strict=True)
        }
    )
    finished = time.time()
    whole = Report(
        run=RunInfo(
            id=run_id,
            started=_stamp(begun),
            finished=_stamp(finished),
            host=options.server.name if options.server else "testbed",
            command=options.command or shlex.join(sys.argv),
            seconds=round(time.monotonic() - ticks, 1),
            cold=any(lab.fresh for lab in labs),
            boot_retries=sum(found.boot_retries for found in gathered),
        ),
        builds=tuple(dict.fromkeys(one for lab in labs for one in lab.records)),
        measurements=tuple(row for found in gathered for row in found.measurements),
        checks=results,
        series=features(every),
    )
    document.write(whole, folder)
    document.publish(settings.results_dir, run_id)
    ui.out.print(tables.render_terminal(whole))
    ui.out.print(f"report: {folder / document.HTML_NAME}", markup=False)
    return judge.exit_status(results), folder


def chosen(
    settings: Settings,
    every: Sequence[Series],
    wanted: Sequence[Variant],
    names: Sequence[str] = (),
) -> tuple[Config, ...]:
    """The variants that are asked for, ``on`` of the series that are named. Raises UsageError."""
    default = available(every)
    if settings.has_own:
        default = ("vanilla", "on") if names else ("vanilla",)
    found = configs(every, wanted or default)
    if not names:
        return found
    if wanted and "on" not in wanted:
        raise UsageError(
            f"--series says what is on, and nothing is in {' and '.join(wanted)}",
            hint="add --variant on, or leave --series out",
        )
    known = [one.series for one in found if one.series is not None]
    for name in names:
        if name in known:
            continue
        if any(one.name == name and one.draft for one in every):
            raise UsageError(
                f"the series '{name}' is a draft, which is not yet built into what is run",
                hint=f"these are: {', '.join(known)}",
            )
        raise UsageError(f"there is no series '{name}' to switch on", hint=nearest(name, known))
    return tuple(one for one in found if one.series is None or one.series in names)


def answers(server: Server) -> None:
    """Raise UsageError or EnvironmentBroken if a server does not let us in."""
    with ui.step(f"reaching {server.name}"):
        connect(
            server.name, server.address, deadline_s=ANSWER_DEADLINE_S, refused_ends=True
        ).close()


def _shares(settings: Settings, options: Options, wanted: Sequence[Config]) -> list[Share]:
    """What is to be done on each host. Raises UsageError where nothing is left of a test."""
    server = options.server
    shares: list[Share] = []
    if server is not None:
        equipment = of_server(server)
        tests = plans.resolve_tests(options.tests, equipment)
        work = plans.work(wanted, tests, equipment)
        shares.append(Share(settings, tests, equipment, work, server, options.guest))
        if any(one.config.linux_patches for one in work):
            ui.warn("a server keeps its running kernel; only QEMU and the guest are changed")
    else:
        kinds = options.testbeds or (settings.testbed,)
        for kind, tests in plans.on_testbeds(options.tests, kinds).items():
            equipment = plans.equipment_of(kind)
            work = plans.work(wanted, tests, equipment)
            here = dataclasses.replace(settings, testbed=kind)
            shares.append(Share(here, tests, equipment, work, None, options.guest))
    for name in options.tests:
        if not any(one.test.name == name for share in shares for one in share.work):
            raise UsageError(
                f"no selected variant runs the test '{name}'",
                hint="it runs for series that list it in patches/series.yaml and are not drafts",
            )
    return shares


def _configs(work: Sequence[Work]) -> list[Config]:
    found: list[Config] = []
    for one in work:
        if one.config not in found:
            found.append(one.config)
    return found


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """The run's folder with its logs; one that stays empty is removed where the run breaks off."""
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentBroken(
            f"the results folder {folder.parent} cannot be written: {error.strerror}",
            hint="choose another with --results-dir",
        ) from None
    try:
        yield logs
    except BaseException:
        with contextlib.suppress(OSError):
            for path in (logs, folder):
                path.rmdir()
        raise


def _logs_of(logs: Path, share: Share, shares: Sequence[Share]) -> Path:
    if len(shares) == 1:
        return logs
    here = logs / share.name
    here.mkdir()
    return here


# --- measuring -------------------------------------------------------------------------------


def _measure_all(
    labs: Sequence[Lab], shares: Sequence[Share], logs: Path, *, keep: bool
) -> list[Gathered]:
    """Measure all shares, beside each other where there are CPUs for it.

    Not where guests are kept for the user: he looks at one after another.
    """
    work = {
        share.name: functools.partial(
            _measure, lab, share, _logs_of(logs, share, shares), keep=keep
        )
        for lab, share in zip(labs, shares, strict=True)
    }
    if len(shares) > 1 and not keep and (os.cpu_count() or 1) >= CPUS_A_TESTBED * len(shares):
        return beside(work)
    return [one() for one in work.values()]


def _measure(lab: Lab, share: Share, logs: Path, *, keep: bool) -> Gathered:
    """Measure all that a share plans."""
    found = Gathered()
    for number, guests in enumerate(plans.grouped(share.work)):
        here = logs
        if number:
            here = logs / f"host-{number + 1}-{_host_label(guests[0][0])}"
            here.mkdir()
        _on_one_host(lab, guests, here, found, share.guest, keep=keep)
    if share.guest.label:  # else rows of guests that differ would have one name
        found.measurements = [
            dataclasses.replace(row, context={**row.context, GUEST: share.guest.label})
            for row in found.measurements
        ]
    derive(share.work, found)
    return found


def _host_label(one: Work) -> str:
    """What tells a host from the plain vanilla one."""
    patched = "patched" if one.config.linux_patches else "vanilla"
    plain = one.setup.host_key == Setup().host_key
    return patched if plain else f"{patched}-{one.setup.name}"


def _on_one_host(
    lab: Lab,
    guests: Sequence[Sequence[Work]],
    logs: Path,
    found: Gathered,
    shape: GuestShape,
    *,
    keep: bool,
) -> None:
    first = guests[0][0]
    left = list(guests)
    try:
        setup = first.setup
        with lab.host(first.config, logs, iommu=setup.iommu, ats=setup.ats) as host:
            found.boot_retries += host.boot_retries
            host.shape, host.equipment = shape, shape.on(host.equipment)
            found.equipment = host.equipment
            while left:
                measure_units(lab, host, left[0], logs, found, keep=keep)
                done = left.pop(0)
    except MeasurementError as error:
        ui.tell_error(error)
        # a host that was found broken at its end has spoiled what was measured last
        for work in left or [done]:
            _give_up(work, error, found)


def measure_units(
    lab: Lab, host: Host, work: Sequence[Work], logs: Path, found: Gathered, *, keep: bool = False
) -> None:
    """Measure units that share a guest, one after another; what breaks is gathered as missing."""
    able = [one for one in work if one.test.lacks(host.equipment, one.unit) is None]
    if not able:
        return
    first, left = able[0], list(able)
    try:
        host.forget_log()
        with ExitStack() as stack:
            guest = None
            if not first.setup.bare:
                guest = stack.enter_context(guest_for(lab, host, first, logs))
                found.boot_retries += guest.boot_retries
            tracer = None if guest is None else stack.enter_context(counting(host.shell))
            while left:
                one = left[0]
                bench = Bench(host, guest, tracer, one.unit, logs, one.setup)
                broke = _one_unit(bench, one, found)
                left.pop(0)
                if broke and guest is not None and not _still_up(guest):
                    raise MeasurementError(
                        f"the guest died during the test {one.test.name}",
                        hint="its console is in the logs of the run",
                    )
            if keep and guest is not None:
                _hold(lab, host, guest)
        if first.setup.after is not None:
            first.setup.after(host)
    except MeasurementError as error:
        ui.tell_error(error)
        # a guest or a host that was found broken at the end has spoiled all of them
        _give_up(left or able, error, found)


@contextmanager
def guest_for(lab: Lab, host: Host, one: Work, logs: Path) -> Iterator[Guest]:
    """The guest of a unit, which its set-up must have; up for as long as the context lasts."""
    setup = one.setup
    parts = lab.guest_parts(one.config, host)
    parts = dataclasses.replace(parts, iommufd=setup.iommufd)
    if setup.control:
        parts = dataclasses.replace(parts, extra=())
    modules = setup.modules or one.config.modules
    if setup.shape is not None:
        parts = setup.shape(host, parts)
    label = one.config.label if setup is one.test.plain else one.subject.label
    with lab.guest(host, one.config, logs, label=label, parts=parts, modules=modules) as guest:
        if host.shape.label:
            has_shape(guest, host.shape)
        yield guest


def has_shape(guest: Guest, shape: GuestShape) -> None:
    """Raise MeasurementError unless a guest is what was asked for, as it sees itself.

    Of its memory (MemTotal, proc_meminfo(5)) the kernel keeps some for itself, less than a quarter.
    """
    said = guest.shell.run("nproc; awk '/^MemTotal:/ { print $2 }' /proc/meminfo").stdout.split()
    cpus, memory_mib = int(said[0]), int(said[1]) / 1024
    wrong = []
    if shape.cpus not in (None, cpus):
        wrong.append(f"{cpus} CPUs and not {shape.cpus}")
    wanted = shape.memory_mib
    if wanted is not None and not 0.75 * wanted <= memory_mib <= wanted:
        wrong.append(f"{memory_mib:.0f} MiB of memory and not {wanted}")
    if shape.cpu is not None:
        path = guest.qmp("query-cpus-fast")[0]["qom-path"]
        kind = guest.qmp("qom-get", path=path, property="type")
        model = re.sub(r"(-v[0-9]+)?-(x86_64|i386)-cpu$", "", kind)
        if model != re.sub(r"-v[0-9]+$", "", shape.cpu):
            wrong.append(f"CPUs of the type {kind} and not {shape.cpu}")
    if wrong:
        raise MeasurementError(
            f"the guest has {'; '.join(wrong)}",
            hint="a set-up of this test decides that itself: leave the option out",
        )


def _one_unit(bench: Bench, one: Work, found: Gathered) -> bool:
    """Measure one unit; whether it broke."""
    with ui.step(f"measuring {one.test.name} on {bench.label}"):
        try:
            rows = one.test.measure(bench)
            if bench.vm is not None:
                bench.vm.check()
        except MeasurementError as error:
            ui.tell_error(error)
            _give_up([one], error, found)
            return True
        except (NearmetalError, OSError):  # no disk, no network: nothing can go on
            raise
        except Exception as error:
            fault = _fault(error, one, bench)
            ui.tell_error(fault)
            _give_up([one], fault, found)
            return True
    for row in rows:
        match row:
            case Measurement():
                found.measurements.append(row)
            case Missing():
                found.missing.append(row)
            case Skipped():
                found.skipped.append(row)
    return False


def _fault(error: Exception, one: Work, bench: Bench) -> MeasurementError:
    """What is said of a test that broke by a mistake of its own: other units go on."""
    log = bench.logs / f"{bench.label}-{one.test.name}-fault.log"
    log.write_text("".join(traceback.format_exception(error)))
    return MeasurementError(
        f"the test {one.test.name} has a fault: {type(error).__name__}: {error}",
        hint=f"the traceback is in {log}",
        detail="".join(traceback.format_exception(error)[-3:]).rstrip(),
    )


def _give_up(work: Sequence[Work], error: MeasurementError, found: Gathered) -> None:
    """All of these units are missing, for one reason, unless another was told before."""
    told = {(entry.test, entry.subject) for entry in found.missing}
    for one in work:
        if (one.test.name, one.subject) in told:
            continue
        found.missing.append(
            Missing(one.test.name, one.subject, error.message, one.test.names, error.detail or "")
        )


def _still_up(guest: Guest) -> bool:
    try:
        guest.shell.run("true", deadline_s=20)
    except MeasurementError:
        return False
    return True


def _hold(lab: Lab, host: Host, guest: Guest) -> None:
    name = lab.server.name if lab.server else "testbed"
    with session.noted(lab.cache, session.Session(host.shell.address, guest.shell.address, name)):
        ui.say("    still up: log in with 'nearmetal ssh host' or '... guest'; Ctrl-C continues")
        with contextlib.suppress(KeyboardInterrupt):
            while _still_up(guest):
                time.sleep(5)


def derive(work: Sequence[Work], found: Gathered) -> None:
    """Add the rows that are made from those of a whole run."""
    tests = {one.test.name: one.test for one in work}
    for test in tests.values():
        for metric in test.metrics:
            if metric.derived is not None:
                found.measurements += metric.derived(found.measurements)


# --- judging ---------------------------------------------------------------------------------


def verdicts(share: Share, rules: Sequence[Check], found: Gathered) -> tuple[CheckResult, ...]:
    """The verdicts on one share."""
    wanted = plans.expected(share.work, found.equipment or share.equipment)
    return judge.judge(
        rules,
        found.measurements,
        found.missing,
        (*wanted.skipped, *found.skipped),
        judge.Plan(
            tests=share.tests,
            names=wanted.names,
            host=share.server.name if share.server else "testbed",
            testbed=share.equipment.testbed,
        ),
    )


def _stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
