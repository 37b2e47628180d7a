# SPDX-License-Identifier: GPL-2.0-or-later
"""Inventories: what a user may get wrong."""

from pathlib import Path

import pytest

from nearmetal.core.errors import UsageError
from nearmetal.machines.inventory import load, pick


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "inventory.yaml"
    path.write_text(text)
    return path


def test_whole_entry(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    server = pick(
        write(
            tmp_path,
            f"""
hosts:
  gpu1:
    address: 192.0.2.7
    port: 2222
    user: admin
    key: {key}
    p2p: {{peer: "0000:03:00.0", disk: "0000:04:00.0"}}
    guest: {{cpus: 8}}
""",
        ),
        "gpu1",
    )
    assert str(server.address) == "admin@192.0.2.7:2222"
    assert server.p2p["disk"] == "0000:04:00.0"
    assert (server.guest_cpus, server.guest_memory_mib) == (8, 4096)


@pytest.mark.parametrize(
    ("text", "word", "hint"),
    [
        ("hosts: {}", "hosts", None),
        ("hosts: {a: {}}", "'address' is a required property", None),
        ("hosts: {a: {address: x, prot: 22}}", "prot", "'port'"),
        ("hosts: {a: {address: x, port: 99999}}", "99999", None),
        ("hosts: {a: {address: x, key: /no/such/key}}", "no key file", "private key"),
        ("hosts: {a: {address: x, p2p: {peer: '3:0.0', disk: '4:0.0'}}}", "4:0.0", None),
        ("hosts: [", "no YAML", None),
        ("hosts: {a: {address: x}, a: {address: y}}", "the key 'a' comes twice", None),
        ("hosts: {? [a] : {address: x}}", "unhashable key", None),
        ("hosts: {1: {address: x}}", "1 is not of type 'string'", None),
        ("hosts: {../a: {address: x}}", "'../a' does not match", None),
        ("hosts: {a: {address: x, machines: {b/c: {address: y}}}}", "'b/c' does not match", None),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, text: str, word: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert word in caught.value.message
    assert "\n" not in caught.value.message
    if hint:
        assert hint in str(caught.value.hint)


def test_unknown_host_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "hosts: {gpu1: {address: x}, gpu2: {address: y}}")
    with pytest.raises(UsageError) as caught:
        pick(path, "gup1")
    assert "'gpu1'" in str(caught.value.hint)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no inventory"):
        load(tmp_path / "none.yaml")
