# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON schemas of the files that people and other programs write, and their YAML."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jsonschema
import yaml

from .text import nearest


class StrictLoader(yaml.SafeLoader):
    """YAML of plain values in which a key may not come twice: the last would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping's values; a MarkedYAMLError for a key that comes twice, or is no scalar."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key_node.value}' comes twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Violation:
    """Where a document breaks its schema, and how: ``path`` are keys and indices from the top."""

    path: tuple[str | int, ...]
    message: str
    hint: str | None = None

    @property
    def where(self) -> str:
        """The place in words that a reader can search for, such as ``run.started``."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text or "the document"


@functools.cache
def load_schema(name: str) -> Mapping[str, Any]:
    """A schema of the package's data folder."""
    text = (files("nearmetal") / "data" / name).read_text(encoding="utf-8")
    schema: Mapping[str, Any] = json.loads(text)
    return schema


def violation(document: object, schema: Mapping[str, Any]) -> Violation | None:
    """The deepest reason why a document breaks its schema, or None where it holds."""
    validator = jsonschema.Draft202012Validator(schema)
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is None:
        return None
    path = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = sorted(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        return Violation(path, f"unknown key '{unknown}'", nearest(str(unknown), known))
    if error.validator == "required":
        return Violation(path, error.message.replace(" property", ""))
    return Violation(path, _short(error.message))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
