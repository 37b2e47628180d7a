# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``boot`` and ``ssh``."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence

from .. import builds
from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..core.text import nearest
from ..machines import session
from ..machines.host import Host
from ..machines.lab import Lab
from ..patches import series, variants
from ..runs import execute, plan
from .common import Commands, server_of, target, variants_of


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "boot", "boot a host with a guest on it and leave them up until Ctrl-C", command
    )
    target(one)
    one.add_argument(
        "--variant", metavar="VARIANT", default="vanilla", help="which variant (default: vanilla)"
    )
    one.add_argument(
        "--series",
        metavar="NAME",
        help="which series is on, with --variant on (default: the first); of one with set-ups"
        " of its own, the guest is that of the last",
    )
    one.add_argument("--no-guest", action="store_true", help="only the host")

    one = commands.add("ssh", "a shell on what 'boot' or 'run --keep' has left up", ssh)
    one.add_argument("machine", choices=("host", "guest"), help="which machine")
    one.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="run this instead of a shell"
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    every = series.load_series(conf.repo / "patches", known=plan.known())
    config = _one_config(
        variants.configs(every, variants_of([options.variant])), options.variant, options.series
    )
    server = server_of(options)
    lab = Lab.build(conf, Cache(conf.cache_dir).open(), [config], server=server)
    logs = conf.results_dir / "boot"
    logs.mkdir(parents=True, exist_ok=True)
    with lab.host(config, logs) as host:
        if options.no_guest:
            with session.noted(lab.cache, session.Session(host.shell.address, None)):
                _wait("the host is up: 'nearmetal ssh host'; Ctrl-C ends it")
            return Exit.OK
        with (
            execute.guest_for(lab, host, _last_setup(config, host), logs) as guest,
            session.noted(lab.cache, session.Session(host.shell.address, guest.shell.address)),
        ):
            _wait("host and guest are up: 'nearmetal ssh host' or '... guest'; Ctrl-C ends them")
    return Exit.OK


def _last_setup(config: variants.Config, host: Host) -> plan.Work:
    """The unit whose guest is booted: the last one that the variant's series names, or plain."""
    tests = plan.resolve_tests((), host.equipment)
    every = plan.work([config], tests, host.equipment)
    named = [one for one in every if one.setup.name in config.setups]
    return named[-1] if named else every[0]


def _one_config(plan: Sequence[variants.Config], variant: str, name: str | None) -> variants.Config:
    """The one to boot. Raises UsageError for a series that no variant of the plan switches on."""
    if name is None:
        return plan[0]
    if variant != "on":
        raise UsageError(
            f"--series says what is on, and nothing is in the variant '{variant}'",
            hint="add --variant on, or leave --series out",
        )
    found = {config.series: config for config in plan if config.series}
    if name not in found:
        raise UsageError(f"there is no series '{name}' to switch on", hint=nearest(name, [*found]))
    return found[name]


def _wait(text: str) -> None:
    ui.say(text)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        ui.say("ending")


def ssh(options: argparse.Namespace, conf: Settings) -> int:
    """Log in to what is up."""
    cache = Cache(conf.cache_dir).open()
    line = session.ssh_command(cache, builds.keys(cache), options.machine, options.words)
    if shutil.which("ssh") is None:
        raise UsageError(
            "the program 'ssh' is not installed", hint="apt-get install openssh-client"
        )
    os.execvp(line[0], line)
