# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's own servers: a YAML file that says how to reach each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ..core.errors import UsageError
from ..core.model import VARIANTS, Variant
from ..core.schema import StrictLoader
from ..core.text import nearest
from .shell import Address

_PCI = r"^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$"
_FUNCTIONS = {"type": "array", "items": {"type": "string", "pattern": _PCI}, "uniqueItems": True}
_WORDS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_NAME = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*$"}
"""Of a host or a machine: names of files are made of it."""
_LOGIN = {
    "address": {"type": "string", "minLength": 1},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "user": {"type": "string", "minLength": 1},
    "key": {"type": "string"},
    "host_key": {"type": "string", "pattern": r"^\S+ \S+"},
}

GUEST, HOST = "guest", "host"
"""Where a tool runs, beside the names of machines: the guest of each variant, or the host."""

_END = {
    "type": "object",
    "required": ["at", "device"],
    "additionalProperties": False,
    "properties": {
        "at": {"type": "string", "minLength": 1},
        "device": {"type": "string", "minLength": 1},
        "address": {"type": "string", "minLength": 1},
        "cuda": {"type": "integer", "minimum": 0},
        "dmabuf": {"type": "boolean"},
    },
}
_OF_ALL = (
    "tool",
    "label",
    "functions",
    "arguments",
    "optional",
    "variant",
    "series",
    "runs",
    "deadline_s",
)
TOOLS: Mapping[str, tuple[str, ...]] = {
    "perftest": ("command", "client", "server"),
    "nvbandwidth": ("command", "at", "tests"),
    "p2pBandwidthLatencyTest": ("command", "at"),
    "nccl-tests": ("command", "at", "gpus"),
}
"""The tools that are known, and the keys that each has beside those of all."""

_VARIANT_WORDS: Mapping[Any, Variant] = {True: "on", False: "off"}
"""YAML reads the bare words on and off as true and false."""

_COMMANDS = {"perftest": "ib_write_bw", "nccl-tests": "all_reduce_perf"}
"""The program of a tool where it is not named as the tool."""

_TOOL = {
    "type": "object",
    "required": ["tool"],
    "additionalProperties": False,
    "properties": {
        "tool": {"enum": list(TOOLS)},
        "label": {"type": "string", "minLength": 1},
        "command": {"type": "string", "pattern": r"^\S+$"},
        "at": {"type": "string", "minLength": 1},
        "client": _END,
        "server": _END,
        "tests": {**_WORDS, "minItems": 1},
        "gpus": {"type": "integer", "minimum": 1},
        "functions": {**_FUNCTIONS, "minItems": 1},
        "arguments": _WORDS,
        "optional": {"type": "boolean"},
        "variant": {"enum": [*VARIANTS, True, False]},
        "series": {"type": "string", "minLength": 1},
        "runs": {"type": "integer", "minimum": 1},
        "deadline_s": {"type": "number", "exclusiveMinimum": 0},
    },
}

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["hosts"],
    "additionalProperties": False,
    "properties": {
        "hosts": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": _NAME,
            "additionalProperties": {
                "type": "object",
                "required": ["address"],
                "additionalProperties": False,
                "properties": {
                    **_LOGIN,
                    "assign": _FUNCTIONS,
                    "functions": {
                        "type": "object",
                        "propertyNames": {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"},
                        "additionalProperties": {"type": "string", "pattern": _PCI},
                    },
                    "machines": {
                        "type": "object",
                        "propertyNames": _NAME,
                        "additionalProperties": {
                            "type": "object",
                            "required": ["address"],
                            "additionalProperties": False,
                            "properties": _LOGIN,
                        },
                    },
                    "tools": {"type": "array", "items": _TOOL},
                    "p2p": {
                        "type": "object",
                        "required": ["peer", "disk"],
                        "additionalProperties": False,
                        "properties": {
                            "peer": {"type": "string", "pattern": _PCI},
                            "disk": {"type": "string", "pattern": _PCI},
                        },
                    },
                    "guest": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "cpus": {"type": "integer", "minimum": 1},
                            "memory_mib": {"type": "integer", "minimum": 512},
                        },
                    },
                },
            },
        }
    },
}
"""The JSON schema of an inventory."""


@dataclass(frozen=True)
class End:
    """Where a tool runs: ``at`` is GUEST, HOST or a machine's name.

    For perftest, ``device`` is the RDMA device there; ``cuda`` the GPU whose memory is moved (None:
    ordinary memory), by its dma-buf with ``dmabuf``; ``address`` is where the other end finds it.
    """

    at: str = GUEST
    device: str = ""
    address: str | None = None
    cuda: int | None = None
    dmabuf: bool = False


@dataclass(frozen=True)
class Tool:
    """A tool that is installed on a server, and how to run it.

    ``functions`` are PCI functions of the host, those whose ACS, ATS and relaxed ordering are
    recorded with the results. ``ends`` are a client and a server, or the one place where it runs.
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


def load(path: Path) -> dict[str, Server]:
    """The servers of an inventory by name; UsageError says what is wrong in the file."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise UsageError(f"there is no inventory {path}", hint="see docs/servers.md") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"inventory {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"inventory {path} is no YAML: {' '.join(str(error).split())[:200]}"
        ) from None
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)
    for problem in sorted(found, key=lambda one: list(map(str, one.path))):
        where = "/".join(str(part) for part in problem.path) or "top"
        hint = None
        if problem.validator == "additionalProperties" and isinstance(problem.instance, dict):
            known = list(problem.schema.get("properties", {}))
            strange = [key for key in problem.instance if key not in known]
            hint = nearest(str(strange[0]), known) if strange and known else None
        raise UsageError(f"inventory {path}: {where}: {problem.message[:200]}", hint=hint)
    servers = {}
    for name, entry in document["hosts"].items():
        place = f"inventory {path}: {name}"
        machines = {
            one: _address(f"{place}: machines: {one}", login)
            for one, login in entry.get("machines", {}).items()
        }
        for one in machines:
            if one in (GUEST, HOST):
                raise UsageError(
                    f"{place}: a machine cannot be named '{one}'",
                    hint="that word has a meaning for 'at'",
                )
        assign = tuple(entry.get("assign", ()))
        guest = entry.get("guest", {})
        servers[name] = Server(
            name=name,
            address=_address(place, entry),
            p2p=entry.get("p2p", {}),
            guest_cpus=guest.get("cpus", 2),
            guest_memory_mib=guest.get("memory_mib", 4096),
            assign=assign,
            functions=dict(entry.get("functions", {})),
            machines=machines,
            tools=_tools(place, entry, machines, assign),
        )
    return servers


def _address(place: str, entry: Mapping[str, Any]) -> Address:
    key = Path(entry["key"]).expanduser() if "key" in entry else None
    if key is not None and not key.is_file():
        raise UsageError(
            f"{place}: there is no key file {key}",
            hint="give the private key's file, or leave 'key' out to use the SSH agent",
        )
    return Address(
        entry["address"],
        entry.get("port", 22),
        entry.get("user", "root"),
        key,
        entry.get("host_key"),
    )


def _tools(
    place: str, entry: Mapping[str, Any], machines: Mapping[str, Address], assign: tuple[str, ...]
) -> tuple[Tool, ...]:
    found = tuple(
        _tool(f"{place}: tools/{number}", one, machines, assign)
        for number, one in enumerate(entry.get("tools", ()))
    )
    seen: dict[object, int] = {}
    for number, one in enumerate(found):
        program = one.command.rpartition("/")[2]
        what = (one.tool, program, one.ends, one.variant, one.series, one.label)
        first = seen.setdefault(what, number)
        if first != number:
            raise UsageError(
                f"{place}: nothing tells results of tools/{number} from those of tools/{first}",
                hint="give one of them a label",
            )
    return found


def _tool(
    place: str, entry: Mapping[str, Any], machines: Mapping[str, Address], assign: tuple[str, ...]
) -> Tool:
    name = entry["tool"]
    place = f"{place}: {name}"
    known = (*_OF_ALL, *TOOLS[name])
    for key in entry:
        if key not in known:
            raise UsageError(f"{place} has no key '{key}'", hint=f"it has {', '.join(known)}")
    if name == "perftest":
        for key in ("client", "server"):
            if key not in entry:
                raise UsageError(
                    f"{place} lacks the key '{key}'",
                    hint="perftest has two ends: say on which machine and device each is",
                )
        if "address" not in entry["server"]:
            raise UsageError(
                f"{place}: server lacks the key 'address'",
                hint="the address at which the client finds it",
            )
        ends = tuple(End(**entry[key]) for key in ("client", "server"))
    else:
        ends = (End(at=entry.get("at", GUEST)),)
    for end in ends:
        if end.at not in (GUEST, HOST, *machines):
            raise UsageError(
                f"{place}: there is no machine '{end.at}'",
                hint=nearest(end.at, [GUEST, HOST, *machines]),
            )
        if end.dmabuf and end.cuda is None:
            raise UsageError(
                f"{place}: dmabuf without cuda", hint="say which GPU's memory: cuda: 0"
            )
    functions = tuple(entry.get("functions", assign))
    if not functions:
        raise UsageError(
            f"{place}: which functions of the host does it use?",
            hint="functions: [PCI addresses]; their ACS, ATS and relaxed ordering are recorded",
        )
    variant = entry.get("variant", "vanilla")
    tool = Tool(
        tool=name,
        command=entry.get("command", _COMMANDS.get(name, name)),
        ends=ends,
        functions=functions,
        arguments=tuple(entry["arguments"]) if "arguments" in entry else None,
        tests=tuple(entry.get("tests", ())),
        gpus=entry.get("gpus"),
        optional=entry.get("optional", False),
        variant=_VARIANT_WORDS.get(variant, variant),
        series=entry.get("series"),
        runs=entry.get("runs", 3),
        deadline_s=entry.get("deadline_s", 300.0),
        label=entry.get("label"),
    )
    if tool.in_guest and ("variant" in entry or "series" in entry):
        raise UsageError(
            f"{place}: it runs in the guest of each variant, so 'variant' and 'series' say nothing",
            hint="leave them out",
        )
    if (tool.variant == "on") != (tool.series is not None):
        raise UsageError(
            f"{place}: 'series' goes with variant: on, and with no other",
            hint="what runs in that machine's host: variant: on, series: direct-p2p",
        )
    return tool


def pick(path: Path, name: str) -> Server:
    """One server of the inventory; UsageError with the nearest name if it is not there."""
    servers = load(path)
    if name not in servers:
        raise UsageError(f"no host '{name}' in {path}", hint=nearest(name, list(servers)))
    return servers[name]
