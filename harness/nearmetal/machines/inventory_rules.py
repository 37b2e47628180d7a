# SPDX-License-Identifier: GPL-2.0-or-later
"""What an inventory has to be: its schema, and rules that a schema can't say.

All mistakes are found at once, so that nobody mends one to be told of the next.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import paramiko

from ..core.model import VARIANTS, Variant
from ..core.text import nearest

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
_NODE = {
    "type": "object",
    "required": ["at", "address"],
    "additionalProperties": False,
    "properties": {
        "at": {"type": "string", "minLength": 1},
        "address": {"type": "string", "minLength": 1},
        "gpus": {"type": "integer", "minimum": 1},
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
    "nccl-tests": ("command", "at", "gpus", "nodes", "mpirun"),
}
"""The tools that are known, and the keys that each has beside those of all."""

VARIANT_WORDS: Mapping[Any, Variant] = {True: "on", False: "off"}
"""YAML reads the bare words on and off as true and false."""

COMMANDS = {"perftest": "ib_write_bw", "nccl-tests": "all_reduce_perf"}
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
        "nodes": {"type": "array", "items": _NODE, "minItems": 2},
        "mpirun": _WORDS,
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
                    "console": {"type": "string", "minLength": 1},
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

Place = tuple[str | int, ...]
"""Keys and indices from the top of the document."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong at a place of an inventory, in one line, and what to do."""

    place: Place
    text: str
    hint: str | None = None

    @property
    def host(self) -> str | None:
        """The host whose entry it is in; None for what concerns all of them."""
        return str(self.place[1]) if len(self.place) > 1 and self.place[0] == "hosts" else None

    def __str__(self) -> str:
        return f"{'/'.join(map(str, self.place)) or 'top'}: {self.text}"


def mistakes(document: object) -> list[Mistake]:
    """All that is wrong in an inventory, by place."""
    if document is None:
        return [Mistake((), "the file is empty", "see docs/servers.md")]
    found = list(_by_schema(document))
    hosts = document.get("hosts") if isinstance(document, dict) else None
    if isinstance(hosts, dict):
        broken = [one.place for one in found]
        for name, entry in hosts.items():
            if isinstance(name, str) and isinstance(entry, dict):
                found += _of_host(("hosts", name), entry, broken)
    return sorted(found, key=lambda one: [_ordered(part) for part in one.place])


def _ordered(part: str | int) -> tuple[int, str]:
    return (part, "") if isinstance(part, int) else (-1, str(part))


def _by_schema(document: object) -> Iterator[Mistake]:
    for problem in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document):
        place, instance = tuple(problem.absolute_path), problem.instance
        known = list(problem.schema.get("properties", {}))
        strange: list[str] = []
        if isinstance(instance, dict) and known:
            strange = [str(key) for key in instance if key not in known]
        if problem.validator == "additionalProperties" and strange:
            for key in strange:
                text = f"Additional properties are not allowed ('{key}' was unexpected)"
                yield Mistake(place, text, _instead(key, place, known))
        elif problem.validator == "required":
            # a key that was meant by one that is wrong is not missing
            missing = problem.message.partition("'")[2].partition("'")[0]
            if not any(missing in difflib.get_close_matches(key, known, 1) for key in strange):
                yield Mistake(place, problem.message[:200])
        else:
            yield Mistake(place, " ".join(problem.message.split())[:200])


def _instead(key: str, place: Place, known: Sequence[str]) -> str:
    if key == "imc" and len(place) == 2:
        return "functions: {imc: ...}"
    return nearest(key, known)


def _of_host(place: Place, entry: Mapping[str, Any], broken: Sequence[Place]) -> Iterator[Mistake]:
    yield from _of_login(place, entry)
    machines = entry.get("machines")
    machines = machines if isinstance(machines, dict) else {}
    for name, login in machines.items():
        where = (*place, "machines", str(name))
        if name in (GUEST, HOST):
            text = f"a machine cannot be named '{name}'"
            yield Mistake(where, text, "that word has a meaning for 'at'")
        if isinstance(login, dict):
            yield from _of_login(where, login)
    pair = entry.get("p2p")
    if isinstance(pair, dict) and pair.get("peer") is not None and pair["peer"] == pair.get("disk"):
        text = f"peer and disk are the same function {pair['peer']}"
        yield Mistake((*place, "p2p"), text, "data is moved between two functions")
    tools = entry.get("tools")
    seen: dict[object, int] = {}
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        where = (*place, "tools", number)
        if any(one[: len(where)] == where for one in broken):
            continue
        yield from _of_tool(where, tool, machines, bool(entry.get("assign")))
        first = seen.setdefault(_told_by(tool), number)
        if first != number:
            yield Mistake(
                where,
                f"nothing tells results of tools/{number} from those of tools/{first}",
                "give one of them a label",
            )


def _told_by(tool: Mapping[str, Any]) -> object:
    """What results of a tool are told by: programs, places, what the machine is."""
    kind = tool["tool"]
    command = tool.get("command", COMMANDS.get(kind, kind)).rpartition("/")[2]
    words = ("client", "server", "nodes", "series", "label")
    rest = [tool.get("at", GUEST), variant_of(tool), *(tool.get(word) for word in words)]
    return (kind, command, json.dumps(rest, sort_keys=True, default=str))


def _of_login(place: Place, login: Mapping[str, Any]) -> Iterator[Mistake]:
    """``address``, ``key`` and ``host_key`` of a host or machine."""
    address = login.get("address")
    if isinstance(address, str) and address:
        yield from _of_address((*place, "address"), address)
    key = login.get("key")
    if isinstance(key, str):
        try:
            there = Path(key).expanduser().is_file()
        except (RuntimeError, OSError, ValueError):
            there = False
        if not there:
            yield Mistake(
                place,
                f"there is no key file {key}",
                "give the private key's file, or leave 'key' out to use the SSH agent",
            )
    host_key = login.get("host_key")
    if isinstance(host_key, str) and (wrong := _wrong_with_key(host_key)):
        yield Mistake(
            (*place, "host_key"),
            wrong,
            "'ssh-keyscan HOST' prints the type and the key; leave it out to use known_hosts",
        )


def _of_address(place: Place, address: str) -> Iterator[Mistake]:
    user, at, host = address.rpartition("@")
    name, colon, port = address.rpartition(":")
    if at:
        yield Mistake(place, f"'{address}' has a user in it", f"address: {host}, user: {user}")
    elif colon and port.isdigit() and ":" not in name:
        yield Mistake(place, f"'{address}' has a port in it", f"address: {name}, port: {port}")
    elif re.search(r"[\s/\[\]]", address):
        yield Mistake(place, f"'{address}' is no name or address of a host", "such as 192.0.2.7")


def _wrong_with_key(text: str) -> str | None:
    """What keeps a text from being a public key of OpenSSH, ``type base64``."""
    words = text.split()
    if len(words) < 2:
        return None  # the schema's business
    kind, data = words[:2]
    try:
        blob = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return f"'{data[:20]}' is no whole key: it is no base64"
    length = int.from_bytes(blob[:4], "big")
    if blob[4 : 4 + length] != kind.encode():
        return f"'{data[:20]}' is no key of the type {kind}"
    try:
        whole = paramiko.PKey.from_type_string(kind, blob).asbytes() == blob
    except Exception as error:  # whatever the libraries below raise for bytes that are no key
        return f"'{data[:20]}' is no whole key: {' '.join(str(error).split())[:100]}"
    # paramiko fills up a short one with zeros
    return None if whole else f"'{data[:20]}' is no whole key"


def _of_tool(
    place: Place, tool: Mapping[str, Any], machines: Mapping[str, Any], assigned: bool
) -> Iterator[Mistake]:
    name = tool["tool"]
    known = (*_OF_ALL, *TOOLS[name])
    for key in tool:
        if key not in known:
            yield Mistake(place, f"{name} has no key '{key}'", f"it has {', '.join(known)}")
    ends = _ends(tool)
    if name == "perftest":
        for key in ("client", "server"):
            if key not in tool:
                hint = "perftest has two ends: say on which machine and device each is"
                yield Mistake(place, f"{name} lacks the key '{key}'", hint)
        if "address" not in tool.get("server", {"address": ""}):
            hint = "the address at which the client finds it"
            yield Mistake(place, f"{name}: server lacks the key 'address'", hint)
    yield from _of_nodes(place, tool)
    for end in ends:
        if end["at"] not in (GUEST, HOST, *machines):
            yield Mistake(
                place,
                f"{name}: there is no machine '{end['at']}'",
                nearest(end["at"], [GUEST, HOST, *machines]),
            )
        if end.get("dmabuf") and "cuda" not in end:
            hint = "say which GPU's memory: cuda: 0"
            yield Mistake(place, f"{name}: dmabuf without cuda", hint)
    if not tool.get("functions", assigned):
        yield Mistake(
            place,
            f"{name}: which functions of the host does it use?",
            "functions: [PCI addresses]; their ACS, ATS and relaxed ordering are recorded",
        )
    if not math.isfinite(tool.get("deadline_s", 1)):
        yield Mistake(place, f"{name}: deadline_s is {tool['deadline_s']}", "a number of seconds")
    if GUEST in [end["at"] for end in ends]:
        if "variant" in tool or "series" in tool:
            yield Mistake(
                place,
                f"{name}: it runs in the guest of each variant, so 'variant' and 'series' say "
                "nothing",
                "leave them out",
            )
    elif (variant_of(tool) == "on") != ("series" in tool):
        yield Mistake(
            place,
            f"{name}: 'series' goes with variant: on, and with no other",
            "what runs in that machine's host: variant: on, series: direct-p2p",
        )


def _of_nodes(place: Place, tool: Mapping[str, Any]) -> Iterator[Mistake]:
    name = tool["tool"]
    if "mpirun" in tool and "nodes" not in tool:
        yield Mistake(place, f"{name}: mpirun without nodes", "nodes: the machines it starts on")
    if "nodes" not in tool:
        return
    for key in ("at", "gpus"):
        if key in tool:
            yield Mistake(
                place, f"{name}: '{key}' beside nodes", f"each node has its '{key}'; leave it out"
            )
    places = [node["at"] for node in tool["nodes"]]
    for at in sorted({at for at in places if places.count(at) > 1}):
        yield Mistake(place, f"{name}: the node '{at}' comes twice", "one node for each machine")


def _ends(tool: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a tool runs, as far as the entry says."""
    if tool["tool"] == "perftest":
        return [tool[key] for key in ("client", "server") if key in tool]
    return list(tool.get("nodes", ({"at": tool.get("at", GUEST)},)))


def variant_of(tool: Mapping[str, Any]) -> Variant:
    """The variant that a tool's entry names."""
    word = tool.get("variant", "vanilla")
    found: Variant = VARIANT_WORDS.get(word, word)
    return found
