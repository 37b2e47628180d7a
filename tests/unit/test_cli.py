# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: exit statuses, one line an error, no traceback."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearmetal.cli import doctor
from nearmetal.cli.main import main, parser
from nearmetal.core.cache import Cache

REPO = Path(__file__).resolve().parents[2]


def where(words: list[str], folder: Path) -> list[str]:
    """The options of a command that keep it out of the user's folders: those that it has."""
    with_results = words[0] in ("run", "report", "compare", "doctor", "build", "boot", "list")
    with_cache = words[0] not in ("report", "compare", "list", "completion")
    with_cache &= words[:2] not in (["tree", "status"], ["tree", "export"], ["tree", "new-series"])
    return [
        *(["--cache-dir", str(folder)] if with_cache else []),
        *(["--results-dir", str(folder)] if with_results else []),
    ]


def status(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["rnu"], "invalid choice: 'rnu'", "--help"),
        (["run", "--only", "lspic"], "there is no test 'lspic'", "'lspci'"),
        (["run", "--only", "imc", "--variant", "vanilla"], "runs the test 'imc'", "series.yaml"),
        (["run", "--variant", "vanila"], "there is no variant 'vanila'", "'vanilla'"),
        (["run", "--host", "gpu1", "--inventory", "/no/such.yaml"], "no inventory", "docs/"),
        (["run", "--host", "", "--inventory", "/no/such.yaml"], "no inventory", "docs/"),
        (["doctor", "--host", "", "--inventory", "/no/such.yaml"], "no inventory", "docs/"),
        (["run", "--host", "gpu1", "--testbed", "both"], "--testbed both", "leave one"),
        (["cache", "--prune", "--older-than", "nan"], "--older-than", "removes everything"),
        (["cache", "--prune", "--older-than", "-1"], "--older-than", "removes everything"),
        (
            ["export", "--series", "x", "--signoff", "A <a@b>", "--output", "x"],
            "'x'",
            " pci-config-cache, ",
        ),
        (["run", "--checks", "/no/such.yaml"], "/no/such.yaml", ""),
        (["run", "--linux-tree", "/no/such"], "there is nothing there", ""),
        (["run", "-j", "0"], "--jobs", ""),
        (["report", "no-such-run"], "no-such-run", ""),
        (["validate", "--patches", "/no/such"], "/no/such", ""),
        (["validate", "--onto", "/no/such"], "is not a git tree, folder", "qemu 10.2"),
        (["validate", "--onto", "10.2", "--quick"], "not allowed with", "--help"),
        (["tree", "status", "linux", "--dir", "/no/such"], "there is no work tree in", "checkout"),
        (["tree", "new-series", "linux"], "required: NAME, --title", "new-series --help"),
        (["tree", "chekout", "linux"], "invalid choice: 'chekout'", "tree --help"),
        (["report", "--series", "x"], "--series and --metric", "--text"),
        (["report", "-j", "2"], "unrecognized arguments: -j", "--help"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'", "--help"),
        (["export", "--series", "none", "--signoff", "A <a@b>", "--output", "x"], "'none'", ""),
    ],
)
def test_wrong_use_is_status_2_and_one_line(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if words[0] not in ("rnu",):
        words = [*words, *where(words, tmp_path)]
    code, said = status(words, capsys)
    assert code == 2
    assert message in said
    assert hint in said
    assert "Traceback" not in said


def test_cache_that_cannot_be_made_is_status_3(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, said = status(["cache", "--cache-dir", str(tmp_path / "file" / "x")], capsys)
    assert code == 3
    assert "--cache-dir" in said


def test_ssh_without_a_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = status(["ssh", "--cache-dir", str(tmp_path), "host"], capsys)
    assert code == 2
    assert "nearmetal boot" in said


def test_cache_shows_an_empty_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["cache", "--prune", "--cache-dir", str(tmp_path / "c")]) == 0
    assert "GiB of disk are free" in capsys.readouterr().out


def test_the_cache_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c").open()

    def build(folder: Path) -> None:
        (folder / "file").write_bytes(b"x" * 4096)

    made = cache.make("toy", {"a": 1}, build, what="a toy [of wood]")
    os.utime(made.path, (0, 86400))
    capsys.readouterr()
    words = ["cache", "--json", "--cache-dir", str(tmp_path / "c")]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(tmp_path / "c")
    assert document["freed_bytes"] == 0
    assert document["free_bytes"] > 0
    (entry,) = document["entries"]
    size = entry.pop("bytes")
    assert size == 4096 + (made.path / "meta.json").stat().st_size
    assert entry == {
        "kind": "toy",
        "what": "a toy [of wood]",
        "key": made.key,
        "used": "1970-01-02T00:00:00Z",
    }
    assert main([*words, "--prune"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["entries"], document["freed_bytes"]) == ([], size)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for command in ("doctor", "build", "run", "boot", "ssh", "tree", "validate", "report"):
        assert command in said


def commands(one: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from commands(below)


def test_helps_are_of_one_kind() -> None:
    """What the user writes in place of a word is in capitals; JSON is said in one way."""
    for one in commands(parser()):
        for action in one._actions:
            if action.choices is None and not action.option_strings:
                name = action.metavar or action.dest
                assert str(name) == str(name).upper(), f"{one.prog}: {name}"
            if "--json" in action.option_strings:
                assert action.help == "print JSON, for programs", one.prog
        first = (one.description or "x").split()[0]
        assert not first.endswith("s") or one.prog == "nearmetal", f"{one.prog}: {first}"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--series", "direct-p2p"], "add --variant on"),
        (["--variant", "on", "--series", "direct-p2"], "did you mean 'direct-p2p'?"),
    ],
)
def test_boot_of_a_series_that_is_not_there(
    capsys: pytest.CaptureFixture[str], words: list[str], wanted: str
) -> None:
    code, said = status(["boot", *words], capsys)
    assert code == 2
    assert wanted in said


def test_what_doctor_looks_for_is_what_the_scripts_install() -> None:
    """A program whose package scripts/setup.sh forgets is missing on a bare machine alone."""
    setup = (REPO / "scripts" / "setup.sh").read_text()
    installed = set(setup.split('packages="', 1)[1].split('"', 1)[0].split())
    needed = set(doctor.TOOLS.values())
    assert needed <= installed
