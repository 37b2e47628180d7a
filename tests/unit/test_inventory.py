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
    console: tail -F /dev/null
""",
        ),
        "gpu1",
    )
    assert str(server.address) == "admin@192.0.2.7:2222"
    assert server.p2p["disk"] == "0000:04:00.0"
    assert server.console == "tail -F /dev/null"
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
        ("hosts: [", "is not YAML", None),
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


# --- all mistakes at once --------------------------------------------------------------------

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"


def refused(tmp_path: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert "\n" not in caught.value.message
    return caught.value


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    error = refused(
        tmp_path,
        """
hosts:
  a:
    address: root@gpu1
    prot: 22
    host_key: ssh-ed25519 AAAA…
    p2p: {peer: "0000:03:00.0", disk: "0000:03:00.0"}
    tools:
      - {tool: perfest}
      - {tool: nvbandwidth, at: vm9, functions: ["0000:03:00.0"], gpus: 2}
  b: {adress: x, key: /no/such, port: 0}
more: 1
""",
    )
    assert "has 11 mistakes, the first: top: " in error.message
    assert str(error.detail).splitlines() == [
        "top: Additional properties are not allowed ('more' was unexpected) (known: hosts)",
        "hosts/a: Additional properties are not allowed ('prot' was unexpected)"
        " (did you mean 'port'?)",
        "hosts/a/address: 'root@gpu1' has a user in it (address: gpu1, user: root)",
        "hosts/a/host_key: 'AAAA…' is no whole key: it is no base64"
        " ('ssh-keyscan HOST' prints the type and the key; leave it out to use known_hosts)",
        "hosts/a/p2p: peer and disk are the same function 0000:03:00.0"
        " (data is moved between two functions)",
        "hosts/a/tools/0/tool: 'perfest' is not one of ['perftest', 'nvbandwidth',"
        " 'p2pBandwidthLatencyTest', 'nccl-tests']",
        "hosts/a/tools/1: nvbandwidth has no key 'gpus' (it has tool, label, functions, arguments,"
        " optional, variant, series, runs, deadline_s, command, at, tests)",
        "hosts/a/tools/1: nvbandwidth: there is no machine 'vm9' (known: guest, host)",
        "hosts/b: Additional properties are not allowed ('adress' was unexpected)"
        " (did you mean 'address'?)",
        "hosts/b: there is no key file /no/such (give the private key's file, or leave 'key' out to"
        " use the SSH agent)",
        "hosts/b/port: 0 is less than the minimum of 1",
    ]


def test_the_entry_of_another_host_is_not_this_host_s_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "hosts: {a: {address: x}, b: {adress: y}, c: 7}")
    assert pick(path, "a").address.host == "x"
    assert "the entry of b, c is wrong" in capfd.readouterr().err
    with pytest.raises(UsageError, match="'adress' was unexpected"):
        pick(path, "b")
    with pytest.raises(UsageError, match="7 is not of type 'object'"):
        pick(path, "c")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("ssh-ed25519 AAAA…", "no base64"),
        ("ssh-ed25519 AAAA", "no key of the type ssh-ed25519"),
        ("ssh-rsa " + KEY.split()[1], "no key of the type ssh-rsa"),
        (KEY[:-8], "no whole key"),
        (KEY[:-6], "no whole key"),
        ("ssh-none AAAACHNzaC1ub25l", "no whole key"),
        ("ssh-rsa AAAAB3NzaC1yc2E=", "no whole key"),
        ("ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTY=", "no whole key"),
        ("nothing", "does not match"),
    ],
)
def test_host_keys_that_are_none(tmp_path: Path, key: str, says: str) -> None:
    error = refused(tmp_path, f"hosts: {{a: {{address: x, host_key: '{key}'}}}}")
    assert "hosts/a/host_key: " in error.message
    assert says in error.message


def test_a_host_key(tmp_path: Path) -> None:
    for text in (KEY, f"{KEY} root@gpu1"):
        found = load(write(tmp_path, f"hosts: {{a: {{address: x, host_key: '{text}'}}}}"))
        assert found["a"].address.host_key == text


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("", "the file is empty", "docs/servers.md"),
        ("[]", "is not of type 'object'", None),
        ("hosts: {a: {address: 'gpu1:2222'}}", "has a port in it", "address: gpu1, port: 2222"),
        ("hosts: {a: {address: 'a b'}}", "no name or address", None),
        ("hosts: {a: {address: 'ssh://a/'}}", "no name or address", None),
        ("hosts: {a: {address: x, key: ~nosuchuser/k}}", "there is no key file", None),
        ("hosts: {a: {address: 2026-99-99}}", "is not YAML", None),
        ("hosts: &x {a: *x}", "'address' is a required", None),
        (
            "hosts: {a: {address: x, imc: '0000:7e:00.1'}}",
            "'imc' was unexpected",
            "functions: {imc",
        ),
        ("hosts: {a: {address: x, machines: [vm1]}}", "is not of type 'object'", None),
        ("hosts: {a: {address: x, tools: {tool: x}}}", "is not of type 'array'", None),
        (
            "hosts: {a: {address: x, assign: ['0000:03:00.0'], tools: "
            "[{tool: nvbandwidth, deadline_s: .nan}]}}",
            "deadline_s is nan",
            None,
        ),
    ],
)
def test_further_mistakes(tmp_path: Path, text: str, says: str, hint: str | None) -> None:
    error = refused(tmp_path, text)
    assert says in error.message
    assert hint is None or hint in str(error.hint)


def test_an_ipv6_address(tmp_path: Path) -> None:
    path = write(tmp_path, "hosts: {a: {address: '2001:db8::7'}}")
    assert load(path)["a"].address.host == "2001:db8::7"


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_documentation(tmp_path: Path, number: int) -> None:
    page = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
    parts = page.split("```yaml\n# inventory.yaml")[1:]
    examples = ["# " + part.partition("```")[0] for part in parts]
    assert len(examples) == 2
    assert "gpu1" in load(write(tmp_path, examples[number]))
