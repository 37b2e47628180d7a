# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``boot`` and ``ssh``."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
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
from ..machines.shell import Shell
from ..patches import series, variants
from ..runs import execute, plan
from .common import (
    Commands,
    common_options,
    own_builds,
    server_of,
    target,
    variants_of,
)

_LOOK_S = 2.0


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "boot",
        "boot a host with a guest on it; leave them up until Ctrl-C, or run a command in the guest",
        command,
    )
    target(one)
    own_builds(one)
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
    one.add_argument(
        "words",
        nargs="*",
        metavar="COMMAND",
        help="after '--': run this in the guest (with --no-guest: on the host), hand its output on,"
        " end both, and exit with its status; one word is a line of sh",
    )

    one = commands.add(
        "ssh",
        "open a shell on what 'boot' or 'run --keep' has left up",
        ssh,
        common_options(only=("cache_dir",)),
    )
    one.add_argument("--host", metavar="NAME", help="which host, where several are up")
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
    cache = Cache(conf.cache_dir).open()
    name = server.name if server else "testbed"
    lock = f"run-{name}" if server else name
    # a command may wait for its turn, as a run does; who sits before a terminal is told
    waits = bool(options.words)
    if not waits:
        with cache.lock(lock, wait=False):
            pass  # told before anything is built
    if server is not None:
        execute.answers(server)
    lab = Lab.build(conf, cache, [config], server=server)
    logs = conf.results_dir / ("boot" if server is None else f"boot-{name}")
    logs.mkdir(parents=True, exist_ok=True)
    with cache.lock(lock, wait=waits), lab.host(config, logs) as host:
        if options.no_guest:
            with session.noted(cache, session.Session(host.shell.address, None, name)):
                return _use(host.shell, options.words, "the host is up: 'nearmetal ssh host'")
        with (
            execute.guest_for(lab, host, _last_setup(config, host), logs) as guest,
            session.noted(cache, session.Session(host.shell.address, guest.shell.address, name)),
        ):
            text = "host and guest are up: 'nearmetal ssh host' or '... guest'"
            return _use(guest.shell, options.words, text)


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
            f"--series says what is on, and the variant '{variant}' has nothing switched on",
            hint="add --variant on, or leave --series out",
        )
    found = {config.series: config for config in plan if config.series}
    if name not in found:
        raise UsageError(f"there is no series '{name}' to switch on", hint=nearest(name, [*found]))
    return found[name]


def _use(shell: Shell, words: Sequence[str], text: str) -> int:
    """Run the words, or wait for Ctrl-C. Raises MeasurementError when the machine dies."""
    if words:
        line = words[0] if len(words) == 1 else shlex.join(words)
        feed = None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
        return shell.stream(line, sys.stdout.buffer, sys.stderr.buffer, feed)
    ui.say(f"{text}; Ctrl-C ends it")
    try:
        while True:
            if shell.watch is not None:
                shell.watch()
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        ui.say("ending")
    return Exit.OK


def ssh(options: argparse.Namespace, conf: Settings) -> int:
    """Log in to what is up."""
    cache = Cache(conf.cache_dir).open()
    line = session.ssh_command(
        cache, builds.keys(cache), options.machine, options.words, options.host
    )
    if shutil.which("ssh") is None:
        raise UsageError(
            "the program 'ssh' is not installed", hint="apt-get install openssh-client"
        )
    os.execvp(line[0], line)
