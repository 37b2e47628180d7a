# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's ssh configuration, as OpenSSH resolves it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nearmetal.core.errors import EnvironmentBroken, UsageError
from nearmetal.machines.knock import knock
from nearmetal.machines.shell import Address, connect
from nearmetal.machines.sshconfig import resolve

CONFIG = """
Include {included}

Host gpu1
    HostName 192.0.2.7
    User admin
    Port 2222
    IdentityFile {key}

Host gpu2
    HostName 192.0.2.8
    ProxyJump bastion

Host gpu3
    ProxyJump ops@a.example.org:2200,bastion

Host gpu4
    ProxyCommand nc -x proxy:1080 %h %p %%r=%r

Host loop1
    ProxyJump loop2
Host loop2
    ProxyJump loop1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    key = tmp_path / "id"
    key.touch()
    included = tmp_path / "more"
    included.write_text("Host bastion\n    HostName 192.0.2.1\n    User jump\n")
    path = tmp_path / "config"
    path.write_text(CONFIG.format(included=included, key=key))
    return path


def test_a_machine_that_is_not_mentioned(config: Path) -> None:
    assert resolve("192.0.2.9", config=config) == Address("192.0.2.9")


def test_an_alias(config: Path, tmp_path: Path) -> None:
    expected = Address("192.0.2.7", 2222, "admin", tmp_path / "id", alias="gpu1")
    assert resolve("gpu1", config=config) == expected


def test_what_the_inventory_says_goes_before(config: Path) -> None:
    key = Path("/k")
    found = resolve("gpu1", port=22, user="root", key=key, host_key="t d", config=config)
    assert found == Address("192.0.2.7", 22, "root", key, "t d", alias="gpu1")


def test_a_key_file_that_is_not_there_is_passed_over(config: Path, tmp_path: Path) -> None:
    (tmp_path / "id").unlink()
    other = tmp_path / "copy"
    other.write_text(config.read_text())
    assert resolve("gpu1", config=other).key is None


def test_a_jump_host(config: Path) -> None:
    found = resolve("gpu2", config=config)
    assert found.jump == Address("192.0.2.1", 22, "jump", alias="bastion")
    assert (found.host, found.user) == ("192.0.2.8", "root")


def test_jump_hosts_in_a_row(config: Path) -> None:
    first = Address("a.example.org", 2200, "ops")
    last = Address("192.0.2.1", 22, "jump", jump=first, alias="bastion")
    assert resolve("gpu3", config=config) == Address("gpu3", jump=last, alias="gpu3")


def test_a_command_has_its_words_filled_in(config: Path) -> None:
    assert resolve("gpu4", config=config).proxy == "nc -x proxy:1080 gpu4 22 %r=root"


def test_jumps_in_circles(config: Path) -> None:
    with pytest.raises(UsageError, match="in circles: loop1 -> loop2 -> loop1"):
        resolve("loop1", config=config)


def test_a_configuration_that_ssh_refuses(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("Hots gpu1\n")
    with pytest.raises(UsageError, match="ssh's configuration cannot be read") as caught:
        resolve("gpu1", config=path)
    assert caught.value.hint == "'ssh -G gpu1' shows it"


def test_the_machine_that_is_met_first_is_knocked_at() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    behind = Address("192.0.2.8", jump=Address("127.0.0.1", port))
    with pytest.raises(EnvironmentBroken, match=r"gpu2's jump host: 127.0.0.1 refuses"):
        knock("gpu2", behind)
    with pytest.raises(EnvironmentBroken, match=r"gpu2's jump host: .* refuses the connection"):
        connect("gpu2", behind, deadline_s=5, refused_ends=True)


def test_a_command_makes_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's output is what SSH reads: here it ends at once, and that is told."""
    monkeypatch.setattr("nearmetal.machines.shell._HANDSHAKE_S", 1.0)
    asked = tmp_path / "asked"
    there = Address("gpu4", proxy=f"sh -c 'echo met > {asked}'")
    with pytest.raises(EnvironmentBroken, match="gpu4: no SSH at root@gpu4:22"):
        connect("gpu4", there, deadline_s=1)
    assert asked.read_text() == "met\n"
