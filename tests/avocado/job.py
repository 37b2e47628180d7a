# SPDX-License-Identifier: GPL-2.0-or-later
"""The nightly: one avocado job a host, whose suites come from the registry.

    python tests/avocado/job.py [--quick] [--list] [--tags WORDS] [--series NAME] [--host NAME] ...

Each test of the main job on each emulated host (or server) is a suite, and so is each long stage.
So is each guest of a file for avocado's varianter (--guests; guests.yaml, without --quick).
A test that a host cannot run is cancelled with the reason. Everything runs, then comes the verdict.
One test at a time runs on a host; servers have a job each, side by side, since this harness drives
a server by SSH from here: avocado's remote spawner would need avocado on the server.

At the end all reports of a host are one night in the history, and page.html is the morning page.
Exit status: 0 green; 1 red; 2 wrong use; 3 the night could not be recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avocado.core.job import Job
from avocado.core.suite import TestSuite
from avocado.core.varianter import Varianter

from nearmetal.cli.historycmd import FILE_NAME, revision_of
from nearmetal.core import settings
from nearmetal.core.errors import Exit, NearmetalError, UsageError
from nearmetal.core.text import nearest
from nearmetal.core.ui import tell_error
from nearmetal.machines import inventory
from nearmetal.machines.emulators import EMULATORS
from nearmetal.machines.equipment import Equipment, of_server
from nearmetal.measure import registry
from nearmetal.measure.api import Test
from nearmetal.nights import changes, page
from nearmetal.nights.history import Night, of_report, opened, together
from nearmetal.patches.series import load_series
from nearmetal.patches.variants import available, configs
from nearmetal.report import document
from nearmetal.runs import plan

HERE = Path(__file__).resolve().parent
GUESTS = HERE / "guests.yaml"
PYTEST = f"{sys.executable} -m pytest"
SHAPE = ("guest_cpus", "guest_memory", "guest_cpu")
"""What a guest of a file may have: options of ``nearmetal run``."""
MINUTES = 60
GRACE_S = 120


@dataclass(frozen=True)
class Stage:
    """A long stage: a command, its time in seconds, and whether ``--quick`` has it."""

    name: str
    command: str
    timeout: int
    quick: bool = False
    environment: str = ""


STAGES = (
    Stage("unit", f"{PYTEST} -q tests/unit", 30 * MINUTES, quick=True),
    Stage("kasan", f"{PYTEST} -v tests/testbed/test_debug_kernel.py", 180 * MINUTES),
    Stage("selftests", f"{PYTEST} -v tests/testbed/test_kernel_selftests.py", 180 * MINUTES),
    Stage(
        "random-programs",
        f"{PYTEST} -v -s tests/testbed/test_pci_config_cache_guest.py"
        " tests/testbed/test_pci_config_live_guest.py",
        360 * MINUTES,
        environment="NEARMETAL_FUZZ_OPERATIONS=100000",
    ),
    Stage("mutants", f"{PYTEST} -v tests/mutants -m nightly", 360 * MINUTES),
    Stage("planted", f"{PYTEST} -v tests/planted -m nightly", 180 * MINUTES),
    Stage(
        "testbed",
        f"{PYTEST} -v tests/testbed -m nightly --durations=10"
        " --ignore tests/testbed/test_debug_kernel.py"
        " --ignore tests/testbed/test_kernel_selftests.py",
        360 * MINUTES,
    ),
    Stage("validate", f"{sys.executable} -m nearmetal validate --full", 360 * MINUTES),
)


@dataclass(frozen=True)
class Planned:
    """A suite to be: its name, the file of its test, its parameters, its tags, its time in s."""

    name: str
    file: str
    parameters: dict[str, str]
    tags: tuple[str, ...]
    timeout: int


def planned(
    *,
    quick: bool,
    host: str | None = None,
    hosts: Path = Path(),
    series: Sequence[str] = (),
    variants: str = "",
    guests: Path | None = None,
) -> list[Planned]:
    """All suites of a host's job, in order; ``host`` None: the emulated hosts and the stages.

    With ``series`` only these are on, with ``variants`` (a list with commas) only these are
    measured. ``guests`` is a file of guests. Raises UsageError.
    """
    on = {"series": " ".join(series)} if series else {}
    on |= {"variants": variants} if variants else {}
    if host is not None:
        equipment = of_server(inventory.pick(hosts, host))
        where = {"host": host, "inventory": str(hosts), **on}
        every = [_measure(one, host, _lack(one, equipment), where) for one in _tests()]
        return every + (_of_guests(guests, host, where) if guests else [])
    found = []
    for kind in EMULATORS:
        equipment = plan.equipment_of(kind)
        for one in _tests():
            found.append(_measure(one, kind, _lack(one, equipment), {"testbed": kind, **on}))
    if guests:
        found += _of_guests(guests, None, on)
    for stage in STAGES:
        if not quick or stage.quick:
            words = {"command": stage.command, "environment": stage.environment}
            tags = ("stage", stage.name)
            found.append(Planned(stage.name, "stage.py", words, tags, stage.timeout))
    return found


def _of_guests(file: Path, host: str | None, more: dict[str, str]) -> list[Planned]:
    """A suite for each guest of a file of avocado's varianter and each of its tests."""
    found = []
    for name, words in guests_of(file):
        tests = words.pop("tests", "lspci").split()
        kind = words.pop("testbed", next(iter(EMULATORS)))
        parameters = {**more, **({} if host else {"testbed": kind}), **words}
        for test in tests:
            if test not in registry.tests():
                raise UsageError(f"{file}: {name}: there is no test '{test}'")
            one = _measure(registry.tests()[test], host or kind, None, parameters)
            tags = (*one.tags, "guest", name)
            found.append(dataclasses.replace(one, name=f"{one.name}-{name}", tags=tags))
    return found


def guests_of(file: Path) -> list[tuple[str, dict[str, str]]]:
    """The leaves of a YAML file as avocado's yaml_to_mux reads it: name and parameters."""
    keys = ("yaml_to_mux.inject", "yaml_to_mux.filter_only", "yaml_to_mux.filter_out")
    config: dict[str, Any] = {key: [] for key in keys}
    config |= {"yaml_to_mux.files": [str(file)], "yaml_to_mux.parameter_paths": ["/run/*"]}
    if not file.is_file():
        raise UsageError(f"{file} does not exist", hint=f"{GUESTS} shows the format")
    varianter = Varianter()
    varianter.parse(config)
    found = []
    for variant in varianter.itertests():
        words = {k: str(v) for node in variant["variant"] for k, v in node.environment.items()}
        if unknown := sorted(set(words) - {"tests", "testbed", *SHAPE}):
            raise UsageError(f"{file}: unknown key '{unknown[0]}'", hint=nearest(unknown[0], SHAPE))
        name = "-".join(node.path.rsplit("/", 1)[-1] for node in variant["variant"])
        found.append((name, words))
    return found


def _tests() -> list[Test]:
    return list(registry.tests().values())


def _lack(test: Test, equipment: Equipment) -> str | None:
    """Why a host can measure nothing of a test."""
    if reason := equipment.missing(test.needs):
        return reason
    if equipment.testbed:  # what its devices are is known when it is up
        functions = dict.fromkeys(registry.functions(), "?")
        pair = {"peer": "?", "disk": "?"}
        equipment = dataclasses.replace(equipment, p2p=pair, functions=functions)
    series = load_series(settings.repository() / "patches", known=plan.known())
    work = plan.work(configs(series, available(series)), (test.name,), equipment)
    if not work:
        return "no series that is built into what is run names it"
    lacks = [test.lacks(equipment, one.unit) for one in work]
    return lacks[0] if lacks and all(lacks) else None


def _measure(test: Test, where: str, lack: str | None, parameters: dict[str, str]) -> Planned:
    kind = "server" if "host" in parameters else "testbed"
    words = {"test": test.name, **parameters}
    if lack:
        words["skip"] = f"{where} cannot run {test.name}: {lack}"
    tags = ("measure", kind, where, test.name)
    return Planned(f"{where}-{test.name}", "measure.py", words, tags, 180 * MINUTES)


def chosen(every: Sequence[Planned], tags: str) -> list[Planned]:
    """Those that have one of the groups of tags: ``lspci,amd`` is both, a blank is or."""
    groups = [set(group.split(",")) for group in tags.split()]
    return [one for one in every if not groups or any(group <= set(one.tags) for group in groups)]


def suites(every: Sequence[Planned]) -> list[TestSuite]:
    """Avocado's suites."""
    found = []
    for one in every:
        config: dict[str, Any] = {
            "resolver.references": [str(HERE / one.file)],
            "run.dict_variants": [
                {"suite": one.name, "deadline": str(one.timeout), **one.parameters}
            ],
            "run.dict_variants.variant_id_keys": ["suite"],
            "run.max_parallel_tasks": 1,
            # the test itself ends what it started when its time is over; this is for one that hangs
            "task.timeout.running": one.timeout + GRACE_S,
        }
        suite = TestSuite.from_config(config, name=one.name)
        for runnable in suite.tests:
            runnable.tags = dict.fromkeys(("nearmetal", *one.tags))
        found.append(suite)
    return found


def run_job(every: Sequence[Planned], base: Path) -> tuple[int, Path]:
    """Run a host's job below ``base``; avocado's exit status, and the job's folder."""
    base.mkdir(parents=True, exist_ok=True)
    config = {
        "datadir.paths.logs_dir": str(base),
        "run.results_dir": str(base),
        "run.max_parallel_tasks": 1,
        "run.failfast": False,
        "job.run.result.html.enabled": True,
        "sysinfo.collect.enabled": False,
        "core.show": ["app"],
    }
    for kind in ("json", "xunit", "tap"):
        config[f"job.run.result.{kind}.enabled"] = True
    with Job(config, suites(every)) as job:
        status = job.run()
        return status, Path(job.logdir)


def gathered(folder: Path, number: str, revision: str) -> list[Night]:
    """The reports below a job's folder as nights, one a host."""
    by_host: dict[str, list[Night]] = {}
    for file in sorted(folder.glob("test-results/**/report.json")):
        if file.parent.name != document.LATEST:
            night = of_report(document.read(file), revision=revision, folder=str(file.parent))
            by_host.setdefault(night.host, []).append(night)
    return [
        together(f"{number}-{host}", nights, folder=str(folder)) for host, nights in by_host.items()
    ]


def _planned(options: argparse.Namespace, host: str | None) -> list[Planned]:
    return planned(
        quick=options.quick,
        host=host,
        hosts=options.inventory,
        series=options.series or (),
        variants=options.variant,
        guests=options.guests or (None if options.quick else GUESTS),
    )


def _one_host(host: str | None, options: argparse.Namespace, base: Path) -> None:
    every = _planned(options, host)
    status, folder = run_job(chosen(every, options.tags), base / (host or "testbed"))
    (base / f"{host or 'testbed'}.job").write_text(f"{status} {folder}\n")


def night(options: argparse.Namespace) -> int:
    """The whole night; the exit status."""
    repo = settings.repository()
    results = (options.results_dir or settings.default_results_dir(repo)).absolute()
    number = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    base = results / "nights" / number
    base.mkdir(parents=True)
    hosts = options.host or [None]
    jobs = [multiprocessing.Process(target=_one_host, args=(one, options, base)) for one in hosts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    verdicts: list[changes.Verdict] = []
    broken: list[str] = []
    ran: list[page.Ran] = []
    with opened(results / FILE_NAME) as history:
        for name in (one or "testbed" for one in hosts):
            mark = base / f"{name}.job"
            if not mark.exists():
                broken.append(f"the job of {name} ended before its time")
                continue
            folder = Path(mark.read_text().split(" ", 1)[1].strip())
            ran += page.ran(folder, base)
            for one in gathered(folder, number, revision_of(repo)):
                before = history.nights()
                history.add(one)
                verdicts.append(changes.judge(one, before))
        past = history.nights(limit=page.TREND)
    whole = page.Morning(number, tuple(verdicts), tuple(past), tuple(ran), tuple(broken))
    document.write_atomically(base / "page.html", page.render(whole))
    document.write_atomically(base / "summary.txt", whole.line() + "\n")
    print(whole.line())
    print(f"page: {base / 'page.html'}")
    return int(Exit.OK if whole.good else Exit.FAILED)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the long stages")
    parser.add_argument("--list", action="store_true", help="list the suites, and run nothing")
    parser.add_argument(
        "--tags", default="", metavar="WORDS", help="'lspci,amd' is both, a blank between is or"
    )
    parser.add_argument(
        "--series", action="append", metavar="NAME", help="only this series is on; may be repeated"
    )
    parser.add_argument("--variant", default="", metavar="NAMES", help="only these, with commas")
    parser.add_argument(
        "--guests", type=Path, metavar="FILE", help="guests for avocado's varianter (guests.yaml)"
    )
    parser.add_argument("--host", action="append", metavar="NAME", help="a server; may be repeated")
    parser.add_argument("--inventory", type=Path, default=Path("inventory.yaml"), metavar="FILE")
    parser.add_argument("--results-dir", type=Path, metavar="DIR")
    options = parser.parse_args()
    options.inventory = options.inventory.absolute()
    try:
        if not options.list:
            return night(options)
        for host in options.host or [None]:
            for one in chosen(_planned(options, host), options.tags):
                skip = one.parameters.get("skip")
                said = f"  cancelled: {skip}" if skip else ""
                print(f"{one.name:18} {','.join(one.tags)}{said}")
        return int(Exit.OK)
    except NearmetalError as error:
        tell_error(error)
        return int(error.status)


if __name__ == "__main__":
    sys.exit(main())
