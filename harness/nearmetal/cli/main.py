# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``nearmetal``: options in, exit status out; no work is done here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from .. import __version__
from ..core import ui
from ..core.errors import Exit, NearmetalError
from . import (
    bisectcmd,
    bootcmd,
    buildcmd,
    cachecmd,
    completion,
    doctor,
    exportcmd,
    historycmd,
    listcmd,
    reportcmd,
    runcmd,
    suitecmd,
    treecmd,
    validatecmd,
    vmcmd,
)
from .common import Commands, Handler, Parser, common_options, settings_of

COMMANDS = (
    doctor,
    buildcmd,
    runcmd,
    bootcmd,
    vmcmd,
    suitecmd,
    treecmd,
    validatecmd,
    exportcmd,
    reportcmd,
    historycmd,
    bisectcmd,
    listcmd,
    cachecmd,
    completion,
)
"""The modules of the commands, in the order of the help."""


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="nearmetal",
        description="Builds the patch series, boots VMs on emulated or real hosts, measures, "
        "checks and reports.",
        epilog="Results go to standard output, progress and errors to standard error. Exit status:"
        " 0 success; 1 a check, a measurement or a validation failed; 2 wrong use; 3 a broken"
        " environment. docs/commands.md describes your configuration file, shell completion and the"
        " man page.",
    )
    top.add_argument("--version", action="version", version=f"nearmetal {__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands = Commands(sub, common_options(), top)
    for module in COMMANDS:
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns the exit status; an error is one line and a hint."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = parser().parse_args(argv)
        if options.quiet or options.verbose:
            ui.set_level(ui.QUIET if options.quiet else ui.VERBOSE)
        else:
            ui.set_level(ui.NORMAL)
        handler: Handler = options.handler
        return int(handler(options, settings_of(options)))
    except NearmetalError as error:
        ui.tell_error(error)
        return int(error.status)
    except KeyboardInterrupt:
        ui.say("interrupted; finished builds stay in the cache, and the next run uses them")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(Exit.OK)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        ui.tell_error(
            NearmetalError(
                f"{error.strerror or error}{place}",
                hint="check free disk space and permissions",
            )
        )
        return int(Exit.ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
