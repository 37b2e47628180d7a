# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job: build, boot, measure on every variant, check, report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..builds import all as builds
from ..builds.all import Bochs, Image, Kernel, Qemu
from ..core import ui
from ..core.cache import Cache, sha256_file
from ..core.errors import EnvironmentBroken, Exit, MeasurementError, NearmetalError, UsageError
from ..core.model import Build, CheckResult, Measurement, Missing, Report, RunInfo, Skipped, Variant
from ..core.settings import Settings
from ..judging import checks
from ..machines import inventory
from ..machines.emulators import bochs
from ..machines.emulators import qemu as testbed
from ..machines.guest import Guest, GuestParts, running_guest
from ..machines.host import Host, reach
from ..measure import bench, imc, instructions, lspci, p2p, tools, vmexit
from ..measure.catalogue import CATALOGUE, TESTS, nearest, planned
from ..patches import series
from ..patches.variants import Config, available, configs, mediated
from ..pci.layout import Range
from ..probes import routes
from ..probes.tracing import counting
from ..report import document as report
from ..report import tables
from ..sources.archive import Source, obtain


@dataclass(frozen=True)
class TestCase:
    """A test of the main job: how to measure, and what it must measure."""

    measure: bench.Test
    names: tuple[str, ...]
    needs_p2p: bool = False
    testbed_names: tuple[str, ...] = ()
    """What is measured on an emulated host only."""
    tool_names: tuple[str, ...] = ()
    """What tools measure that the inventory of a server names."""
    function: str | None = None
    """The function of the host that it is about: only variants whose series name the test run it,
    on hosts that have the function."""


TEST_CASES: Mapping[str, TestCase] = {
    "lspci": TestCase(
        lspci.measure,
        lspci.NAMES,
        testbed_names=(*instructions.NAMES, *instructions.COMPARED),
    ),
    "vmexit": TestCase(vmexit.measure, vmexit.NAMES, testbed_names=vmexit.TESTBED_NAMES),
    "p2p": TestCase(
        p2p.measure,
        p2p.NAMES,
        needs_p2p=True,
        testbed_names=p2p.ROUTE_NAMES,
        tool_names=tools.NAMES,
    ),
    "imc": TestCase(imc.measure, imc.NAMES, needs_p2p=True, function="imc"),
}
assert tuple(TEST_CASES) == TESTS


@dataclass(frozen=True)
class Options:
    """What a run is asked for; empty ``tests`` and ``variants`` mean all."""

    tests: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    testbeds: tuple[str, ...] = ()
    """The emulated hosts, one after another; none means that of the settings."""
    server: inventory.Server | None = None
    checks: tuple[Path, ...] = ()
    keep: bool = False
    command: str = ""


@dataclass
class Built:
    """All builds of a run, and whether any of them was made just now."""

    image: Image
    emulator: Qemu | Bochs | None
    counter: Path | None
    kernels: dict[tuple[Path, ...], Kernel]
    qemus: dict[tuple[Path, ...], Qemu]
    records: tuple[Build, ...]
    fresh: bool


@dataclass
class _Found:
    """What a run gathers."""

    measurements: list[Measurement] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    boot_retries: int = 0


@dataclass(frozen=True)
class _Job:
    """What all steps of a run work with; ``logs`` is the run's folder for logs."""

    settings: Settings
    cache: Cache
    built: Built
    logs: Path
    found: _Found


INTEL_TESTS = ("vmexit",)
"""What the ``intel`` testbed is for: code of the CPU. It has no PCI Express."""


def resolve_tests(names: Sequence[str], testbed: str | None = None) -> tuple[str, ...]:
    """The tests by name, all of them for none; UsageError with the nearest name.

    ``testbed`` is the emulated host that they run on (None: a server).
    """
    known = INTEL_TESTS if testbed == "intel" else TESTS
    for name in names:
        if name not in TESTS:
            raise UsageError(f"there is no test '{name}'", hint=nearest(name, TESTS))
        if name not in known:
            raise UsageError(
                f"the {testbed} testbed has no PCI Express for the test '{name}'",
                hint=f"it has {', '.join(known)}; --testbed amd has all",
            )
    return tuple(name for name in known if not names or name in names)


def resolve_on(names: Sequence[str], testbeds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The tests for each of the emulated hosts; one of several that has none of them is left out.

    UsageError as by ``resolve_tests``.
    """
    asked = resolve_tests(names)
    if len(testbeds) == 1 or not names:
        return {kind: resolve_tests(names, kind) for kind in testbeds}
    here = {kind: [name for name in asked if name in resolve_tests((), kind)] for kind in testbeds}
    return {kind: resolve_tests(found, kind) for kind, found in here.items() if found}


def with_setups(
    plan: Sequence[Config], tests: Sequence[str], *, testbed: bool
) -> tuple[Config, ...]:
    """The plan with the set-ups that a variant is measured with beside its plain one.

    Configurations that none of the tests is for are left out. A server's KVM is not reloaded for a
    set-up: its hardware or its kernel may lack what it needs.
    """
    every = [
        one
        for config in plan
        for one in (
            config,
            *((mediated(config),) if testbed and config.variant == "vanilla" else ()),
        )
    ]
    return tuple(one for one in every if measured_by(one, tests))


def build_all(
    settings: Settings, cache: Cache, plan: Sequence[Config], *, with_testbed: bool
) -> Built:
    """Everything that the variants need, from the cache or built now."""
    linux = obtain(settings, cache, "linux")
    qemu_source = obtain(settings, cache, "qemu")
    records: list[Build] = []
    kernels: dict[tuple[Path, ...], Kernel] = {}
    qemus: dict[tuple[Path, ...], Qemu] = {}
    every = [one for one in series.load_series(settings.repo / "patches") if not one.draft]
    emulator_tree: series.TreeName = (
        "testbed-bochs" if settings.testbed == "intel" else "testbed-qemu"
    )
    for_emulator = series.of_tree(every, emulator_tree)
    testbed_patches = tuple(path for one in for_emulator for path in one.patches())
    fresh = False

    def note(
        role: str, config: Config | None, source: Source | str, sha256: str, names: tuple[str, ...]
    ) -> None:
        records.append(
            Build(
                role=role,  # type: ignore[arg-type]
                variant=config.variant if config else "vanilla",
                source=str(source),
                sha256=sha256,
                series=names,
                testbed=settings.testbed if role in ("emulator", "image") else None,
            )
        )

    picture = builds.image(settings, cache)
    fresh |= picture.fresh
    note("image", None, "guest-images/debian.yaml", picture.sha256, ())
    emulator: Qemu | Bochs | None = None
    counter = None
    if with_testbed:
        emulator_source = qemu_source
        if settings.testbed == "intel":
            emulator_source = obtain(settings, cache, "bochs")
            emulator = builds.bochs(settings, cache, emulator_source, patches=testbed_patches)
        else:
            counter = builds.counter(settings, cache, qemu_source)
            emulator = builds.qemu(settings, cache, qemu_source, patches=testbed_patches)
        fresh |= emulator.fresh
        names = tuple(one.name for one in for_emulator)
        note("emulator", None, emulator_source, emulator.sha256, names)
    for config in plan:
        kernel_sets = [("guest-kernel", config.guest_patches)]
        if with_testbed:
            kernel_sets.insert(0, ("host-kernel", config.linux_patches))
        for role, patches in kernel_sets:
            kernel = builds.kernel(settings, cache, linux, patches=patches)
            fresh |= kernel.fresh and patches not in kernels
            kernels[patches] = kernel
            note(role, config, linux, kernel.sha256, config.applied if patches else ())
        inner = builds.qemu(settings, cache, qemu_source, patches=config.qemu_patches)
        fresh |= inner.fresh and config.qemu_patches not in qemus
        qemus[config.qemu_patches] = inner
        applied = config.applied if config.qemu_patches else ()
        note("host-qemu", config, qemu_source, inner.sha256, applied)
    return Built(picture, emulator, counter, kernels, qemus, tuple(dict.fromkeys(records)), fresh)


@contextmanager
def host_for(
    settings: Settings,
    cache: Cache,
    built: Built,
    config: Config,
    server: inventory.Server | None,
    logs: Path,
    found: _Found | None = None,
    *,
    iommu: bool = True,
    ats: bool = False,
    extra: tuple[str, ...] = (),
) -> Iterator[Host]:
    """The host that a variant runs on: the emulated one, booted now, or a server.

    ``iommu``, ``ats`` and ``extra`` are for the emulated one (testbed.Parts).
    """
    if server is not None:
        with cache.lock(f"host-{server.name}"):
            host = reach(server.name, server.address)
            host.p2p, host.assign = server.p2p, server.assign
            host.functions = server.functions
            host.machines, host.tools = server.machines, server.tools
            host.guest_cpus, host.guest_memory_mib = server.guest_cpus, server.guest_memory_mib
            try:
                yield host
            finally:
                host.shell.close()
        return
    assert built.emulator is not None
    kernel = built.kernels[config.linux_patches]
    initramfs = builds.initramfs(settings, cache, kernel, "host", modules=True)
    keys, store = builds.keys(cache), cache.root / "store"
    parts: testbed.Machine
    if isinstance(built.emulator, Bochs):
        things = _for_guests(settings, cache, built)
        parts = bochs.Parts(built.emulator, kernel, initramfs, built.image, keys, store, things)
    else:
        parts = testbed.Parts(
            emulator=built.emulator,
            kernel=kernel,
            initramfs=initramfs,
            image=built.image,
            keys=keys,
            store=store,
            counter=built.counter,
            iommu=iommu,
            ats=ats,
            extra=extra,
        )
    scratch = cache.root / "tmp" / f"testbed-{os.getpid()}"
    with testbed.running_host(parts, logs=logs, scratch=scratch) as (host, machine, retries):
        if found is not None:
            found.boot_retries += retries
        _check_modules(host, kernel)
        if isinstance(built.emulator, Bochs):
            host.guest_memory_mib = bochs.GUEST_MEMORY_MIB
        yield host
        machine.alive()
        machine.console.check()


def _for_guests(settings: Settings, cache: Cache, built: Built) -> tuple[Path, ...]:
    """The files and folders that QEMU needs on the host for the guests of all variants."""
    things: list[Path] = []
    for qemu in built.qemus.values():
        things += [qemu.program, qemu.firmware]
    for kernel in built.kernels.values():
        things += [kernel.image, builds.initramfs(settings, cache, kernel, "guest", modules=False)]
    return tuple(dict.fromkeys(things))


def _check_modules(host: Host, kernel: Kernel) -> None:
    """Raise MeasurementError unless the host's KVM modules are those of the build."""
    folder = f"lib/modules/{kernel.release}"
    for path in sorted((kernel.modules / folder).rglob("kvm*.ko")):
        there = f"/{folder}/{path.relative_to(kernel.modules / folder)}"
        seen = host.shell.run(f"sha256sum {shlex.quote(there)}", check=False).stdout.split()
        if not seen or seen[0] != sha256_file(path):
            raise MeasurementError(
                f"{host.name}: {there} is not the module that was built for this variant"
            )


def guest_parts(
    settings: Settings,
    cache: Cache,
    built: Built,
    config: Config,
    host: Host,
    assigned: Sequence[str],
) -> GuestParts:
    """What the guest of a variant is made of.

    Raises UsageError where the host has no function that the variant is about.
    """
    kernel = built.kernels[config.guest_patches]
    words = list(config.qemu_args)
    for name in config.functions:
        if name not in host.functions:
            raise UsageError(
                f"the host {host.name} has no function '{name}' for variant {config.label}",
                hint=f"give its address in the inventory, key '{name}'",
            )
        words = [word.replace(f"{{{name}}}", host.functions[name]) for word in words]
    return GuestParts(
        qemu=built.qemus[config.qemu_patches],
        kernel=kernel,
        initramfs=builds.initramfs(settings, cache, kernel, "guest", modules=False),
        image=built.image,
        keys=builds.keys(cache),
        cpus=host.guest_cpus,
        memory_mib=host.guest_memory_mib,
        assigned=tuple(assigned),
        accel=config.accel.get(host.facts.kvm_module, {}),
        extra=tuple(words),
    )


def for_setup(
    parts: GuestParts, setup: p2p.Setup, host: Host
) -> tuple[GuestParts, Mapping[str, Range]]:
    """The guest of one set-up of p2p, and the ranges of its RAM that rows are made for.

    Raises MeasurementError where the set-up wants a switch that redirects, and it does not.
    """
    parts = dataclasses.replace(parts, iommufd=setup.iommufd)
    if setup.control:
        parts = dataclasses.replace(parts, extra=())
    if not setup.direct:
        return parts, p2p.ANYWHERE
    layout = p2p.layout(host)
    parts = dataclasses.replace(
        parts, memory_mib=layout.memory_mib, machine=layout.machine(), host_addresses=True
    )
    if host.store is not None:
        p2p.check_redirected(routes.read(host.shell))
    return parts, {"below-window": layout.below, "behind-window": layout.behind}


def measure_variant(
    settings: Settings,
    cache: Cache,
    built: Built,
    config: Config,
    host: Host,
    tests: Sequence[str],
    logs: Path,
    found: _Found,
    *,
    keep: bool = False,
) -> None:
    """Boot the variant's guest on the host and run the tests in it, one after another.

    A variant with set-ups of its own has a guest for each.
    """
    _measure_variant(_Job(settings, cache, built, logs, found), config, host, tests, keep=keep)


def _measure_variant(
    job: _Job, config: Config, host: Host, tests: Sequence[str], *, keep: bool
) -> None:
    settings, logs, found = job.settings, job.logs, job.found
    left = list(measured_by(config, tests))
    assigned = host.assigned
    inside = [tool for tool in host.tools if tool.in_guest and "p2p" in left]
    if not host.has_nvme_pair:
        for name in [name for name in left if TEST_CASES[name].needs_p2p]:
            left.remove(name)
            reason = f"the host {host.name} has no devices for p2p (inventory: p2p)"
            found.skipped.append(Skipped(name, config.variant, reason, TEST_CASES[name].names))
    for name in [name for name in left if TEST_CASES[name].function]:
        if TEST_CASES[name].function not in host.functions:
            left.remove(name)
            reason = f"the host {host.name} has no function for it (inventory: {name})"
            found.skipped.append(Skipped(name, config.variant, reason, TEST_CASES[name].names))
    if not left and not inside:
        return
    if config.setups:
        for name in config.setups:
            setup = p2p.SETUPS[name]
            with _told(config, setup, found):
                _setup(job, config, setup, host, logs)
        return

    def give_up(error: NearmetalError) -> None:
        if inside:
            found.missing.append(
                Missing("p2p", config.variant, error.message, tools.NAMES, error.detail or "")
            )
        for name in left:
            found.missing.append(
                Missing(
                    name, config.variant, error.message, TEST_CASES[name].names, error.detail or ""
                )
            )
        ui.tell_error(error)

    try:
        host.forget_log()
        host.load_kvm(config.modules)
        with (
            host.parameters(config.modules),
            host.vfio(assigned, config.functions),
            running_guest(
                host,
                guest_parts(settings, job.cache, job.built, config, host, assigned),
                logs=logs,
                label=config.label,
            ) as guest,
            counting(host.shell) as tracer,
        ):
            found.boot_retries += guest.boot_retries
            place = bench.Bench(
                host=host,
                guest=guest,
                tracer=tracer,
                variant=config.variant,
                logs=logs,
                series=config.series,
                testbed=settings.testbed if host.store is not None else None,
                setup=config.setup,
            )
            while left:
                name = left[0]
                _one_test(place, name, found)
                left.pop(0)
                if found.missing and not _still_up(guest):
                    raise MeasurementError(f"the guest did not survive the test {name}")
            if inside:

                def row(name: str, values: Iterable[float], **context: str) -> Measurement:
                    return place.row(name, values, **{"setup": p2p.IOMMU.name, **context})

                outcome = tools.measure(host, guest.shell, inside, row, logs, place.label)
                _add(found, config.variant, outcome)
                inside = []
            if keep:
                _hold(host, guest)
    except MeasurementError as error:
        give_up(error)


def _one_test(place: bench.Bench, name: str, found: _Found) -> None:
    case = TEST_CASES[name]
    with ui.step(f"measuring {name} on {place.label}"):
        try:
            rows = case.measure(place)
            place.guest.check()
        except MeasurementError as error:
            ui.tell_error(error)
            found.missing.append(
                Missing(name, place.variant, error.message, case.names, error.detail or "")
            )
            return
    found.measurements.extend(rows)


def _still_up(guest: Guest) -> bool:
    try:
        guest.shell.run("true", deadline_s=20)
    except MeasurementError:
        return False
    return True


def _hold(host: Host, guest: Guest) -> None:
    ui.say(f"    kept: host {host.shell.address}, guest through it at {guest.shell.address}")
    ui.say(f"    log in with the key {host.shell.address.key}; press Ctrl-C to end")
    with contextlib.suppress(KeyboardInterrupt):
        while _still_up(guest):
            time.sleep(5)


@dataclass(frozen=True)
class _Share:
    """What a run does on one kind of host: an emulated one, or a server."""

    settings: Settings
    tests: tuple[str, ...]
    plan: tuple[Config, ...]
    server: inventory.Server | None = None

    @property
    def testbed(self) -> str | None:
        """The kind of the emulated host, None for a server."""
        return self.settings.testbed if self.server is None else None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of the plan, each once."""
        return tuple(dict.fromkeys(config.variant for config in self.plan))


def execute(settings: Settings, options: Options) -> tuple[Exit, Path]:
    """A whole run. Returns the exit status and the run's folder.

    Usage and environment errors are raised before anything is measured; what goes wrong in a
    measurement is in the report, as an error.
    """
    begun = time.time()
    server = options.server
    every = series.load_series(settings.repo / "patches")
    plan = configs(every, options.variants or available(every))
    if server is not None and [config for config in plan if config.linux_patches]:
        ui.warn("the kernel of a server is measured as it runs; only QEMU and guest are changed")
    shares = [
        _Share(
            dataclasses.replace(settings, testbed=kind),
            tests,
            with_setups(plan, tests, testbed=server is None),
            server,
        )
        for kind, tests in (
            resolve_on(options.tests, options.testbeds or (settings.testbed,)).items()
            if server is None
            else [(settings.testbed, resolve_tests(options.tests))]
        )
    ]
    for name in options.tests:
        if not any(measured_by(one, (name,)) for share in shares for one in share.plan):
            raise UsageError(
                f"none of the variants asked for is measured by '{name}'",
                hint="it is for a series that names it in patches/series.yaml and is no draft",
            )
    rules = checks.load_checks(options.checks or (checks.DEFAULT_CHECKS,))
    cache = Cache(settings.cache_dir).open()
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime(begun)) + f"-{os.getpid()}"
    folder = settings.results_dir / run_id
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentBroken(
            f"the results folder {settings.results_dir} cannot be written: {error.strerror}",
            hint="choose another with --results-dir",
        ) from None
    gathered: list[_Found] = []
    try:
        made = [
            build_all(share.settings, cache, share.plan, with_testbed=server is None)
            for share in shares
        ]
        with cache.lock("testbed" if server is None else f"run-{server.name}"):
            for share, built in zip(shares, made, strict=True):
                here = logs
                if len(shares) > 1:
                    here = logs / share.settings.testbed
                    here.mkdir()
                job = _Job(share.settings, cache, built, here, _Found())
                _measure_share(job, share, options.keep)
                gathered.append(job.found)
    except BaseException:
        _drop_if_empty(folder)
        raise
    results = checks.together(
        {
            share.settings.testbed: _judge(share, rules, found)
            for share, found in zip(shares, gathered, strict=True)
        }
    )
    finished = time.time()
    whole = Report(
        run=RunInfo(
            id=run_id,
            started=_stamp(begun),
            finished=_stamp(finished),
            host=server.name if server else "testbed",
            command=options.command or shlex.join(sys.argv),
            seconds=round(finished - begun, 1),
            cold=any(built.fresh for built in made),
            boot_retries=sum(found.boot_retries for found in gathered),
        ),
        builds=tuple(dict.fromkeys(one for built in made for one in built.records)),
        measurements=tuple(row for found in gathered for row in found.measurements),
        checks=results,
    )
    report.write(whole, folder)
    report.publish(settings.results_dir, run_id)
    ui.console.print(tables.render_terminal(whole))
    ui.say(f"report: {folder / report.HTML_NAME}")
    return checks.exit_status(results), folder


def _measure_share(job: _Job, share: _Share, keep: bool) -> None:
    """Measure all that a share plans; what was found is the job's."""
    for configs_here in _by_host_kernel(share.plan):
        _measure_on_one_host(job, configs_here, share.server, share.tests, keep)
    if "p2p" not in share.tests:
        return
    if share.server is not None:
        _measure_outside(job, share.server, share.plan)
        return
    for config in share.plan:
        if config == Config("vanilla"):
            _measure_setups(job, config)


def _judge(share: _Share, rules: Sequence[checks.Check], found: _Found) -> tuple[CheckResult, ...]:
    """The verdicts on one share; adds to ``found`` what was left out, and what is derived."""
    server, tests, plan, variants = share.server, share.tests, share.plan, share.variants
    names = frozenset(name for test in tests for name in TEST_CASES[test].names)
    only_testbed = {test: TEST_CASES[test].testbed_names for test in tests}
    if server is None:
        names |= {name for here in only_testbed.values() for name in here}
    else:
        reason = "only the testbed's emulated hardware can tell"
        found.skipped.extend(
            Skipped(test, variant, reason, here)
            for variant in variants
            for test, here in only_testbed.items()
            if here
        )
    if share.testbed == "intel":
        names -= frozenset(vmexit.TESTBED_NAMES)
        reason = "Bochs has no plugin that counts instructions beside its counters"
        found.skipped.extend(
            Skipped("vmexit", variant, reason, vmexit.TESTBED_NAMES) for variant in variants
        )
    found.skipped.extend(tools_left_out(server, tests, plan))
    found.measurements.extend(instructions.compared(found.measurements))
    by_variant = {
        variant: {
            test
            for config in plan
            if config.variant == variant
            for test in measured_by(config, tests)
        }
        for variant in variants
    }
    return checks.judge(
        rules,
        found.measurements,
        found.missing,
        found.skipped,
        checks.Plan(
            tests=tests,
            variants=variants,
            names={
                variant: frozenset(n for n in wanted if CATALOGUE[n].test in by_variant[variant])
                | tools_planned(server, variant, by_variant[variant])
                for variant, wanted in planned(names, variants).items()
            },
            host=server.name if server else "testbed",
            testbed=share.testbed,
            series=tuple(dict.fromkeys(config.series for config in plan if config.series)),
        ),
    )


def tools_left_out(
    server: inventory.Server | None, tests: Sequence[str], plan: Sequence[Config]
) -> list[Skipped]:
    """The variants for which no tool is to be run, and why."""
    if "p2p" not in tests:
        return []
    asked = server.tools if server is not None else ()
    found = []
    for variant in dict.fromkeys(config.variant for config in plan):
        inside = any(tool.in_guest for tool in asked)
        if not inside and not any(tool.variant == variant for tool in asked):
            reason = (
                "only a server's inventory names tools to be run (docs/servers.md)"
                if server is None
                else f"the inventory of {server.name} names no tool for {variant}"
            )
            found.append(Skipped("p2p", variant, reason, tools.NAMES))
    planned_as = {(config.variant, config.series) for config in plan}
    for tool in asked:
        if not tool.in_guest and (tool.variant, tool.series) not in planned_as:
            what = " of ".join(word for word in (tool.variant, tool.series) if word)
            reason = f"{tool.tool} is for {what}, which is not part of this run"
            found.append(Skipped("p2p", tool.variant, reason, tools.NAMES))
    return found


def tools_planned(
    server: inventory.Server | None, variant: Variant, tests: Collection[str]
) -> frozenset[str]:
    """What a variant has to have of tools: each that is asked for gives a bandwidth."""
    asked = server.tools if server is not None and "p2p" in tests else ()
    wanted = any(tool.in_guest or tool.variant == variant for tool in asked)
    return frozenset({tools.BANDWIDTH} if wanted else ())


def _measure_on_one_host(
    job: _Job,
    plan: Sequence[Config],
    server: inventory.Server | None,
    tests: Sequence[str],
    keep: bool,
) -> None:
    found, done = job.found, list[Config]()
    try:
        with host_for(job.settings, job.cache, job.built, plan[0], server, job.logs, found) as host:
            for config in plan:
                _measure_variant(job, config, host, tests, keep=keep)
                done.append(config)
    except MeasurementError as error:
        ui.tell_error(error)
        broken = [config for config in plan if config not in done] or list(plan[-1:])
        told = {(entry.test, entry.variant) for entry in found.missing}
        for config in broken:
            for name in measured_by(config, tests):
                if (name, config.variant) not in told:
                    found.missing.append(
                        Missing(
                            name,
                            config.variant,
                            error.message,
                            TEST_CASES[name].names,
                            error.detail or "",
                        )
                    )


def measured_by(config: Config, tests: Sequence[str]) -> tuple[str, ...]:
    """Those of the tests that a variant is measured by."""
    unnamed = not config.tests
    return tuple(
        test
        for test in tests
        if test in config.tests or (unnamed and not TEST_CASES[test].function)
    )


def _measure_setups(job: _Job, config: Config) -> None:
    """The set-ups of p2p beside ``iommu`` that need an emulated host of their own."""
    for setup in (p2p.BARE, p2p.ATS):
        here = job.logs / setup.name
        here.mkdir()
        with (
            _told(config, setup, job.found),
            host_for(
                job.settings,
                job.cache,
                job.built,
                config,
                None,
                here,
                job.found,
                iommu=setup is not p2p.BARE,
                ats=setup is p2p.ATS,
            ) as host,
        ):
            _setup(job, config, setup, host, here)


@contextmanager
def _told(config: Config, setup: p2p.Setup, found: _Found) -> Iterator[None]:
    """What breaks a set-up is told, and is in the report."""
    try:
        yield
    except MeasurementError as error:
        ui.tell_error(error)
        found.missing.append(
            Missing(
                "p2p",
                config.variant,
                f"set-up {setup.name}: {error.message}",
                (*p2p.NAMES, *p2p.ROUTE_NAMES),
                error.detail or "",
            )
        )


def _setup(job: _Job, config: Config, setup: p2p.Setup, host: Host, here: Path) -> None:
    """Measure one set-up of p2p on a host that is up; ``here`` takes its guest's logs."""
    host.forget_log()
    testbed = job.settings.testbed if host.store is not None else None
    row = bench.rows(host, config.variant, config.series, testbed)
    rows: list[Measurement] = []
    ranges = p2p.ANYWHERE
    with contextlib.ExitStack() as stack:
        where: Guest | Host = host
        if setup is not p2p.BARE:
            host.load_kvm(config.modules)
            assigned = host.assigned
            stack.enter_context(host.parameters(config.modules))
            stack.enter_context(host.vfio(assigned))
            parts = guest_parts(job.settings, job.cache, job.built, config, host, assigned)
            parts, ranges = for_setup(parts, setup, host)
            label = f"{config.label}-{setup.name}" if config.setups else config.label
            guest = stack.enter_context(running_guest(host, parts, logs=here, label=label))
            job.found.boot_retries += guest.boot_retries
            where = guest
            if setup is p2p.ATS:
                routes.set_acs(host.shell, routes.read(host.shell), p2p.ATS_CONTROL)
        if host.has_nvme_pair:
            with ui.step(f"measuring p2p, set-up {setup.name}, on {config.variant}"):
                rows = p2p.transfers(host, where, setup, row, job.logs, config.variant, ranges)
        if isinstance(where, Guest):

            def named(name: str, values: Iterable[float], **context: str) -> Measurement:
                return row(name, values, setup=setup.name, **context)

            inside = [tool for tool in host.tools if tool.in_guest]
            label = f"{config.label}-{setup.name}"
            _add(
                job.found,
                config.variant,
                tools.measure(host, where.shell, inside, named, job.logs, label),
            )
    if setup.direct and host.store is not None:
        p2p.check_redirected(routes.read(host.shell))
    job.found.measurements.extend(rows)


def _add(found: _Found, variant: Variant, outcome: tools.Outcome) -> None:
    """What tools gave, into what the run gathers."""
    found.measurements.extend(outcome.rows)
    for reason, detail in outcome.missing:
        found.missing.append(Missing("p2p", variant, reason, tools.NAMES, detail))
    if outcome.skipped:
        found.skipped.append(Skipped("p2p", variant, "; ".join(outcome.skipped), tools.NAMES))


def _measure_outside(job: _Job, server: inventory.Server, plan: Sequence[Config]) -> None:
    """The tools of a server that run in no guest of ours, once each as their variant."""
    for config in plan:
        outside = [
            tool
            for tool in server.tools
            if not tool.in_guest and (tool.variant, tool.series) == (config.variant, config.series)
        ]
        if not outside or config.setup is not None:
            continue
        with host_for(
            job.settings, job.cache, job.built, config, server, job.logs, job.found
        ) as host:
            row = bench.rows(host, config.variant, config.series, None)
            label = f"{config.label}-outside"
            _add(
                job.found,
                config.variant,
                tools.measure(host, None, outside, row, job.logs, label),
            )


def _by_host_kernel(plan: Sequence[Config]) -> list[list[Config]]:
    groups: dict[tuple[Path, ...], list[Config]] = {}
    for config in plan:
        groups.setdefault(config.linux_patches, []).append(config)
    return list(groups.values())


def _stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def _drop_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in (folder / "logs", folder):
            path.rmdir()
