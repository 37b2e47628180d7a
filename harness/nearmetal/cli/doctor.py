# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``doctor``: what this machine, or a host, lacks; each finding with a hint."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, MeasurementError, NearmetalError, UsageError
from ..core.settings import Settings
from ..machines import inventory
from ..machines.host import ask
from ..machines.knock import knock
from ..machines.lab import Lab
from ..machines.shell import Shell, connect
from ..patches import series, variants
from ..probes import drawing, topology
from .common import Commands, server_of, target
from .copies import LOOK, copies
from .switches import Finding, switches

TOOLS = {
    "gcc": "build-essential",
    "make": "build-essential",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "ccache": "ccache",
    "cpio": "cpio",
    "zstd": "zstd",
    "lz4": "lz4",
    "patch": "patch",
    "rsync": "rsync",
    "git": "git",
    "pkg-config": "pkg-config",
    "bzip2": "bzip2",
    "mmdebstrap": "mmdebstrap",
    "tar2sqfs": "squashfs-tools-ng",
    "busybox": "busybox-static",
    "ssh-keygen": "openssh-client",
    "setpriv": "util-linux",
    "perl": "perl",
    "depmod": "kmod",
    "xorriso": "xorriso",
}
"""Programs that the harness runs, and the Debian packages that hold them."""

_GIB = 1 << 30


def local(settings: Settings) -> list[Finding]:
    """What can be said of this machine without changing anything."""
    found = []
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            found.append(
                Finding(
                    tool, "broken", "not installed", f"apt-get install {package} (scripts/run does)"
                )
            )
    if not found:
        found.append(Finding("tools", "ok", f"all {len(TOOLS)} programs are there"))
    machine = platform.machine()
    if machine != "x86_64":
        found.append(Finding("machine", "broken", machine, "use an x86-64 machine"))
    release = _os_release()
    known = release.get("ID") == "debian" and release.get("VERSION_ID") in ("12", "13")
    found.append(
        Finding(
            "system",
            "ok" if known else "warn",
            release.get("PRETTY_NAME", "unknown"),
            "" if known else "tested on Debian 12 and 13 only; sources may need --source-dir",
        )
    )
    cpus = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.append(
        Finding("cpus", "ok" if cpus >= 2 else "warn", f"{cpus}", "" if cpus >= 2 else "2 or more")
    )
    found.append(
        Finding(
            "memory",
            "ok" if memory >= 10 * _GIB else "warn",
            f"{memory / _GIB:.0f} GiB",
            "" if memory >= 10 * _GIB else "the emulated host takes 6 GiB, builds 4",
        )
    )
    place = settings.cache_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found.append(
        Finding(
            "disk",
            "ok" if free >= 15 * _GIB else "warn",
            f"{free / _GIB:.0f} GiB free for {settings.cache_dir}",
            ""
            if free >= 15 * _GIB
            else "a first run needs 15 GiB: use --cache-dir or 'nearmetal cache --prune'",
        )
    )
    if os.geteuid() != 0:
        works = (
            subprocess.run(
                ["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False
            ).returncode
            == 0
        )
        found.append(
            Finding(
                "user namespaces",
                "ok" if works else "broken",
                "allowed" if works else "refused",
                "" if works else "sysctl kernel.unprivileged_userns_clone=1, or run as root",
            )
        )
    return found


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key: value.strip('"') for key, _, value in pairs}


def remote(shell: Shell) -> list[Finding]:
    """What a host says of itself; nothing is written there."""
    facts = ask(shell)
    found = [
        Finding("kernel", "ok", facts.kernel),
        Finding("cpu", "ok", facts.cpu),
        Finding(
            "provenance",
            "warn" if facts.emulated else "ok",
            f"{facts.provenance} ({facts.vendor} {facts.product})",
            "figures from it are reported as emulated" if facts.emulated else "",
        ),
        Finding(
            "virtualization",
            "ok" if facts.kvm_module else "broken",
            facts.kvm_module or "neither SVM nor VMX",
            "" if facts.kvm_module else "enable it in the firmware",
        ),
    ]
    answer = shell.run(
        "ls -d /sys/class/iommu/* 2>/dev/null | wc -l; "
        "test -e /sys/kernel/tracing/synthetic_events && echo tracing; "
        "cat /proc/sys/kernel/nmi_watchdog 2>/dev/null",
        check=False,
    ).stdout.split()
    iommus = int(answer[0]) if answer else 0
    found.append(
        Finding(
            "iommu",
            "ok" if iommus else "broken",
            f"{iommus} units",
            "" if iommus else "boot with intel_iommu=on (or amd_iommu=on)",
        )
    )
    found.append(
        Finding(
            "tracing",
            "ok" if "tracing" in answer else "broken",
            "synthetic events" if "tracing" in answer else "no synthetic events",
            ""
            if "tracing" in answer
            else "CONFIG_SYNTH_EVENTS, CONFIG_HIST_TRIGGERS; mount tracefs",
        )
    )
    if iommus:
        found += copies(shell.run(LOOK, check=False).stdout)
    return found


def examine(
    settings: Settings,
    server: inventory.Server | None,
    *,
    boot: bool,
    saved: Path | None = None,
    save: Path | None = None,
    as_json: bool = False,
) -> int:
    """Look, tell, and return the exit status: 3 when something is broken.

    ``saved`` is a file with a host's survey, which is looked at in place of a host; ``save`` is
    where to write that of the host, or of this machine. Nothing is written to a host.
    ``as_json`` prints the findings alone, for programs.
    """
    survey = None
    if saved is not None:
        survey = load_survey(saved)
        found, where = [], str(saved)
    elif server is not None:
        where = server.name
        knock(server.name, server.address)
        shell = connect(server.name, server.address, deadline_s=0)
        try:
            found = remote(shell)
            text = shell.run(topology.SURVEY, deadline_s=120).stdout
        finally:
            shell.close()
        survey = topology.parse(text)
    else:
        found, where = local(settings), "this machine"
        text = survey_here() if save is not None else ""
        if boot:
            found.append(_booted(settings))
    if save is not None:
        save_survey(save, where, text)
    if survey is not None:
        found += switches(survey)
    status = Exit.ENVIRONMENT if any(one.state == "broken" for one in found) else Exit.OK
    if as_json:
        print(json.dumps(to_json(where, found), indent=1))
        return status
    if survey is not None:
        for line in drawing.drawing(survey):
            ui.out.print(line, markup=False)
    table = Table("", "what", "", "hint", title=where)
    sign = {"ok": "ok", "warn": "note", "broken": "BROKEN"}
    for one in found:
        # rules of the kernel's log are in brackets, as rich's markup is
        table.add_row(sign[one.state], *map(escape, (one.what, one.text, one.mend)))
    ui.out.print(table)
    return status


def to_json(where: str, found: Sequence[Finding]) -> dict[str, object]:
    """The findings for programs: ``where`` is a host, a file, or "this machine"."""
    return {
        "where": where,
        "findings": [
            {"what": one.what, "state": one.state, "text": one.text, "hint": one.mend}
            for one in found
        ],
    }


def load_survey(path: Path) -> topology.Survey:
    """A survey that ``save_survey`` has written; UsageError if there is none in the file."""
    try:
        return topology.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"there is no survey {path}", hint="'nearmetal doctor --host NAME --save-survey FILE'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"survey {path} cannot be read: {error}") from None
    except MeasurementError as error:
        raise UsageError(
            f"{path}: {error.message}", hint="'nearmetal doctor --host NAME --save-survey FILE'"
        ) from None


def save_survey(path: Path, where: str, text: str) -> None:
    """Keep what ``topology.SURVEY`` printed, without the command lines of who uses functions."""
    topology.parse(text)
    head = f"# survey of the PCI functions of {where} (nearmetal doctor --save-survey)\n"
    try:
        path.write_text(head + topology.anonymous(text), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"survey {path} cannot be written: {error.strerror}") from None
    ui.say(f"{path}: the survey of {where}")


def survey_here() -> str:
    """What ``topology.SURVEY`` prints on this machine; UsageError without root."""
    if os.geteuid() != 0:
        raise UsageError(
            "a survey of this machine needs root: only root can read all registers",
            hint="sudo nearmetal doctor --save-survey FILE, or --host NAME for a host",
        )
    done = subprocess.run(
        ["sh", "-c", topology.SURVEY], capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout


def _booted(settings: Settings) -> Finding:
    """Boot the testbed's host and load KVM in it: the proof that virtualization works there."""
    cache = Cache(settings.cache_dir).open()
    try:
        plan = variants.configs(series.load_series(settings.repo / "patches"), ("vanilla",))
        lab = Lab.build(settings, cache, plan)
        logs = settings.results_dir / "doctor"
        logs.mkdir(parents=True, exist_ok=True)
        with lab.host(plan[0], logs) as host:
            host.load_kvm()
            return Finding("testbed", "ok", f"boots; {host.facts.kvm_module} loads in it")
    except NearmetalError as error:
        return Finding("testbed", "broken", error.message, error.hint or "")


def add(commands: Commands) -> None:
    """Add the command."""
    one = commands.add(
        "doctor", "check whether this machine (or a host) has what is needed", command
    )
    target(one, "this machine")
    one.add_argument(
        "--boot", action="store_true", help="also boot the emulated host and load KVM in it"
    )
    one.add_argument(
        "--survey",
        type=Path,
        metavar="FILE",
        help="examine the PCI functions saved in FILE instead of those of a host",
    )
    one.add_argument(
        "--save-survey",
        type=Path,
        metavar="FILE",
        help="write the PCI functions of the host (without --host: of this machine) there",
    )
    one.add_argument("--json", action="store_true", help="print JSON, for programs")


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    if options.survey is not None:
        for given, name in (
            (options.host, "--host"),
            (options.save_survey, "--save-survey"),
            (options.boot or None, "--boot"),
        ):
            if given is not None:
                raise UsageError(
                    f"--survey and {name} are mutually exclusive",
                    hint="a saved survey replaces a machine",
                )
    return examine(
        conf,
        server_of(options),
        boot=options.boot,
        saved=options.survey,
        save=options.save_survey,
        as_json=options.json,
    )
