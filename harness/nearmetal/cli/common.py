# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands of the command line share: a parser, options, and how they are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import settings
from ..core.errors import UsageError
from ..core.model import VARIANTS, Variant
from ..core.settings import Settings
from ..core.text import nearest
from ..machines import inventory
from ..machines.emulators import EMULATORS

Handler = Callable[[argparse.Namespace, Settings], int]

_BUILDS = {"host_kernel": "linux_tree", "guest_kernel": "linux_tree", "qemu_build": "qemu_tree"}
"""What the user may have built, and the trees that are built in its place."""

TESTBEDS = tuple(EMULATORS)
BOTH = "both"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the project's."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"see '{self.prog} --help'")


ALL = ("cache_dir", "results_dir", "source_dir", "linux_tree", "qemu_tree", "testbed", "jobs")
"""The options of commands that build and boot; others have some of them."""


def common_options(*further: str, only: Sequence[str] = ALL) -> Parser:
    """The options that commands share; ``further`` are words for --testbed that one of them takes.

    ``only`` are those that do something for a command; the others have their defaults.
    """
    common = Parser(add_help=False)
    told = common.add_mutually_exclusive_group()
    told.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also the commands that are run on this machine",
    )
    told.add_argument(
        "-q", "--quiet", action="store_true", help="no progress: only results, warnings and errors"
    )
    group = common.add_argument_group("where things are") if only else common
    for name, keys in _options(*further).items():
        if name in only:
            short = ("-j",) if name == "jobs" else ()
            group.add_argument(*short, f"--{name.replace('_', '-')}", **keys)
        else:
            common.set_defaults(**{name: settings.default_jobs() if name == "jobs" else None})
    return common


def _options(*further: str) -> dict[str, dict[str, Any]]:
    """What the shared options are, by their names."""
    return {
        "cache_dir": {
            "type": Path,
            "metavar": "DIR",
            "help": "what is fetched and built (default: $NEARMETAL_CACHE, cache_dir of your"
            " configuration file, or ~/.cache/nearmetal)",
        },
        "results_dir": {
            "type": Path,
            "metavar": "DIR",
            "help": "where runs are reported (default: results/ in the repository)",
        },
        "source_dir": {
            "type": Path,
            "metavar": "DIR",
            "help": "source archives that are used before any download (or $NEARMETAL_SOURCES)",
        },
        "linux_tree": {
            "type": Path,
            "metavar": "PATH",
            "help": "your Linux (git tree, folder or tarball): built as it stands, without our"
            " patches",
        },
        "qemu_tree": {
            "type": Path,
            "metavar": "PATH",
            "help": "your QEMU (git tree, folder or tarball): built as it stands, without our"
            " patches",
        },
        "testbed": {
            "choices": (*TESTBEDS, *further),
            "help": f"which emulated host (default: {TESTBEDS[0]})"
            if BOTH not in further
            else "which emulated host; both: one after the other, in one report (default: both,"
            f" and {TESTBEDS[0]} where another option says what is measured)",
        },
        "jobs": {
            "type": int,
            "default": settings.default_jobs(),
            "metavar": "N",
            "help": "processes of a build (default: the CPUs there are)",
        },
    }


@dataclass(frozen=True)
class Commands:
    """The commands, to which a module adds its own."""

    sub: Any
    common: Parser
    top: Parser
    """The whole command line, for what is made from it."""

    def add(
        self, name: str, summary: str, handler: Handler, options: Parser | None = None
    ) -> argparse.ArgumentParser:
        """A command with the options of all commands, or with others in their place."""
        description = summary[0].upper() + summary[1:] + "."
        one: argparse.ArgumentParser = self.sub.add_parser(
            name,
            help=summary,
            description=description,
            parents=[options or self.common],
            conflict_handler="resolve",  # export has a -v of its own
        )
        one.set_defaults(handler=handler)
        return one


def target(one: argparse.ArgumentParser, instead_of: str = "the testbed") -> None:
    """The options that name a host of the inventory; ``instead_of`` is what is meant without."""
    one.add_argument(
        "--host", metavar="NAME", help=f"a host of the inventory instead of {instead_of}"
    )
    one.add_argument(
        "--inventory",
        type=Path,
        metavar="FILE",
        default=settings.default_inventory(),
        help="YAML file that says how to reach hosts (default: inventory.yaml, or inventory of your"
        " configuration file)",
    )


def own_builds(one: argparse.ArgumentParser) -> None:
    """The options that name what the user built."""
    group = one.add_argument_group("what you built, as make left it")
    for name, what in (
        ("host-kernel", "the host's kernel: a build folder with bzImage and modules"),
        ("guest-kernel", "the guest's kernel: a build folder with bzImage"),
        ("qemu-build", "the QEMU that runs the guest: a build folder"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="DIR", help=what)


def listed(values: Sequence[str] | None) -> list[str]:
    """The words of an option that may be repeated and takes lists with commas."""
    return [word.strip() for value in values or () for word in value.split(",")]


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options make; UsageError for what cannot be."""
    repo = settings.repository()
    source = options.source_dir or (
        Path(os.environ["NEARMETAL_SOURCES"]) if os.environ.get("NEARMETAL_SOURCES") else None
    )
    if options.jobs < 1:
        raise UsageError("--jobs must be 1 or more")
    own: dict[str, Path | None] = {}
    for name in ("linux_tree", "qemu_tree", *_BUILDS):
        path = getattr(options, name, None)
        own[name] = None if path is None else path.expanduser()
        if path is not None and not path.expanduser().exists():
            raise UsageError(f"--{name.replace('_', '-')} {path}: there is nothing there")
    for build, tree in _BUILDS.items():
        if own[build] is not None and own[tree] is not None:
            both = (f"--{name.replace('_', '-')}" for name in (build, tree))
            raise UsageError(
                f"{' and '.join(both)} are mutually exclusive",
                hint="a tree is built by us, a build by you: leave one of the two out",
            )
    if own["host_kernel"] is not None and getattr(options, "host", None) is not None:
        raise UsageError(
            "--host-kernel is for the emulated host: a server runs its own kernel",
            hint="boot the server with it, then leave the option out",
        )
    return Settings(
        repo=repo,
        cache_dir=(options.cache_dir or settings.default_cache_dir()).expanduser().absolute(),
        results_dir=(options.results_dir or settings.default_results_dir(repo))
        .expanduser()
        .absolute(),
        source_dir=source.expanduser().absolute() if source else None,
        **own,
        jobs=options.jobs,
        testbed=TESTBEDS[0] if options.testbed in (None, BOTH) else options.testbed,
    )


def variants_of(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """Variants by name, in their order; UsageError with the nearest name."""
    for name in names or ():
        if name not in VARIANTS:
            raise UsageError(f"there is no variant '{name}'", hint=nearest(name, VARIANTS))
    return tuple(variant for variant in VARIANTS if variant in (names or ()))


def server_of(options: argparse.Namespace) -> inventory.Server | None:
    """The server that the options name, if any."""
    # an empty name is one that is wrong: the testbed is not what was meant
    if options.host is None:
        return None
    if options.testbed is not None:
        raise UsageError(
            f"--host {options.host} and --testbed {options.testbed} are mutually exclusive",
            hint="leave one of the two out: a server is not an emulated host",
        )
    return inventory.pick(options.inventory, options.host)


def folder_of(conf: Settings, name: str) -> Path:
    """A run's folder by its name or its path."""
    path = conf.results_dir / name
    return path if path.exists() else Path(name)
