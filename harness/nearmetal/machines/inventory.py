# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's own servers: a YAML file that says how to reach each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..core import ui
from ..core.errors import UsageError
from ..core.model import Variant
from ..core.schema import StrictLoader
from ..core.text import nearest
from . import sshconfig
from .inventory_rules import COMMANDS, GUEST, HOST, TOOLS, Mistake, mistakes, variant_of
from .shell import Address

__all__ = ["GUEST", "HOST", "TOOLS", "End", "Server", "Tool", "load", "pick"]


@dataclass(frozen=True)
class End:
    """Where a tool runs: ``at`` is GUEST, HOST or a machine's name.

    For perftest, ``device`` is the RDMA device there; ``cuda`` the GPU whose memory is moved (None:
    ordinary memory), by its dma-buf with ``dmabuf``; ``address`` is where the other end finds it.
    For a node of nccl-tests, ``address`` is where mpirun finds it, ``gpus`` how many processes with
    a GPU each it starts there.
    """

    at: str = GUEST
    device: str = ""
    address: str | None = None
    cuda: int | None = None
    dmabuf: bool = False
    gpus: int = 1


@dataclass(frozen=True)
class Tool:
    """A tool that is installed on a server, and how to run it.

    ``functions`` are PCI functions of the host, those whose ACS, ATS and relaxed ordering are
    recorded with the results. ``ends`` are a client and a server, nodes, or the one place where it
    runs. ``mpirun`` are further words for mpirun, which starts it on nodes.
    A tool that no end of which is in a guest of the harness is measured once, as ``variant`` and
    ``series`` say. A tool that is not installed is an error unless it is ``optional``.
    """

    tool: str
    command: str
    ends: tuple[End, ...]
    functions: tuple[str, ...]
    arguments: tuple[str, ...] | None = None
    tests: tuple[str, ...] = ()
    gpus: int | None = None
    mpirun: tuple[str, ...] = ()
    optional: bool = False
    variant: Variant = "vanilla"
    series: str | None = None
    runs: int = 3
    deadline_s: float = 300.0
    label: str | None = None
    """What tells it from another that differs in its arguments only."""

    @property
    def in_guest(self) -> bool:
        """Whether an end of it is in the guest of each variant."""
        return any(end.at == GUEST for end in self.ends)

    @property
    def on_nodes(self) -> bool:
        """Whether mpirun starts it on several machines."""
        return self.tool == "nccl-tests" and len(self.ends) > 1


@dataclass(frozen=True)
class Server:
    """A host of the inventory. The disk of ``p2p`` is overwritten by the p2p test.

    ``assign`` are further functions for the guest; ``machines`` are others that tools run on.
    """

    name: str
    address: Address
    p2p: Mapping[str, str] = field(default_factory=dict)
    guest_cpus: int = 2
    guest_memory_mib: int = 4096
    assign: tuple[str, ...] = ()
    functions: Mapping[str, str] = field(default_factory=dict)
    """Functions that have a driver of their own for guests, by name."""
    machines: Mapping[str, Address] = field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    console: str | None = None
    """A command here that prints the serial console, from now on, until it is ended."""


def load(path: Path) -> dict[str, Server]:
    """The servers of an inventory by name; UsageError says all that is wrong in the file."""
    document = _read(path)
    _refuse(path, mistakes(document))
    return {name: _server(name, entry) for name, entry in document["hosts"].items()}


def pick(path: Path, name: str) -> Server:
    """One server of the inventory; UsageError with the nearest name if it is not there.

    What is wrong in the entry of another host is no error, but told.
    """
    document = _read(path)
    found = mistakes(document)
    _refuse(path, [one for one in found if one.host is None])
    hosts = document["hosts"]
    if name not in hosts:
        raise UsageError(f"no host '{name}' in {path}", hint=nearest(name, list(hosts)))
    _refuse(path, [one for one in found if one.host == name])
    others = sorted({str(one.host) for one in found})
    if others:
        ui.warn(f"inventory {path}: the entry of {', '.join(others)} is wrong")
    return _server(name, hosts[name])


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise UsageError(f"there is no inventory {path}", hint="see docs/servers.md") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"inventory {path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # a ValueError is one of a date that is none
        raise UsageError(
            f"inventory {path} is not YAML: {' '.join(str(error).split())[:200]}"
        ) from None


def _refuse(path: Path, found: Sequence[Mistake]) -> None:
    """UsageError with all mistakes, if there is one."""
    if len(found) == 1:
        raise UsageError(f"inventory {path}: {found[0]}", hint=found[0].hint)
    if found:
        lines = [f"{one} ({one.hint})" if one.hint else str(one) for one in found]
        raise UsageError(
            f"inventory {path} has {len(found)} mistakes, the first: {found[0]}",
            detail="\n".join(lines),
            hint=found[0].hint or "docs/servers.md has examples",
        )


def _server(name: str, entry: Mapping[str, Any]) -> Server:
    assign = tuple(entry.get("assign", ()))
    guest = entry.get("guest", {})
    return Server(
        name=name,
        address=_address(entry),
        console=entry.get("console"),
        p2p=entry.get("p2p", {}),
        guest_cpus=guest.get("cpus", 2),
        guest_memory_mib=guest.get("memory_mib", 4096),
        assign=assign,
        functions=dict(entry.get("functions", {})),
        machines={one: _address(login) for one, login in entry.get("machines", {}).items()},
        tools=tuple(_tool(one, assign) for one in entry.get("tools", ())),
    )


def _address(login: Mapping[str, Any]) -> Address:
    return sshconfig.resolve(
        login["address"],
        port=login.get("port"),
        user=login.get("user"),
        key=Path(login["key"]).expanduser() if "key" in login else None,
        host_key=login.get("host_key"),
    )


def _tool(entry: Mapping[str, Any], assign: tuple[str, ...]) -> Tool:
    name = entry["tool"]
    ends: tuple[End, ...] = (End(at=entry.get("at", GUEST)),)
    if name == "perftest":
        ends = (End(**entry["client"]), End(**entry["server"]))
    elif "nodes" in entry:
        ends = tuple(End(**node) for node in entry["nodes"])
    return Tool(
        tool=name,
        command=entry.get("command", COMMANDS.get(name, name)),
        ends=ends,
        functions=tuple(entry.get("functions", assign)),
        arguments=tuple(entry["arguments"]) if "arguments" in entry else None,
        tests=tuple(entry.get("tests", ())),
        gpus=entry.get("gpus"),
        mpirun=tuple(entry.get("mpirun", ())),
        optional=entry.get("optional", False),
        variant=variant_of(entry),
        series=entry.get("series"),
        runs=entry.get("runs", 3),
        deadline_s=entry.get("deadline_s", 300.0),
        label=entry.get("label"),
    )
