# SPDX-License-Identifier: GPL-2.0-or-later
"""Bare metal, VM redirected and VM direct beside each other; docs/servers.md's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lib import results as made

from nearmetal.core.errors import UsageError
from nearmetal.core.model import Measurement, Report, RunInfo
from nearmetal.judging.again import judge_again
from nearmetal.judging.load import load_checks
from nearmetal.report import by_route

DOCS = Path(__file__).parents[2] / "docs"


def figure(value: float, route: str, **context: Any) -> Measurement:
    keys = {"tool": "nvbandwidth", "row": "0", "column": "1", "route": route, **context}
    return made.row(value, name="p2p.tool_gb_s", unit="GB/s", provenance="hardware", **keys)


def report(*rows: Measurement) -> Report:
    info = RunInfo("run-1", "2026-11-22T22:15:01Z", "2026-11-22T22:16:01Z", "gpu1", "", 1, True, 0)
    return Report(info, (), rows, ())


def test_three_figures_are_one_line() -> None:
    rows = [
        figure(52, "direct", at="host"),
        figure(21, "redirected", at="vm1", acs="SV+RR+CR+UF"),
        figure(51, "direct", at="vm1", acs="SV+UF", variant="on", series="direct-p2p"),
    ]
    text = by_route.render([report(*rows[:2]), report(rows[2])])
    (line,) = [line for line in text.splitlines() if "p2p.tool_gb_s" in line]
    assert line.split()[-5:] == ["52", "21", "51", "direct,", "redirected"]
    head = next(line for line in text.splitlines() if "bare metal" in line)
    for name, value in zip(by_route.COLUMNS, ("52", "21", "51"), strict=True):
        assert head.index(name) + len(name) == line.index(value) + 2


@pytest.mark.parametrize(
    ("route", "context", "expected"),
    [
        ("direct", {"at": "host"}, "bare metal"),
        ("redirected", {"client": "host:mlx5_0:ram", "server": "host:mlx5_1:ram"}, "bare metal"),
        ("redirected", {"client": "host:mlx5_0:ram", "server": "vm1:mlx5_1:ram"}, "VM redirected"),
        ("root-complex", {"at": "vm1"}, "VM redirected"),
        ("direct/redirected", {"at": "vm1"}, "VM redirected"),
        ("direct-by-ats", {"at": "vm1"}, "VM direct"),
        ("direct", {"at": "guest"}, "VM direct"),
    ],
)
def test_columns(route: str, context: dict[str, str], expected: str) -> None:
    assert by_route.column(figure(1, route, **context)) == expected


def test_without_routes_there_is_nothing_to_show() -> None:
    with pytest.raises(UsageError, match="has a route"):
        by_route.render([report(made.row(1, name="lspci.exits"))])


@pytest.mark.parametrize(
    ("nic", "nodes", "status"),
    [(24.1, 47.9, "pass"), (14.0, 27.0, "fail")],
)
def test_the_checks_of_the_documentation_can_pass_and_fail(
    tmp_path: Path, nic: float, nodes: float, status: str
) -> None:
    """24.1 GB/s are of 200 Gbit/s; 48 and 27 GB/s what nccl#949 has."""
    text = (DOCS / "servers.md").read_text()
    example = text[text.index("```yaml\nschema: 1") + len("```yaml\n") :]
    path = tmp_path / "checks.yaml"
    path.write_text(example[: example.index("```")])
    keys = {"variant": "on", "series": "direct-p2p", "setup": "outside"}
    rows = (
        figure(nic, "direct", tool="perftest", client="vm1:mlx5_0:cuda0", **keys),
        figure(nodes, "direct", tool="nccl-tests", at="vm1+vm2", **keys),
    )
    verdicts = judge_again(report(*rows), load_checks([path]))
    found = {one.name: str(one.status) for one in verdicts if one.name.startswith("gpu1.")}
    assert found == {"gpu1.one-nic-at-line-rate": status, "gpu1.two-nodes-at-line-rate": status}
