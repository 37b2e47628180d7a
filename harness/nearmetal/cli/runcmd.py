# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``run``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ..core.model import VARIANTS
from ..core.settings import Settings
from ..machines.equipment import GuestShape
from ..measure import registry
from ..runs import execute
from .common import (
    BOTH,
    TESTBEDS,
    Commands,
    common_options,
    listed,
    own_builds,
    server_of,
    target,
    variants_of,
)


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "run", "build, boot, measure, check and report", command, common_options(BOTH)
    )
    target(one)
    own_builds(one)
    one.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEST",
        help=f"only these tests ({', '.join(registry.tests())}); a list with commas",
    )
    one.add_argument(
        "--variant",
        action="append",
        metavar="VARIANT",
        help=f"only these variants ({', '.join(VARIANTS)}); a list with commas; of a kernel or QEMU"
        " of yours vanilla alone is the default",
    )
    one.add_argument(
        "--series",
        action="append",
        metavar="NAME",
        help="switch on only these series (nearmetal list series); a list with commas",
    )
    one.add_argument(
        "--checks",
        action="append",
        type=Path,
        metavar="FILE",
        help="judge by these checks instead of the default ones; may be repeated",
    )
    group = one.add_argument_group("what guests have, in place of what the host's entry says")
    group.add_argument("--guest-cpus", type=_count, metavar="N", help="vCPUs")
    group.add_argument("--guest-memory", type=_count, metavar="MIB", help="memory, in MiB")
    group.add_argument(
        "--guest-cpu", metavar="MODEL", help="the CPUs' model, by QEMU's name (default: host)"
    )
    one.add_argument(
        "--keep",
        action="store_true",
        help="keep host and guest running after the measurements until Ctrl-C",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_ANYWHERE = ("cache_dir", "results_dir", "source_dir", "jobs", "inventory", "verbose", "quiet")
"""Options that do not say what is measured."""


def testbed_of(options: argparse.Namespace) -> str | None:
    """The testbed that is meant: both where no option says what to measure."""
    if options.testbed is not None or options.host is not None:
        name: str | None = options.testbed
        return name
    chosen = [
        key
        for key, value in vars(options).items()
        if value not in (None, False, []) and key not in (*_ANYWHERE, "command", "handler")
    ]
    return None if chosen else BOTH


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    status, _ = execute.execute(
        conf,
        execute.Options(
            tests=tuple(listed(options.only)),
            variants=variants_of(listed(options.variant)),
            series=tuple(listed(options.series)),
            testbeds=TESTBEDS if testbed_of(options) == BOTH else (),
            server=server_of(options),
            checks=tuple(options.checks or ()),
            guest=GuestShape(options.guest_cpus, options.guest_memory, options.guest_cpu),
            keep=options.keep,
            command=shlex.join(["nearmetal", *sys.argv[1:]]),
        ),
    )
    return status
