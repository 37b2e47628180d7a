# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's own servers: a YAML file that says how to reach each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from .catalogue import nearest
from .errors import UsageError
from .shell import Address

_PCI = r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$"

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["hosts"],
    "additionalProperties": False,
    "properties": {
        "hosts": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "type": "object",
                "required": ["address"],
                "additionalProperties": False,
                "properties": {
                    "address": {"type": "string", "minLength": 1},
                    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                    "user": {"type": "string", "minLength": 1},
                    "key": {"type": "string"},
                    "host_key": {"type": "string", "pattern": r"^\S+ \S+"},
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
class Server:
    """A host of the inventory. The disk of ``p2p`` is overwritten by the p2p test."""

    name: str
    address: Address
    p2p: Mapping[str, str] = field(default_factory=dict)
    guest_cpus: int = 2
    guest_memory_mib: int = 4096


def load(path: Path) -> dict[str, Server]:
    """The servers of an inventory by name; UsageError says what is wrong in the file."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        key = Path(entry["key"]).expanduser() if "key" in entry else None
        if key is not None and not key.is_file():
            raise UsageError(
                f"inventory {path}: {name}: there is no key file {key}",
                hint="give the private key's file, or leave 'key' out to use the SSH agent",
            )
        guest = entry.get("guest", {})
        servers[name] = Server(
            name=name,
            address=Address(
                entry["address"],
                entry.get("port", 22),
                entry.get("user", "root"),
                key,
                entry.get("host_key"),
            ),
            p2p=entry.get("p2p", {}),
            guest_cpus=guest.get("cpus", 2),
            guest_memory_mib=guest.get("memory_mib", 4096),
        )
    return servers


def pick(path: Path, name: str) -> Server:
    """One server of the inventory; UsageError with the nearest name if it is not there."""
    servers = load(path)
    if name not in servers:
        raise UsageError(f"no host '{name}' in {path}", hint=nearest(name, list(servers)))
    return servers[name]
