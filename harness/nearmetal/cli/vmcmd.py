# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``vm``: a guest that looks like its host, as arguments of QEMU or for libvirt."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ..core import ui
from ..core.errors import Exit, UsageError
from ..core.settings import Settings
from ..core.text import nearest
from ..machines.knock import knock
from ..machines.shell import connect
from ..mirror import explain, libvirt, qemu
from ..mirror.plan import PAGES, Wish, plan
from ..patches import series
from ..probes import topology
from .common import Commands, common_options, listed, server_of, target
from .doctor import load_survey, survey_here

_DIRECT, _PMU = "direct-p2p", "pmu-passthrough"


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "vm",
        "write a guest for functions of a host: its PCI tree, NUMA nodes and memory as the host's",
        command,
        common_options(only=()),
    )
    target(one, "this machine")
    one.add_argument("functions", nargs="+", metavar="FUNCTION", help="as 0000:17:00.0 or 17:00.0")
    one.add_argument(
        "--survey",
        type=Path,
        metavar="FILE",
        help="the host's survey, by 'nearmetal doctor --save-survey' (default without --host: this"
        " machine, as root)",
    )
    one.add_argument("--name", default="vm", metavar="NAME", help="the guest's name (default: vm)")
    one.add_argument("--cpus", type=int, default=16, metavar="N", help="vCPUs (default: 16)")
    one.add_argument(
        "--memory", default="64G", metavar="SIZE", help="as 512G or 4096M (default: 64G)"
    )
    one.add_argument("--huge-pages", default="1G", metavar="SIZE", help="1G (default), 2M, or none")
    one.add_argument(
        "--iommufd", action="store_true", help="map DMA by iommufd also without direct-p2p"
    )
    which = one.add_mutually_exclusive_group()
    which.add_argument(
        "--series",
        action="append",
        metavar="NAME",
        help="only these series are on; a list with commas (default: all, direct-p2p where it can"
        " be)",
    )
    which.add_argument(
        "--vanilla", action="store_true", help="for a kernel and a QEMU without any series"
    )
    how = one.add_mutually_exclusive_group()
    how.add_argument("--libvirt", action="store_true", help="domain XML in place of arguments")
    how.add_argument(
        "--explain",
        action="store_true",
        help="the distance of each pair on the host and in the guest, as 'nvidia-smi topo -m' has"
        " it, and what the guest loses",
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    every = series.load_series(conf.repo / "patches")
    names = _series(options, every)
    wish = Wish(
        functions=tuple(options.functions),
        name=options.name,
        cpus=options.cpus,
        memory_mib=_mib(options.memory),
        pages=_pages(options.huge_pages),
        direct_p2p=_DIRECT in names,
        must_direct_p2p=options.series is not None and _DIRECT in names,
        iommufd=options.iommufd,
        globals=tuple(
            dict.fromkeys(
                f"{name}={value}"
                for one in every
                if one.name in names
                for name, value in one.enable.qemu_properties.items()
                if name.startswith("q35-pcihost.")
            )
        ),
        guest_series=tuple(
            dict.fromkeys(
                one.name
                for one in every
                if one.name in names and one.enable.guest_kernel == "patched"
            )
        ),
        pmu=_PMU in names,
    )
    survey = _survey(options)
    made = plan(survey, wish)
    if options.libvirt:
        print(libvirt.xml(made), end="")
    elif options.explain:
        print("\n".join(explain.explain(survey, made)))
    else:
        print(qemu.text(made), end="")
    for loss in made.losses:
        ui.warn(loss)
    for step in made.steps:
        ui.say(f"first: {step}")
    return Exit.OK


def _survey(options: argparse.Namespace) -> topology.Survey:
    if options.survey is not None:
        if options.host is not None:
            raise UsageError(
                "--survey and --host are mutually exclusive",
                hint="a saved survey replaces a machine",
            )
        return load_survey(options.survey)
    server = server_of(options)
    if server is None:
        return topology.parse(survey_here())
    knock(server.name, server.address)
    shell = connect(server.name, server.address, deadline_s=0)
    try:
        return topology.survey(shell)
    finally:
        shell.close()


def _series(options: argparse.Namespace, every: Sequence[series.Series]) -> list[str]:
    known = list(dict.fromkeys(one.name for one in every if one.is_product and not one.draft))
    if options.vanilla:
        return []
    if options.series is None:
        return known
    names = listed(options.series)
    for name in names:
        if name not in known:
            raise UsageError(f"there is no series '{name}'", hint=nearest(name, known))
    return names


def _mib(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([MGT])(iB)?", text)
    if not found:
        raise UsageError(f"--memory {text} is no size", hint="write it as 512G or 4096M")
    return int(found[1]) * {"M": 1, "G": 1024, "T": 1024 * 1024}[found[2]]


def _pages(text: str) -> str:
    if text not in PAGES:
        raise UsageError(f"--huge-pages {text} is no size", hint=nearest(text, PAGES))
    return text
