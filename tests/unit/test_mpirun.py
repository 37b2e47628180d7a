# SPDX-License-Identifier: GPL-2.0-or-later
"""nccl-tests on several machines: with a stand-in for mpirun, which starts one process here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
from lib import fakes, results
from lib.fakes import FACTS, LocalShell
from lib.surveys import DISK, PEER, recorded

from nearmetal.core.errors import MeasurementError, UsageError
from nearmetal.core.model import Measurement, Missing, Subject
from nearmetal.judging.judge import judge
from nearmetal.judging.load import load_checks
from nearmetal.machines import inventory
from nearmetal.machines.equipment import Equipment
from nearmetal.machines.host import Host
from nearmetal.machines.inventory import End, Tool
from nearmetal.machines.shell import Shell
from nearmetal.measure import p2p, tools
from nearmetal.measure.api import Unit
from nearmetal.measure.bench import Bench
from nearmetal.measure.tools import mpirun, nccl
from nearmetal.patches.variants import Config
from nearmetal.probes import topology

TABLE = Path(__file__).parent / "data" / "tools" / "from-source-nccl-tests-table.out"
NODES = (End("guest", address="10.0.0.1"), End("host", address="10.0.0.2"))


def program(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    command = program(tmp_path, "all_reduce_perf", f"cat {TABLE}")
    start = f'echo "$@" > {tmp_path}/asked; while [ "$1" != {command} ]; do shift; done; exec "$@"'
    program(tmp_path, "mpirun", start)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(topology, "survey", lambda shell: recorded("vfio"))
    return Tool("nccl-tests", command, NODES, (PEER, DISK), runs=2, mpirun=("-x", "NCCL_ALGO=Ring"))


def measured(tool: Tool, logs: Path) -> list[Any]:
    host = Host(cast(Shell, LocalShell("gpu1")), FACTS, "/nowhere")
    host.equipment = Equipment(tools=(tool,))
    unit = Unit(Subject("vanilla", None, p2p.PLAIN.name))
    return list(tools.measure(Bench(host, fakes.guest(host), None, unit, logs, p2p.PLAIN)))


def test_two_nodes(tool: Tool, tmp_path: Path) -> None:
    rows = measured(tool, tmp_path)
    assert [one.values for one in rows if isinstance(one, Measurement)] == [
        (one,) * 2 for one in (22.57, 22.61, 40.1, 40.3)
    ]
    assert (rows[0].context["at"], rows[0].context["ranks"]) == ("guest+host", "2")
    assert (tmp_path / "asked").read_text() == (
        "--allow-run-as-root -np 2 --host 10.0.0.1:1,10.0.0.2:1 -x NCCL_ALGO=Ring "
        f"{tool.command} -b 64M -e 1G -f 4\n"
    )


def test_ranks_that_are_missing(tool: Tool, tmp_path: Path) -> None:
    """As without MPI=1, or with arguments that ask for other GPUs."""
    four = tuple(dataclasses.replace(node, gpus=2) for node in NODES)
    (found,) = measured(dataclasses.replace(tool, ends=four), tmp_path)
    assert isinstance(found, Missing)
    assert "2 ranks made up the test, not 4" in found.reason


@pytest.mark.parametrize(
    ("said", "says", "mend"),
    [
        ("Host key verification failed.", "Host key verification failed.", "log in once"),
        ("root@10.0.0.2: Permission denied (publickey).", "Permission denied", "authorized_keys"),
        (
            "There are not enough slots available in the system to satisfy the 16\nslots",
            "There are not enough slots",
            "fewer 'gpus'",
        ),
        (
            "mpirun was unable to find the specified executable file, and therefore",
            "unable to find the specified executable",
            "one path",
        ),
        ("ORTE was unable to reliably start one or more daemons.", "ORTE was", "firewall"),
        ("mpirun: Error: unrecognized argument --host", "unrecognized argument", "Open MPI"),
    ],
)
def test_mpirun_that_fails(said: str, says: str, mend: str) -> None:
    failed = mpirun.failure(f"-----\n{said}\n-----\n")
    assert failed
    assert says in failed.message
    assert mend in str(failed.hint)


def test_a_failure_of_the_test_is_not_mpirun_s(tool: Tool, tmp_path: Path) -> None:
    assert mpirun.failure("node1: Test NCCL failure common.cu:958 'unhandled cuda error'") is None
    program(tmp_path, "mpirun", "echo 'Permission denied (publickey).' >&2; exit 255")
    (found,) = measured(tool, tmp_path)
    assert found.reason == "mpirun: Permission denied (publickey)."
    program(tmp_path, "mpirun", "echo 'node1: Test NCCL failure x.cu:9'; exit 3")
    (found,) = measured(tool, tmp_path)
    assert found.reason == "nccl-tests: node1: Test NCCL failure x.cu:9"


def test_mpirun_that_is_not_installed(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpirun, "PROGRAM", "mpirun-is-not-here")
    (found,) = measured(tool, tmp_path)
    assert found.reason == "nccl-tests: guest has no program mpirun-is-not-here"


def test_known_ranks_of_a_file() -> None:
    document = TABLE.with_name("from-source-nccl-tests-version-3.json").read_text()
    assert nccl.parse(document, 8) == nccl.parse(document)
    with pytest.raises(MeasurementError, match="8 ranks made up the test, not 16"):
        nccl.parse(document, 16)


# --- the inventory ---------------------------------------------------------------------------

WHOLE = """
hosts:
  gpu1:
    address: 192.0.2.7
    machines:
      vm1: {address: 192.0.2.11}
      vm2: {address: 192.0.2.12}
    tools:
      - tool: nccl-tests
        nodes:
          - {at: vm1, address: 10.0.0.1, gpus: 8}
          - {at: vm2, address: 10.0.0.2, gpus: 8}
        mpirun: [-x, NCCL_ALGO=Ring]
        functions: ["0000:17:00.0", "0000:18:00.0"]
"""


def load(tmp_path: Path, text: str) -> Tool:
    path = tmp_path / "inventory.yaml"
    path.write_text(text)
    (found,) = inventory.pick(path, "gpu1").tools
    return found


def test_nodes_of_an_inventory(tmp_path: Path) -> None:
    found = load(tmp_path, WHOLE)
    assert found.on_nodes
    assert not found.in_guest
    assert found.ends == (
        End("vm1", address="10.0.0.1", gpus=8),
        End("vm2", address="10.0.0.2", gpus=8),
    )
    assert mpirun.words(found) == [
        "mpirun",
        "--allow-run-as-root",
        "-np",
        "16",
        "--host",
        "10.0.0.1:8,10.0.0.2:8",
        "-x",
        "NCCL_ALGO=Ring",
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("at: vm2, address: 10.0.0.2", "at: vm2", "'address' is a required property"),
        ("at: vm2,", "at: vm1,", "the node 'vm1' comes twice"),
        ("at: vm2,", "at: vm3,", "there is no machine 'vm3'"),
        ("        mpirun:", "        at: vm1\n        mpirun:", "'at' beside nodes"),
        ("        mpirun:", "        gpus: 8\n        mpirun:", "'gpus' beside nodes"),
        ("          - {at: vm2, address: 10.0.0.2, gpus: 8}\n", "", "is too short"),
        ("gpus: 8", "gpus: 0", "0 is less than the minimum"),
    ],
)
def test_nodes_that_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in WHOLE
    with pytest.raises(UsageError) as caught:
        load(tmp_path, WHOLE.replace(old, new, 1))
    assert says in caught.value.message


def test_mpirun_without_nodes(tmp_path: Path) -> None:
    lines = [line for line in WHOLE.splitlines() if "nodes:" not in line and "- {at" not in line]
    with pytest.raises(UsageError, match="mpirun without nodes"):
        load(tmp_path, "\n".join(lines))


# --- the checks of the documentation ---------------------------------------------------------

ON: dict[str, Any] = {"variant": "on", "series": "direct-p2p", "setup": "outside"}


@pytest.mark.parametrize(
    ("nic", "nodes", "verdicts"),
    [
        (24.6, 48.0, ["pass", "pass"]),
        (21.9, 27.0, ["fail", "fail"]),
        (25.0, 44.9, ["pass", "fail"]),
    ],
)
def test_checks_of_the_documentation_can_pass_and_fail(
    tmp_path: Path, nic: float, nodes: float, verdicts: list[str]
) -> None:
    """One NIC of 200 Gbit/s, and two nodes with two each."""
    page = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
    path = tmp_path / "checks.yaml"
    path.write_text("schema: 1" + page.partition("```yaml\nschema: 1")[2].partition("```")[0])
    between: dict[str, Any] = {"tool": "nccl-tests", "at": "vm1+vm2", "ranks": "16", "place": "in"}
    rows = [
        results.row(nic, name=tools.BANDWIDTH, tool="perftest", size="1048576", **ON),
        results.row(nodes / 2, name=tools.BANDWIDTH, size="67108864", **between, **ON),
        results.row(nodes, name=tools.BANDWIDTH, size="1073741824", **between, **ON),
    ]
    plan = results.plan(("tools",), [Config("on", "direct-p2p")], host="gpu1")
    found = judge(load_checks(path), rows, [], [], plan)
    by_name = {one.name: one.status for one in found if one.name.startswith("gpu1.")}
    names = ("gpu1.one-nic-at-line-rate", "gpu1.two-nodes-at-line-rate")
    assert [by_name[name] for name in names] == verdicts
