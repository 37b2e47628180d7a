# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``doctor``: what this machine, or a host, lacks; each finding with its mend."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, NearmetalError
from ..core.settings import Settings
from ..machines import inventory
from ..machines.host import Host, reach
from ..machines.lab import Lab
from ..patches import series, variants
from ..probes import topology
from .common import Commands, server_of, target

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


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``state`` is ok, warn or broken; ``mend`` says what to do."""

    what: str
    state: str
    text: str
    mend: str = ""


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
            "" if known else "tried on Debian 12 and 13; sources may need --source-dir",
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
            else "15 GiB are needed cold: --cache-dir, 'nearmetal cache --prune'",
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


def remote(host: Host) -> list[Finding]:
    """What a host says of itself."""
    facts = host.facts
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
    ask = host.shell.run(
        "ls -d /sys/class/iommu/* 2>/dev/null | wc -l; "
        "test -e /sys/kernel/tracing/synthetic_events && echo tracing; "
        "cat /proc/sys/kernel/nmi_watchdog 2>/dev/null",
        check=False,
    ).stdout.split()
    iommus = int(ask[0]) if ask else 0
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
            "ok" if "tracing" in ask else "broken",
            "synthetic events" if "tracing" in ask else "no synthetic events",
            "" if "tracing" in ask else "CONFIG_SYNTH_EVENTS, CONFIG_HIST_TRIGGERS; mount tracefs",
        )
    )
    return found


def switches(survey: topology.Survey) -> list[Finding]:
    """A finding for each PCIe switch: whether direct peer-to-peer could be claimed there."""
    found = []
    for upstream in survey.switches():
        what = f"switch {upstream.address}"
        exposed = topology.exposed(survey, upstream)
        if exposed:
            found.append(
                Finding(
                    what,
                    "broken",
                    f"functions of {', '.join(exposed)} reach each other without the IOMMU",
                    "ACS P2P Request Redirect is off: who has switched it off (pci=config_acs=, "
                    "disable_acs_redir=, setpci)?",
                )
            )
        in_the_way = topology.obstacles(survey, upstream)
        for one in in_the_way:
            found.append(
                Finding(
                    what,
                    "warn",
                    f"no direct peer-to-peer: {one.address} {one.what}",
                    one.mend,
                )
            )
        if not in_the_way:
            found.append(
                Finding(
                    what,
                    "ok",
                    "nothing seen in the way of direct peer-to-peer",
                    "docs/direct-p2p.md says how to switch it on",
                )
            )
    if not found:
        return [Finding("switches", "ok", "no PCIe switch")]
    return [Finding("direct-p2p", "ok", topology.allowed(survey)), *found]


def examine(settings: Settings, server: inventory.Server | None, *, boot: bool) -> int:
    """Look, tell, and return the exit status: 3 when something is broken."""
    drawings: list[str] = []
    if server is not None:
        host = reach(server.name, server.address)
        try:
            survey = topology.survey(host.shell)
            found = [*remote(host), *switches(survey)]
            drawings = [line for one in survey.switches() for line in topology.drawing(survey, one)]
            where = server.name
        finally:
            host.shell.close()
    else:
        found = local(settings)
        where = "this machine"
        if boot:
            found.append(_booted(settings))
    table = Table("", "what", "", "mend", title=where)
    sign = {"ok": "ok", "warn": "note", "broken": "BROKEN"}
    for one in found:
        table.add_row(sign[one.state], one.what, one.text, one.mend)
    for line in drawings:
        ui.say(line)
    ui.console.print(table)
    return Exit.ENVIRONMENT if any(one.state == "broken" for one in found) else Exit.OK


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
    one = commands.add("doctor", "say what this machine (or a host) lacks", command)
    target(one)
    one.add_argument(
        "--boot", action="store_true", help="also boot something: an opened /dev/kvm is no proof"
    )


def command(options: argparse.Namespace, conf: Settings) -> int:
    """Carry it out."""
    return examine(conf, server_of(options), boot=options.boot)
