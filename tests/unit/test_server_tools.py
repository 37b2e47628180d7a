# SPDX-License-Identifier: GPL-2.0-or-later
"""Tools run as an inventory says: their choreography, with stand-ins that print samples.

The commands run with this machine's shell; the host's registers are those of data/topology.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes
from lib.fakes import FACTS, LocalShell, QuietHost

from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError, UsageError
from nearmetal.core.model import Measurement, Missing, Skipped, Subject, Variant
from nearmetal.core.settings import Settings
from nearmetal.judging.load import load_checks
from nearmetal.machines import inventory
from nearmetal.machines.equipment import Equipment
from nearmetal.machines.host import Host
from nearmetal.machines.inventory import End, Server, Tool
from nearmetal.machines.shell import Address, Shell
from nearmetal.measure import p2p, tools
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.patches.variants import Config
from nearmetal.pci.layout import Range, around
from nearmetal.probes import topology
from nearmetal.runs import execute
from nearmetal.runs import plan as plans

DATA = Path(__file__).parent / "data"
PEER, DISK = "0000:03:00.0", "0000:04:00.0"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    recorded = topology.parse((DATA / "topology" / "survey-vfio.txt").read_text())
    monkeypatch.setattr(topology, "survey", lambda shell: recorded)
    return QuietHost(cast(Shell, LocalShell("gpu1")), FACTS, "/nowhere")


def program(tmp_path: Path, name: str, body: str) -> str:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def sample(name: str) -> Path:
    return DATA / "tools" / name


@dataclasses.dataclass
class Outcome:
    """What tools gave, by kind."""

    rows: list[Measurement]
    missing: list[tuple[str, str]]
    skipped: list[str]


def measured(host: Host, *every: Tool, logs: Path, variant: Variant = "vanilla") -> Outcome:
    there = Equipment(tools=every, machines=host.equipment.machines)
    host.equipment = there
    series = "x" if variant == "on" else None
    setup = p2p.PLAIN if any(tool.in_guest for tool in every) else tools.OUTSIDE
    unit = Unit(Subject(variant, series, setup.name))
    bench = Bench(host, fakes.guest(host), None, unit, logs, setup)
    found = tools.measure(bench)
    return Outcome(
        [one for one in found if isinstance(one, Measurement)],
        [(one.reason, one.detail) for one in found if isinstance(one, Missing)],
        [one.reason for one in found if isinstance(one, Skipped)],
    )


def one_end(kind: str, command: str, **more: Any) -> Tool:
    return Tool(kind, command, (End(),), (PEER, DISK), runs=2, **more)


def test_nvbandwidth(host: Host, tmp_path: Path) -> None:
    line = f'echo "$@" > {tmp_path}/asked; cat {sample("from-source-nvbandwidth.json")}'
    tool = one_end(
        "nvbandwidth",
        program(tmp_path, "nvbandwidth", line),
        tests=("device_to_device_latency_sm",),
    )
    outcome = measured(host, tool, logs=tmp_path)
    assert (outcome.missing, outcome.skipped) == ([], [])
    assert (tmp_path / "asked").read_text() == "-j -t device_to_device_latency_sm\n"
    assert [one.name for one in outcome.rows] == [tools.BANDWIDTH] * 4 + [tools.LATENCY] * 2
    assert outcome.rows[0].values == (24.5831, 24.5831)
    assert outcome.rows[0].context == {
        "tool": "nvbandwidth",
        "at": "guest",
        "test": "device_to_device_memcpy_write_ce",
        "row": "0",
        "column": "1",
        "acs": "SV+RR+CR+UF",
        "ats": "absent/on",
        "relaxed_ordering": "off",
        "route": "redirected",
    }
    assert (tmp_path / "vanilla-iommu-tool-0-nvbandwidth-1.out").read_text().startswith("{")


def test_the_cuda_sample(host: Host, tmp_path: Path) -> None:
    name = sample("from-source-p2pBandwidthLatencyTest.out")
    tool = one_end("p2pBandwidthLatencyTest", program(tmp_path, "p2p", f"cat {name}"))
    outcome = measured(host, tool, logs=tmp_path)
    assert outcome.missing == []
    assert len(outcome.rows) == 36


NCCL = """
case "$*" in
*--help*) echo "[-J,--output_file <file>]"; exit ;;
*-J*) for last; do :; done; cp {json} "$last" ;;
esac
cat {table}
"""


@pytest.mark.parametrize("writes", [True, False])
def test_nccl_by_its_file_or_its_table(host: Host, tmp_path: Path, writes: bool) -> None:
    body = NCCL.format(
        json=sample("from-source-nccl-tests-version-3.json"),
        table=sample("from-source-nccl-tests-table.out"),
    )
    if not writes:
        body = body.replace("--output_file", "")
    tool = one_end("nccl-tests", program(tmp_path, "all_reduce_perf", body), gpus=8)
    outcome = measured(host, tool, logs=tmp_path)
    assert outcome.missing == []
    assert [one.values for one in outcome.rows] == [
        (one,) * 2 for one in (22.57, 22.61, 40.1, 40.3)
    ]
    kept = tmp_path / "vanilla-iommu-tool-0-all_reduce_perf-0.json"
    assert kept.exists() == writes
    assert not writes or "SECRET_TOKEN" not in kept.read_text()


PERFTEST = """#!/usr/bin/env python3
import pathlib, socket, sys
words = sys.argv[1:]
if "--help" in words:
    print("--out_json")
    sys.exit()
port = int(words[words.index("-p") + 1])
pathlib.Path("{folder}/words").open("a").write(" ".join(words) + "\\n")
data = "{data}/perftest-25.01-one-size-write"
if words[-1] != "127.0.0.1":
    {server}
    listening = socket.create_server(("0.0.0.0", port))
    listening.accept()
    sys.exit()
socket.create_connection(("127.0.0.1", port)).close()
{client}
print(open(data + ".out").read())
out = next(w for w in words if w.startswith("--out_json_file=")).partition("=")[2]
pathlib.Path(out).write_text(open(data + ".json").read())
"""


def perftest(tmp_path: Path, server: str = "pass", client: str = "pass") -> Tool:
    path = tmp_path / "ib_write_bw"
    text = PERFTEST.format(folder=tmp_path, data=DATA / "tools", server=server, client=client)
    path.write_text(text)
    path.chmod(0o755)
    client_end = End("guest", "mlx5_0", cuda=0, dmabuf=True)
    server_end = End("host", "mlx5_1", "127.0.0.1")
    return Tool("perftest", str(path), (client_end, server_end), (PEER, DISK), runs=1)


def test_perftest_has_two_ends(host: Host, tmp_path: Path) -> None:
    outcome = measured(host, perftest(tmp_path), logs=tmp_path)
    assert outcome.missing == []
    (found,) = outcome.rows
    assert found.values == (0.18 / 8,)
    assert found.context["client"] == "guest:mlx5_0:cuda0-dmabuf"
    assert found.context["server"] == "host:mlx5_1:ram"
    assert found.context["command"] == "ib_write_bw"
    assert found.context["tool_relaxed_ordering"] == "on"
    server, client = (tmp_path / "words").read_text().splitlines()
    assert server.startswith("-d mlx5_1 -F --report_gbits -p 18")
    assert client.startswith("-d mlx5_0 --use_cuda=0 --use_cuda_dmabuf -F --report_gbits -p 18")
    assert (tmp_path / "vanilla-iommu-tool-0-ib_write_bw-0.json").exists()


def test_perftest_whose_client_fails_leaves_no_server(host: Host, tmp_path: Path) -> None:
    outcome = measured(
        host, perftest(tmp_path, client="sys.exit(' Unable to reg MR')"), logs=tmp_path
    )
    assert outcome.rows == []
    ((reason, _),) = outcome.missing
    assert reason == "perftest on guest: Unable to reg MR"
    (server,) = cast(LocalShell, host.shell).started
    assert server.ended


def test_perftest_whose_client_never_comes_leaves_no_server(host: Host, tmp_path: Path) -> None:
    tool = perftest(tmp_path, client="import time; time.sleep(60)")
    begun = time.monotonic()
    outcome = measured(host, dataclasses.replace(tool, deadline_s=2), logs=tmp_path)
    assert time.monotonic() - begun < 20
    ((reason, _),) = outcome.missing
    assert "did not end within 2 s on guest" in reason
    assert cast(LocalShell, host.shell).started[0].ended


def test_perftest_whose_server_does_not_start(host: Host, tmp_path: Path) -> None:
    tool = perftest(tmp_path, server="print(' Did not detect devices '); sys.exit(1)")
    ((reason, _),) = measured(host, tool, logs=tmp_path).missing
    assert reason == "perftest on gpu1: Did not detect devices"


@pytest.mark.parametrize("optional", [False, True])
def test_a_tool_that_is_not_installed(host: Host, tmp_path: Path, optional: bool) -> None:
    tool = one_end("nvbandwidth", "nvbandwidth-is-not-here", optional=optional)
    outcome = measured(host, tool, logs=tmp_path)
    reason = "nvbandwidth: guest has no program nvbandwidth-is-not-here"
    assert outcome.rows == []
    assert outcome.missing == ([] if optional else [(reason, "")])
    assert outcome.skipped == ([reason] if optional else [])


def test_a_tool_that_fails_is_an_error_and_the_next_one_runs(host: Host, tmp_path: Path) -> None:
    broken = one_end("nvbandwidth", program(tmp_path, "broken", "echo died >&2; exit 3"))
    name = sample("from-source-p2pBandwidthLatencyTest.out")
    good = one_end("p2pBandwidthLatencyTest", program(tmp_path, "good", f"cat {name}"))
    fails = one_end("p2pBandwidthLatencyTest", program(tmp_path, "fails", f"cat {name}; exit 1"))
    outcome = measured(host, broken, good, fails, logs=tmp_path, variant="on")
    assert [reason for reason, _ in outcome.missing] == [
        "nvbandwidth: it ended with status 3 on guest",
        "p2pBandwidthLatencyTest: it ended with status 1 on guest",
    ]
    assert outcome.missing[0][1] == "died"
    assert len(outcome.rows) == 36


def test_acs_that_changes_meanwhile_is_an_error(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = topology.survey(host.shell)
    port = dataclasses.replace(before.functions["0000:02:00.0"], acs=0x11)
    after = topology.Survey({**before.functions, port.address: port})
    answers = iter([before, after])
    monkeypatch.setattr(topology, "survey", lambda shell: next(answers))
    name = sample("from-source-p2pBandwidthLatencyTest.out")
    tool = one_end("p2pBandwidthLatencyTest", program(tmp_path, "p2p", f"cat {name}"))
    ((reason, _),) = measured(host, tool, logs=tmp_path).missing
    assert "changed meanwhile" in reason
    assert "SV+RR+CR+UF/SV+UF" in reason


def test_a_function_that_the_host_lacks_is_an_error(host: Host, tmp_path: Path) -> None:
    tool = one_end("nvbandwidth", "true")
    tool = dataclasses.replace(tool, functions=("0000:77:00.0",))
    ((reason, _),) = measured(host, tool, logs=tmp_path).missing
    assert "no PCI function 0000:77:00.0" in reason


def test_a_machine_that_does_not_answer_is_an_error(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_LOGIN_S", 0.5)
    host.equipment = Equipment(machines={"vm1": Address("127.0.0.1", 1)})
    tool = dataclasses.replace(one_end("nvbandwidth", "true"), ends=(End("vm1"),))
    ((reason, _),) = measured(host, tool, logs=tmp_path).missing
    assert "no SSH at root@127.0.0.1:1" in reason


def test_runs_that_differ_in_what_they_measure(host: Host, tmp_path: Path) -> None:
    full = sample("from-source-nvbandwidth.json")
    body = f"""
if [ -e {tmp_path}/ran ]; then sed s/latency_sm/latency_ce/ {full}; else cat {full}; fi
touch {tmp_path}/ran"""
    tool = one_end("nvbandwidth", program(tmp_path, "nv", body))
    tool = dataclasses.replace(tool, tests=("device_to_device_memcpy_write_ce",))
    ((reason, _),) = measured(host, tool, logs=tmp_path).missing
    assert "not every run gave" in reason


# --- what a run says of tools ----------------------------------------------------------------

INSIDE = Tool("nvbandwidth", "nvbandwidth", (End(),), (PEER,))
OUTSIDE = Tool("nvbandwidth", "nvbandwidth", (End("vm1"),), (PEER,))
ON = dataclasses.replace(OUTSIDE, variant="on", series="direct-p2p")
PLAN = (Config("vanilla"), Config("on", "direct-p2p"))


ON_TWO = ("on-iommu-direct-p2p", "on-outside-direct-p2p")


@pytest.mark.parametrize(
    ("asked", "plan", "left_out", "planned"),
    [
        (None, PLAN, ["only a server's inventory"] * 4, set()),
        (
            (),
            PLAN,
            [f"names no tool for {one}" for one in ("vanilla-iommu", "vanilla-outside", *ON_TWO)],
            set(),
        ),
        (
            (INSIDE,),
            PLAN,
            ["names no tool for vanilla-outside", f"names no tool for {ON_TWO[1]}"],
            {"vanilla-iommu", ON_TWO[0]},
        ),
        (
            (OUTSIDE,),
            PLAN,
            [f"names no tool for {one}" for one in ("vanilla-iommu", *ON_TWO)],
            {"vanilla-outside"},
        ),
        (
            (ON,),
            PLAN[:1],
            [
                "names no tool for vanilla-iommu",
                "names no tool for vanilla-outside (nvbandwidth is for on of direct-p2p)",
            ],
            set(),
        ),
    ],
)
def test_tools_that_are_not_asked_for_are_declared(
    asked: tuple[Tool, ...] | None,
    plan: tuple[Config, ...],
    left_out: list[str],
    planned: set[str],
) -> None:
    there = plans.equipment_of("amd") if asked is None else Equipment(tools=asked)
    found = plans.expected(plans.work(plan, ("tools",), there), there)
    assert [one.names for one in found.skipped] == [tools.NAMES] * len(left_out)
    for skip, words in zip(found.skipped, left_out, strict=True):
        assert words in skip.reason
    assert {subject.label for (subject, _), names in found.names.items() if names} == planned


# --- the inventory ---------------------------------------------------------------------------

WHOLE = """
hosts:
  gpu1:
    address: 192.0.2.7
    assign: ["0000:17:00.0", "0000:18:00.0"]
    machines:
      vm2: {address: 192.0.2.8, port: 2222, user: admin}
    tools:
      - tool: perftest
        client: {at: guest, device: mlx5_0, cuda: 0, dmabuf: true}
        server: {at: vm2, device: mlx5_1, address: 10.0.0.2}
        arguments: ["-a"]
      - tool: nccl-tests
        at: vm2
        gpus: 8
        functions: ["0000:19:00.0"]
        variant: on
        series: direct-p2p
        optional: true
"""


def load(tmp_path: Path, text: str) -> Server:
    path = tmp_path / "inventory.yaml"
    path.write_text(text)
    return inventory.pick(path, "gpu1")


def test_inventory_with_tools(tmp_path: Path) -> None:
    found = load(tmp_path, WHOLE)
    assert found.assign == ("0000:17:00.0", "0000:18:00.0")
    assert str(found.machines["vm2"]) == "admin@192.0.2.8:2222"
    perf, nccl = found.tools
    assert perf.in_guest
    assert not nccl.in_guest
    assert (perf.command, nccl.command) == ("ib_write_bw", "all_reduce_perf")
    assert perf.functions == found.assign
    assert perf.arguments == ("-a",)
    assert nccl.functions == ("0000:19:00.0",)
    assert (nccl.variant, nccl.series, nccl.optional) == ("on", "direct-p2p", True)


def test_example_of_the_documentation(tmp_path: Path) -> None:
    text = (DATA.parents[2] / "docs" / "servers.md").read_text()
    example = text[text.index("# inventory.yaml: tools") :]
    found = load(tmp_path, example[: example.index("```")])
    assert len(found.tools) == 5
    assert {tool.tool for tool in found.tools} == set(inventory.TOOLS)


@pytest.mark.parametrize("page", ["servers.md", "results.md"])
def test_checks_of_the_documentation_can_be_used(tmp_path: Path, page: str) -> None:
    text = (DATA.parents[2] / "docs" / page).read_text()
    example = text[text.index("```yaml\nschema: 1") + len("```yaml\n") :]
    path = tmp_path / "checks.yaml"
    path.write_text(example[: example.index("```")])
    assert load_checks(path)


@pytest.mark.parametrize(
    ("old", "new", "says", "mend"),
    [
        ("tool: perftest", "tool: perfest", "'perfest' is not one of", None),
        ("gpus: 8", "gpu: 8", "'gpu' was unexpected", "'gpus'"),
        ("gpus: 8", "tests: [a]", "nccl-tests has no key 'tests'", "command, at, gpus"),
        ("at: vm2\n", "at: vm3\n", "there is no machine 'vm3'", "'vm2'"),
        ("{at: guest", "{at: geust", "there is no machine 'geust'", "'guest'"),
        (", address: 10.0.0.2", "", "server lacks the key 'address'", "finds it"),
        ("cuda: 0, ", "", "dmabuf without cuda", "cuda: 0"),
        ("        client: {", "        # {", "lacks the key 'client'", "two ends"),
        ("        series: direct-p2p\n", "", "goes with variant: on", "series: direct-p2p"),
        ("variant: on", "variant: off", "goes with variant: on", "series: direct-p2p"),
        ('arguments: ["-a"]', "variant: vanilla", "say nothing", "leave them out"),
        ('"0000:17:00.0", "0000:18:00.0"', "", "which functions of the host", "functions: "),
        ('["0000:19:00.0"]', '["19:00.0"]', "'19:00.0' does not match", None),
        ("vm2: {address", "guest: {address", "cannot be named 'guest'", "'at'"),
        ("port: 2222", "key: /no/such", "vm2: there is no key file", "private key"),
    ],
)
def test_inventories_that_are_refused(
    tmp_path: Path, old: str, new: str, says: str, mend: str | None
) -> None:
    assert old in WHOLE
    with pytest.raises(UsageError) as caught:
        load(tmp_path, WHOLE.replace(old, new, 1))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert mend is None or mend in str(caught.value.hint)


def test_two_tools_whose_results_nothing_tells_apart(tmp_path: Path) -> None:
    twice = WHOLE + WHOLE[WHOLE.index("      - tool: nccl") :].replace("gpus: 8", "gpus: 4")
    with pytest.raises(UsageError, match="results of tools/2 from those of tools/1") as caught:
        load(tmp_path, twice)
    assert "label" in str(caught.value.hint)
    named = load(tmp_path, twice.replace("gpus: 4", "gpus: 4\n        label: four"))
    assert [tool.label for tool in named.tools] == [None, None, "four"]


def test_label_of_a_tool_is_in_the_context(host: Host, tmp_path: Path) -> None:
    name = sample("from-source-p2pBandwidthLatencyTest.out")
    command = program(tmp_path, "p2p", f"cat {name}")
    outcome = measured(host, one_end("p2pBandwidthLatencyTest", command, label="sm"), logs=tmp_path)
    assert {one.context["label"] for one in outcome.rows} == {"sm"}


# --- in the guests of a run ------------------------------------------------------------------


@pytest.fixture
def lab(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[fakes.FakeLab, Host, Path]:
    """A server without an NVMe pair, whose guests are this machine's shell."""

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    text = f"cat {sample('from-source-nvbandwidth.json')}"
    asked = ("device_to_device_memcpy_write_ce",)
    tool = one_end("nvbandwidth", program(tmp_path, "nv", text), tests=asked)
    host.equipment = Equipment(tools=(tool,), assign=(PEER, DISK))
    monkeypatch.setattr(execute, "counting", nothing)
    monkeypatch.setattr(p2p, "layout", lambda *_: around([Range(1 << 33, (1 << 33) + 1)], 4096))
    settings = Settings(tmp_path, tmp_path, tmp_path, testbed="amd")
    return fakes.FakeLab(settings, Cache(tmp_path)), host, tmp_path


DIRECT = Config("on", "direct-p2p", setups=("iommufd", "direct"), tests=("p2p", "tools"))


def run_units(
    lab: tuple[fakes.FakeLab, Host, Path], config: Config
) -> tuple[execute.Gathered, plans.Expected]:
    fake, host, logs = lab
    work = plans.work([config], ("p2p", "tools"), host.equipment)
    found = execute.Gathered()
    for guests in plans.grouped(work):
        for units in guests:
            execute.measure_units(cast(Any, fake), host, units, logs, found)
    return found, plans.expected(work, host.equipment)


def test_tools_run_in_the_guest_of_a_variant_without_an_nvme_pair(
    lab: tuple[fakes.FakeLab, Host, Path],
) -> None:
    found, wanted = run_units(lab, Config("off"))
    assert found.missing == []
    assert {one.test for one in wanted.skipped} == {"p2p", "tools"}
    assert {row.name for row in found.measurements} == set(tools.NAMES)
    for row_ in found.measurements:
        where = row_.where
        assert (row_.variant, where["setup"], where["at"]) == ("off", "iommu", "guest")
        assert "testbed" not in where
    assert wanted.names[Subject("off", None, "iommu"), "tools"] == {tools.BANDWIDTH}


def test_tools_run_in_each_set_up_of_a_variant(lab: tuple[fakes.FakeLab, Host, Path]) -> None:
    found, _ = run_units(lab, DIRECT)
    assert found.missing == []
    assert {row.subject.setup for row in found.measurements} == {"iommufd", "direct"}
    assert {row.series for row in found.measurements} == {"direct-p2p"}


def test_a_server_without_tools_and_pair_boots_no_guest(
    lab: tuple[fakes.FakeLab, Host, Path],
) -> None:
    lab[1].equipment = Equipment()
    found, wanted = run_units(lab, DIRECT)
    assert (found.measurements, found.missing, lab[0].booted) == ([], [], [])
    assert {skip.test for skip in wanted.skipped} == {"p2p", "tools"}


def test_a_guest_that_does_not_come_up_is_an_error_for_its_tools(
    lab: tuple[fakes.FakeLab, Host, Path],
) -> None:
    lab[0].broken["vanilla"] = MeasurementError("QEMU did not start")
    found, _ = run_units(lab, Config("vanilla"))
    (missing,) = found.missing
    assert (missing.test, missing.reason) == ("tools", "QEMU did not start")
    assert missing.names == tools.NAMES
