# SPDX-License-Identifier: GPL-2.0-or-later
"""tools: programs of others that a server has, run as its inventory says (docs/servers.md).

With each result goes what the host's registers said, before and after: ACS Control of the ports
between the functions, ATS and relaxed ordering of these. What a tool prints is read by the modules
beside this one, and kept in the run's logs.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...core import ui
from ...core.errors import EnvironmentBroken, MeasurementError, UsageError
from ...core.model import VARIANTS, Measurement, Missing, Skipped
from ...machines.equipment import PCIE, Equipment
from ...machines.host import Host
from ...machines.inventory import GUEST, HOST, End, Tool
from ...machines.shell import Running, Shell, connect, free_port_on
from ...probes import topology, ways
from ..api import ANY, Metric, Setup, Test, Unit
from ..bench import Bench, Found, Row
from ..p2p import IN_DIRECT, IN_IOMMUFD, PLAIN
from . import cuda_p2p, mpirun, nccl, nvbandwidth, perftest
from .reading import Reading, tail

BANDWIDTH, LATENCY = "p2p.tool_gb_s", "p2p.tool_latency_us"
NAMES = (BANDWIDTH, LATENCY)
_BY_QUANTITY = {"bandwidth": BANDWIDTH, "latency": LATENCY}

_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "perftest": ("-s", "1048576", "-D", "10"),
    "nccl-tests": ("-b", "64M", "-e", "1G", "-f", "4"),
}
"""What a tool is told where the inventory has no arguments."""

_TESTS = ("device_to_device_memcpy_read_ce", "device_to_device_memcpy_write_ce")
"""The tests of nvbandwidth where the inventory names none."""

_LOGIN_S = 60.0
_LISTEN_S = 30.0


class NotInstalled(MeasurementError):
    """The tool's program is not there."""


def lacks(equipment: Equipment, unit: Unit) -> str | None:
    """Why no tool is to be run for a unit: tools are what the inventory of a server names."""
    if wanted(equipment.tools, unit):
        return None
    if equipment.testbed is not None:
        return "only a server's inventory names tools to be run (docs/servers.md)"
    others = [
        f"{tool.tool} is for {' of '.join(word for word in (tool.variant, tool.series) if word)}"
        for tool in equipment.tools
        if not tool.in_guest
    ]
    told = f" ({', '.join(others)})" if others and unit.subject.setup == OUTSIDE.name else ""
    return f"the inventory of the host names no tool for {unit.subject.label}{told}"


def wanted(every: Sequence[Tool], unit: Unit) -> list[Tool]:
    """Those of the tools that a unit runs: in its guest or, outside of any, once each."""
    subject = unit.subject
    if subject.setup != OUTSIDE.name:
        return [tool for tool in every if tool.in_guest]
    return [
        tool
        for tool in every
        if not tool.in_guest and (tool.variant, tool.series) == (subject.variant, subject.series)
    ]


def measure(bench: Bench) -> list[Found]:
    """Run the unit's tools one after another; one that fails does not keep others from running."""
    found: list[Found] = []
    guest = None if bench.setup.bare else bench.guest.shell
    for number, tool in enumerate(wanted(bench.host.equipment.tools, bench.unit)):
        with ui.step(f"measuring with {tool.tool} ({tool.command})"):
            try:
                name = f"{bench.label}-tool-{number}-{Path(tool.command).name}"
                found += _one(bench.host, guest, tool, bench.row, bench.logs, name)
            except NotInstalled as error:
                if tool.optional:
                    ui.say(f"    skipped: {error.message}")
                    found.append(Skipped(TEST.name, bench.subject, error.message, NAMES))
                else:
                    found.append(_missing(bench, error))
            except MeasurementError as error:
                found.append(_missing(bench, error))
    return found


def _missing(bench: Bench, error: MeasurementError) -> Missing:
    ui.tell_error(error)
    return Missing(TEST.name, bench.subject, error.message, NAMES, error.detail or "")


def _one(
    host: Host, guest: Shell | None, tool: Tool, row: Row, logs: Path, name: str
) -> list[Measurement]:
    values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(_machine(host, guest, end)) for end in tool.ends]
        for place in places:
            _installed(place, tool)
        before = ways.state(topology.survey(host.shell), tool.functions)
        for number in range(tool.runs):

            def keep(text: str, kind: str = "out", number: int = number) -> None:
                (logs / f"{name}-{number}.{kind}").write_text(text)

            found = _RUN[tool.tool](tool, places, keep)
            for reading in found:
                key = (reading.quantity, tuple(sorted(reading.context.items())))
                values.setdefault(key, []).append(reading.value)
        after = ways.state(topology.survey(host.shell), tool.functions)
    if before != after:
        raise MeasurementError(
            f"{tool.tool}: ACS, ATS or relaxed ordering changed meanwhile: {before}, then {after}",
            hint="make sure that nobody else changes the host during a run",
        )
    if odd := [key for key, every in values.items() if len(every) != tool.runs]:
        raise MeasurementError(f"{tool.tool}: not every run gave {dict(odd[0][1])}")
    context = {"tool": tool.tool, **_ends(tool), **before}
    if tool.label is not None:
        context["label"] = tool.label
    return [
        row(_BY_QUANTITY[quantity], every, **{**dict(keys), **context})
        for (quantity, keys), every in values.items()
    ]


def _ends(tool: Tool) -> dict[str, str]:
    """Where it ran, for the context."""
    if len(tool.ends) == 1:
        return {"at": tool.ends[0].at}
    if tool.on_nodes:
        return {"at": "+".join(end.at for end in tool.ends), "ranks": str(mpirun.ranks(tool))}
    client, server = tool.ends
    return {"command": Path(tool.command).name, "client": _end(client), "server": _end(server)}


def _end(end: End) -> str:
    memory = "ram" if end.cuda is None else f"cuda{end.cuda}{'-dmabuf' * end.dmabuf}"
    return f"{end.at}:{end.device}:{memory}"


@contextmanager
def _machine(host: Host, guest: Shell | None, end: End) -> Iterator[Shell]:
    if end.at == HOST:
        yield host.shell
        return
    if end.at == GUEST:
        if guest is None:
            raise MeasurementError("there is no guest for the tool to run in")
        yield guest
        return
    try:
        shell = connect(end.at, host.equipment.machines[end.at], deadline_s=_LOGIN_S)
    except (UsageError, EnvironmentBroken) as error:
        raise MeasurementError(error.message, hint=error.hint) from None
    try:
        yield shell
    finally:
        shell.close()


def _installed(place: Shell, tool: Tool, program: str | None = None) -> None:
    program = program or tool.command
    if place.run(f"command -v {shlex.quote(program)}", check=False).status:
        raise NotInstalled(
            f"{tool.tool}: {place.name} has no program {program}",
            hint="install it there, give its path as 'command', or make the tool optional",
        )


Keep = Callable[..., None]
"""(text, kind): keep what a tool printed in the logs."""


def _run(place: Shell, tool: Tool, words: Sequence[str]) -> tuple[str, str, int]:
    """Standard output, standard error and status of a program that has a deadline there, too."""
    line = shlex.join(["timeout", "-k", "5", str(round(tool.deadline_s)), *words])
    done = place.run(line, deadline_s=tool.deadline_s + 30, check=False)
    if done.status == 124:
        raise MeasurementError(
            f"{tool.tool}: it did not end within {tool.deadline_s:.0f} s on {place.name}",
            detail=tail(done.stdout + done.stderr),
            hint="more time: deadline_s",
        )
    return done.stdout, done.stderr, done.status


def _ended_well(tool: Tool, place: Shell, out: str, err: str, status: int) -> None:
    if status:
        raise MeasurementError(
            f"{tool.tool}: it ended with status {status} on {place.name}", detail=tail(out + err)
        )


@contextmanager
def _folder(place: Shell) -> Iterator[str]:
    """A new folder on the machine: nccl-tests writes beside a file that is there."""
    path = place.run("mktemp -d").stdout.strip()
    try:
        yield path
    finally:
        with contextlib.suppress(MeasurementError):
            place.run(f"rm -rf {shlex.quote(path)}")


def _arguments(tool: Tool) -> tuple[str, ...]:
    return _ARGUMENTS.get(tool.tool, ()) if tool.arguments is None else tool.arguments


# --- perftest --------------------------------------------------------------------------------


def _perftest(tool: Tool, places: Sequence[Shell], keep: Keep) -> tuple[Reading, ...]:
    client, server = places
    near, far = tool.ends
    assert far.address is not None
    port = str(free_port_on(server, 18515, 18614))
    common = ["-F", "--report_gbits", "-p", port, *_arguments(tool)]
    with (
        _folder(client) as folder,
        _perftest_server(tool, server, [*_perftest_words(tool, far), *common], port),
    ):
        words = [*_perftest_words(tool, near), *common]
        document = None
        asked = shlex.join([tool.command, "--help"])
        # before 4.5 there was none
        if client.run(f"{asked} 2>&1 | grep -q out_json", check=False).status == 0:
            words += ["--out_json", f"--out_json_file={folder}/out.json"]
            document = f"{folder}/out.json"
        out, err, status = _run(client, tool, [*words, far.address])
        keep(out + err)
        if status:
            raise perftest.failure(out + err, f"it ended with status {status}", client.name)
        text = client.read(document) if document else None
    if text is not None:
        keep(text, "json")
    return perftest.parse(out, text)


def _perftest_words(tool: Tool, end: End) -> list[str]:
    words = [tool.command, "-d", end.device]
    if end.cuda is not None:
        words.append(f"--use_cuda={end.cuda}")
    if end.dmabuf:
        words.append("--use_cuda_dmabuf")
    return words


@contextmanager
def _perftest_server(
    tool: Tool, place: Shell, words: Sequence[str], port: str
) -> Iterator[Running]:
    """A server that listens; it ends with the context, and when we are gone."""
    line = shlex.join(["timeout", "-k", "5", str(round(tool.deadline_s) + 60), *words])
    running = place.start(
        f"exec 3<&0; {line} < /dev/null 2>&1 3<&- & p=$!; "
        "{ cat <&3; kill $p; } > /dev/null 2>&1 & wait $p"
    )
    listens = (
        "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | "
        f'grep -qi ":$(printf %04X {port}) [0-9A-F:]* 0A"'
    )
    try:
        end = time.monotonic() + _LISTEN_S
        while place.run(listens, check=False).status:
            if running.ended or time.monotonic() > end:
                said = running.channel.recv(1 << 16) if running.channel.recv_ready() else b""
                raise perftest.failure(
                    said.decode(errors="replace"), "its server does not listen", place.name
                )
            time.sleep(0.2)
        yield running
    finally:
        running.close()


# --- the others ------------------------------------------------------------------------------


def _nvbandwidth(tool: Tool, places: Sequence[Shell], keep: Keep) -> tuple[Reading, ...]:
    (place,) = places
    tests = tool.tests or _TESTS
    out, err, status = _run(place, tool, [tool.command, "-j", *_arguments(tool), "-t", *tests])
    keep(out + err)
    if status and not out.strip():
        _ended_well(tool, place, out, err, status)
    found = nvbandwidth.parse(out, tests)
    _ended_well(tool, place, out, err, status)
    return found


def _cuda_p2p(tool: Tool, places: Sequence[Shell], keep: Keep) -> tuple[Reading, ...]:
    (place,) = places
    out, err, status = _run(place, tool, [tool.command, *_arguments(tool)])
    keep(out + err)
    found = cuda_p2p.parse(out)
    _ended_well(tool, place, out, err, status)
    return found


def _nccl(tool: Tool, places: Sequence[Shell], keep: Keep) -> tuple[Reading, ...]:
    place = places[0]
    words = [tool.command, *_arguments(tool)]
    ranks = None
    if tool.on_nodes:
        _installed(place, tool, mpirun.PROGRAM)
        words, ranks = [*mpirun.words(tool), *words], mpirun.ranks(tool)
    if tool.gpus is not None:
        words += ["-g", str(tool.gpus)]
    asked = shlex.join([tool.command, "--help"])
    writes = place.run(f"{asked} 2>&1 | grep -q -- --output_file", check=False).status == 0
    with _folder(place) as folder:
        if writes:
            words += ["-J", f"{folder}/out.json"]
        out, err, status = _run(place, tool, words)
        keep(out + err)
        if status and tool.on_nodes and (failed := mpirun.failure(out + err)):
            raise failed
        if status or not writes:
            table = nccl.parse_table(out + err, tool.command, ranks)
            _ended_well(tool, place, out, err, status)
            return table
        document = place.read(f"{folder}/out.json")
    keep(nccl.without_environment(document), "json")
    return nccl.parse(document, ranks)


_RUN: Mapping[str, Callable[[Tool, Sequence[Shell], Keep], tuple[Reading, ...]]] = {
    "perftest": _perftest,
    "nvbandwidth": _nvbandwidth,
    "p2pBandwidthLatencyTest": _cuda_p2p,
    "nccl-tests": _nccl,
}


OUTSIDE = Setup("outside", variants=VARIANTS, bare=True)
"""For tools no end of which is in a guest of the harness."""

TEST = Test(
    "tools",
    "Tools of others (tools)",
    measure,
    (
        Metric(
            BANDWIDTH,
            "GB/s",
            "bandwidth reported by a tool on a server, in 10^9 bytes per second",
            "higher",
            keys={"*": ANY},
        ),
        Metric(
            LATENCY, "us", "latency reported by a tool on a server", keys={"*": ANY}, asked=True
        ),
    ),
    order=35,
    plain=PLAIN,
    setups=(IN_IOMMUFD, IN_DIRECT, OUTSIDE),
    needs=(PCIE,),
    lacks=lacks,
)
