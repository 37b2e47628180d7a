# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of hosts, of saved surveys, and of hosts that do not answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from lib.surveys import DATA, DISK, PORTS, SWITCH, changed, claimable, recorded, reduced

from nearmetal.cli import doctor, switches
from nearmetal.cli import main as cli
from nearmetal.core import ui
from nearmetal.core.errors import EnvironmentBroken, Exit, MeasurementError, UsageError
from nearmetal.core.settings import Settings
from nearmetal.machines import host
from nearmetal.machines.inventory import Server
from nearmetal.machines.knock import knock
from nearmetal.machines.shell import Address, Result, Shell
from nearmetal.pci import acs
from nearmetal.probes import topology
from nearmetal.probes.topology import Survey

# --- switches --------------------------------------------------------------------------------


def texts(survey: Survey, state: str) -> list[str]:
    return [one.text for one in switches.switches(survey) if one.state == state]


def test_a_host_without_switches() -> None:
    assert [one.text for one in switches.switches(Survey())] == ["no PCIe switch"]
    assert texts(reduced("two-root-ports"), "ok") == ["no PCIe switch"]


def test_how_to_go_on() -> None:
    found = switches.switches(claimable())
    assert [one.state for one in found] == ["ok", "ok"]
    assert "direct-p2p.md" in found[1].mend
    found = switches.switches(recorded("host"))
    assert [one.state for one in found] == ["ok", "warn", "warn", "warn"]
    assert all(one.mend for one in found[1:])
    assert found[-1].text == (
        f"no direct peer-to-peer: {DISK} is the host's (driver nvme) [not the user's]"
    )


def test_owners_that_reach_each_other_are_an_error() -> None:
    (text,) = texts(reduced("cascade-two-guests"), "broken")
    assert text == (
        "functions of vm1 (pid 376) and vm2 (pid 377) reach each other without the IOMMU: "
        "not redirected at 0000:0a:00.0 (ACS SV+UF), 0000:0a:04.0 (ACS SV+UF)"
    )


@pytest.mark.parametrize(
    ("control", "vector", "mend"),
    [
        (acs.SV | acs.UF, 0, "what switched it off"),
        (None, 0, "without ACS all below the switch can only go to one owner"),
        (acs.EC | acs.RR, 0, "Egress Control Vector"),
    ],
)
def test_one_way_only(control: int | None, vector: int, mend: str) -> None:
    survey = changed(claimable(), DISK, users=("vm2 (pid 9)",))
    survey = changed(survey, PORTS[1], acs=control, egress_vector=vector)
    (found,) = [one for one in switches.switches(survey) if one.state == "broken"]
    assert "functions of vm2 (pid 9) reach those of sleep (pid 190) without the IOMMU" in found.text
    assert mend in found.mend


@pytest.mark.parametrize(
    "name",
    ["card-with-switch", "management-function", "vf-of-nobody", "nvswitches", "nic-two-functions"],
)
def test_servers_where_nothing_is_broken(name: str) -> None:
    assert texts(reduced(name), "broken") == []


def test_redirection_that_is_off_for_one_owner_is_a_note() -> None:
    survey = changed(claimable(), PORTS[1], acs=acs.SV | acs.UF | acs.TB)
    (text,) = texts(survey, "warn")
    assert text == f"requests for peers pass directly at {PORTS[1]} (ACS SV+TB+UF)"


def test_redirected_requests_that_get_lost() -> None:
    survey = changed(reduced("cascade-two-guests"), "0000:0a:00.0", acs=acs.SV | acs.RR | acs.CR)
    (found,) = [one for one in switches.switches(survey) if "Upstream Forwarding" in one.text]
    assert found.what == "switch 0000:0b:00.0"
    assert "end at 0000:0a:00.0 (ACS SV+RR+CR)" in found.text


def test_registers_that_were_not_read() -> None:
    functions = {
        a: changed(recorded("vfio"), a, readable=False, port_type=None).functions[a]
        for a in recorded("vfio").functions
    }
    found = switches.switches(Survey(functions))
    assert [one.state for one in found] == ["warn"]
    assert "registers of 5 bridges were not read" in found[0].text


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, tmp_path, tmp_path, testbed="amd")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell of the table on two lines."""
    monkeypatch.setattr(ui.out, "width", 600)


def saved(name: str) -> str:
    return str(DATA / f"{name}.txt")


def test_a_saved_survey(wide: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--survey", saved("management-function")]) == 0
    said = capfd.readouterr().out
    assert "\n  0000:01:00.1 11f8:4028 in the switch's device" in said
    assert "the host's (driver switchtec) [not the user's]" in said
    assert cli.main(["doctor", "--survey", saved("cascade-two-guests")]) == Exit.ENVIRONMENT
    assert "BROKEN" in capfd.readouterr().out
    assert cli.main(["doctor", "--survey", saved("card-with-switch")]) == 0


def findings(survey: Survey) -> list[dict[str, str]]:
    return [
        {"what": one.what, "state": one.state, "text": one.text, "hint": one.mend}
        for one in switches.switches(survey)
    ]


def test_json_is_all_that_is_on_standard_output() -> None:
    words = ["doctor", "--survey", saved("survey-host"), "--json", "-v"]
    done = subprocess.run(
        [sys.executable, "-m", "nearmetal", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == {"where": saved("survey-host"), "findings": findings(recorded("host"))}
    assert {one["state"] for one in document["findings"]} == {"ok", "warn"}


def test_json_keeps_brackets_and_the_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--survey", saved("cascade-two-guests"), "--json"]
    assert cli.main(words) == Exit.ENVIRONMENT
    assert "broken" in [one["state"] for one in json.loads(capfd.readouterr().out)["findings"]]
    assert cli.main(["doctor", "--survey", saved("management-function"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["findings"]
    assert any(one["text"].endswith("[not the user's]") for one in found)


def test_json_of_a_host_that_is_saved(
    settings: Settings, shell: Recorder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu1.survey"
    assert doctor.examine(settings, SERVER, boot=False, save=path, as_json=True) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["where"] == "gpu1"
    assert [one["what"] for one in document["findings"]][:2] == ["kernel", "cpu"]
    assert document["findings"][0]["text"] == "6.12"
    assert path.exists()


def test_json_of_this_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TOOLS", {"no-such-tool": "some-package"})
    assert cli.main(["doctor", "--json", "--cache-dir", str(tmp_path)]) == Exit.ENVIRONMENT
    document = json.loads(capfd.readouterr().out)
    assert document["where"] == "this machine"
    assert document["findings"][0] == {
        "what": "no-such-tool",
        "state": "broken",
        "text": "not installed",
        "hint": "apt-get install some-package (scripts/run does)",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--survey", "/no/such"], "there is no survey /no/such"),
        (["--survey", "/"], "cannot be read"),
        (["--survey", saved("README")[:-4] + ".md"], "does not begin with a function"),
        (["--survey", saved("vf-of-nobody"), "--host", "x"], "--survey and --host are mutually"),
        (["--survey", saved("vf-of-nobody"), "--boot"], "--survey and --boot are mutually"),
        (["--survey", saved("vf-of-nobody"), "--save-survey", "x"], "--survey and --save-survey"),
    ],
)
def test_surveys_that_are_refused(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *words]) == Exit.USAGE
    assert says in capfd.readouterr().err


FACTS = "kernel=6.12\ncpu=EPYC\nflags=svm\nvendor=Maker\nproduct=Server\nmemory=1048576\n"


class Recorder:
    """A Shell that answers from the recorded host, and keeps what it was asked."""

    def __init__(self) -> None:
        self.name, self.address, self.asked, self.closed = "gpu1", Address("192.0.2.1"), "", False

    def run(self, command: str, **_: Any) -> Result:
        self.asked += command + "\n"
        answers = {
            host._FACTS: FACTS,
            "id -u": "0\n",
            topology.SURVEY: (DATA / "survey-host.txt").read_text(),
        }
        return Result(command, 0, answers.get(command, "2\ntracing\n1\n"), "")

    def start(self, command: str) -> Any:
        raise AssertionError(f"started {command}")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    there = Recorder()
    monkeypatch.setattr(doctor, "knock", lambda *_: None)
    monkeypatch.setattr(doctor, "connect", lambda *_, **__: cast(Shell, there))
    return there


SERVER = Server("gpu1", Address("192.0.2.1"))


def test_nothing_is_written_to_a_host(settings: Settings, shell: Recorder) -> None:
    assert doctor.examine(settings, SERVER, boot=False) == 0
    assert shell.closed
    script = re.sub(r"'[^']*'", "", shell.asked)
    assert set(re.findall(r"\d?>>?\s*([\w/]+)", script)) == {"/dev/null"}
    for word in ("mkdir", "flock", "kill", "rm ", "touch", "tee", "modprobe", "mktemp", ".cache"):
        assert word not in shell.asked


def test_a_survey_is_saved_and_looked_at_again(
    settings: Settings, shell: Recorder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu1.survey"
    doctor.examine(settings, SERVER, boot=False, save=path)
    assert path.read_text().startswith("# survey of the PCI functions of gpu1 ")
    assert doctor.load_survey(path) == recorded("host")
    with pytest.raises(UsageError, match="cannot be written"):
        doctor.save_survey(tmp_path / "no" / "folder", "gpu1", shell.run(topology.SURVEY).stdout)


def test_a_survey_that_is_not_whole_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="ends early"):
        doctor.save_survey(tmp_path / "x", "gpu1", "")
    assert not (tmp_path / "x").exists()


def test_a_survey_of_this_machine_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="needs root"):
        doctor.survey_here()


# --- a host that does not answer -------------------------------------------------------------


def test_a_port_that_is_closed_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(
        EnvironmentBroken, match=f"gpu1: 127.0.0.1 refuses .* port {port}"
    ) as caught:
        knock("gpu1", Address("127.0.0.1", port))
    assert time.monotonic() - begun < 2
    assert "sshd" in str(caught.value.hint)


@pytest.mark.parametrize(
    "says", [b"SSH-2.0-OpenSSH_9.9\r\n", b"a word first\r\nSSH-2.0-x\r\n", b""]
)
def test_a_port_that_is_open(says: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(says) as port:
        knock("gpu1", Address("127.0.0.1", port), deadline_s=0.5)
    silent = f"gpu1: 127.0.0.1, port {port}, accepts connections and says nothing yet: waiting"
    assert (silent in capfd.readouterr().err) == (says == b"")


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 smtp\r\n"])
def test_a_port_where_something_else_answers(says: bytes) -> None:
    with serving(says, ends=True) as port, pytest.raises(EnvironmentBroken) as caught:
        knock("gpu1", Address("127.0.0.1", port), deadline_s=0.5)
    assert f"is not an SSH server ('{says.split()[0].decode()}" in caught.value.message
    assert "port in the inventory" in str(caught.value.hint)


def test_a_port_that_closes_at_once() -> None:
    with serving(b"", ends=True) as port, pytest.raises(EnvironmentBroken, match="at once"):
        knock("gpu1", Address("127.0.0.1", port), deadline_s=0.5)


@contextlib.contextmanager
def serving(says: bytes, *, ends: bool = False) -> Iterator[int]:
    """A server that says something to whom connects, and may end then; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                there, _ = listening.accept()
                with there:
                    there.sendall(says)
                    if not ends:
                        there.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (TimeoutError(), EnvironmentBroken, "nothing answers at h, port 22"),
        (OSError(113, "No route to host"), EnvironmentBroken, "cannot reach h, port 22: No route"),
        (socket.gaierror(-2, "Name or service not known"), UsageError, "there is no host h"),
        (UnicodeError("label too long"), UsageError, "'h' is not a host name"),
    ],
)
def test_other_ways_not_to_answer(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], says: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "create_connection", fails)
    with pytest.raises(kind, match=says) as caught:
        knock("gpu1", Address("h"))
    assert "\n" not in caught.value.message  # type: ignore[attr-defined]


def test_the_command_looks_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "connect", None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    path = tmp_path / "inventory.yaml"
    path.write_text(f"hosts: {{gpu1: {{address: 127.0.0.1, port: {port}}}}}")
    status = cli.main(["doctor", "--host", "gpu1", "--inventory", str(path)])
    assert status == Exit.ENVIRONMENT
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"nearmetal: gpu1: 127.0.0.1 refuses connections to port {port}"
    assert len(lines) == 2


def test_switch_names_of_findings() -> None:
    assert {one.what for one in switches.switches(claimable())} == {
        "direct-p2p",
        f"switch {SWITCH}",
    }
