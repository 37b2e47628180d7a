# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``suite``: kvm-unit-tests and the kernel's selftests, as the user built them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..machines.lab import Lab
from ..patches.series import load_series
from ..runs import execute, plan, suites
from ..runs.suites import Outcome, Suite
from .common import Commands, listed, own_builds, server_of, target, variants_of

SUITES = {"kvm-unit-tests": suites.kvm_unit_tests, "selftests": suites.selftests}


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "suite",
        "run KVM developers' own suites on vanilla, off and on, and compare what passes",
        command,
    )
    target(one)
    own_builds(one)
    one.add_argument("suite", choices=tuple(SUITES), help="which suite")
    one.add_argument("folder", type=Path, metavar="DIR", help="where you built it")
    one.add_argument(
        "--only", action="append", metavar="TEST", help="only these tests; a list with commas"
    )
    one.add_argument(
        "--variant",
        action="append",
        metavar="VARIANT",
        help="only these variants; a list with commas; of a kernel or QEMU of yours vanilla alone"
        " is the default",
    )
    one.add_argument(
        "--series",
        action="append",
        metavar="NAME",
        help="switch on only these series; a list with commas",
    )
    one.add_argument(
        "--against",
        type=Path,
        metavar="RESULTS",
        help="compare with vanilla of an earlier run of the suite, by its folder",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    folder = options.folder.expanduser()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="name the folder where you built it")
    suite = SUITES[options.suite](folder.resolve()).only(listed(options.only))
    before = None if options.against is None else suites.read(options.against)
    if before is not None and "vanilla" not in before:
        raise UsageError(f"{options.against} has no outcomes of vanilla")
    every = load_series(conf.repo / "patches", known=plan.known())
    wanted = execute.chosen(
        conf, every, variants_of(listed(options.variant)), listed(options.series)
    )
    server = server_of(options)
    cache = Cache(conf.cache_dir).open()
    if server is not None:
        execute.answers(server)
    lab = Lab.build(conf, cache, wanted, server=server)
    results = _folder(conf.results_dir)
    with cache.lock(f"run-{server.name}" if server else "testbed"):
        found = suites.run(lab, suite, wanted, results)
    suites.write(found, suite, results / "results.json")
    status = tell(suite, found, before)
    ui.say(f"results and logs: {results}")
    return status


def _folder(results: Path) -> Path:
    """A new folder for a run of a suite."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
    for number in itertools.count(1):
        folder = results / (f"suite-{stamp}" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def tell(
    suite: Suite,
    found: Mapping[str, Mapping[str, Outcome]],
    before: Mapping[str, Mapping[str, Outcome]] | None = None,
) -> int:
    """Print what passed and what changed; the exit status.

    It is 1 where something passes on vanilla and not elsewhere; where there is nothing to compare,
    if something failed.
    """
    for label, outcomes in found.items():
        counts = {
            status: sum(one.status == status for one in outcomes.values())
            for status in ("pass", "fail", "skip")
        }
        text = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        print(f"{suite.name} on {label}: {text}")
    first = next(iter(found))
    base: Mapping[str, Outcome]
    if before is not None:
        names = {name for outcomes in found.values() for name in outcomes}
        base = {name: one for name, one in before["vanilla"].items() if name in names}
        others = dict(found)
    else:
        base = found[first]
        others = {label: outcomes for label, outcomes in found.items() if label != first}
    for name, one in sorted(base.items()):
        if one.status != "pass":
            where = "before" if before is not None else f"on {first}"
            print(f"  {one.status} {where}: {name}: {one.reason}")
    if not others:
        return Exit.FAILED if any(one.status == "fail" for one in base.values()) else Exit.OK
    status = Exit.OK
    for change in suites.compare(base, others):
        for name in change.lost:
            one = found[change.variant].get(name, Outcome("fail", "not there"))
            print(f"LOST on {change.variant}: {name}: {one.status} {one.reason}".rstrip())
            status = Exit.FAILED
        for name in change.gained:
            print(f"gained on {change.variant}: {name}")
        if not change.lost and not change.gained:
            print(f"{change.variant}: what passes is the same")
    return status
