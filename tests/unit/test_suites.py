# SPDX-License-Identifier: GPL-2.0-or-later
"""Suites of others: how they are read, what counts as passed, and what a comparison says.

The host is this machine's shell, and QEMU a script that ends as the flat file says.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from lib import fakes

from nearmetal.cli import suitecmd
from nearmetal.cli.main import main
from nearmetal.core.cache import Cache
from nearmetal.core.errors import MeasurementError, UsageError
from nearmetal.core.settings import Settings
from nearmetal.machines.shell import Result
from nearmetal.runs import plan, suites
from nearmetal.runs.suites import Outcome, Place

CFG = '''
# a comment
[cpuid]
file = vmexit.flat
smp = 2
test_args = 'cpuid'
groups = vmexit

[old-style]
file = old.flat
extra_params = -cpu qemu64,+x2apic -append "1000 `echo 20`"
timeout = 30

[long]
file = long.flat
qemu_params = """-device edu \\
  -m 2048"""

[checked]
file = vmexit.flat
check = /no/such/parameter=Y

[other-arch]
file = vmexit.flat
arch = i386

[by-hand]
file = vmexit.flat
groups = nodefault x

[forgotten]
file = nobody.flat
'''
QEMU = """#!/bin/sh
# ends as the flat file says, which may look at what else it was given
for word in "$@"; do
	case $previous in -kernel) kernel=$word ;; esac
	previous=$word
done
set -- "$0" "$@"
. "$kernel"
"""
PLACE = Place("/files", "/qemu", "/firmware", "kvm")


@pytest.fixture
def kut(tmp_path: Path) -> Path:
    """A folder as kvm-unit-tests' make leaves it."""
    folder = tmp_path / "kvm-unit-tests"
    (folder / "x86").mkdir(parents=True)
    (folder / "config.mak").write_text("SRCDIR=.\nARCH=x86_64\n")
    (folder / "x86/unittests.cfg").write_text(CFG)
    (folder / "x86/vmexit.flat").write_text("echo SUMMARY: 1 tests; exit 1\n")
    (folder / "x86/old.flat").write_text(
        'case "$*" in *"-append 1000 20") exit 1 ;; *) echo "FAIL: append"; exit 3 ;; esac\n'
    )
    (folder / "x86/long.flat").write_text('echo "FAIL: a thing"; exit 3\n')
    return folder


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fakes.FakeLab]:
    cache = Cache(tmp_path / "cache").open()
    settings = Settings(tmp_path, cache.root, tmp_path / "results")
    found = fakes.FakeLab(settings, cache, equipment=plan.equipment_of("amd"))
    for label in ("vanilla", "off", "on-pmu-passthrough", "on-pci-ecam"):
        program = tmp_path / f"qemu-{label}"
        program.write_text(QEMU)
        program.chmod(0o755)
        found.programs[label] = program
    monkeypatch.setattr(suitecmd, "Lab", found)
    yield found


def suite(lab: fakes.FakeLab, *words: object) -> int:
    where = ["--cache-dir", str(lab.cache.root), "--results-dir", str(lab.settings.results_dir)]
    return main(["suite", *where, *map(str, words)])


# --- kvm-unit-tests --------------------------------------------------------------------------


def test_the_list_is_read(kut: Path) -> None:
    found = suites.kvm_unit_tests(kut)
    names = [one.name for one in found.cases]
    assert names == ["cpuid", "old-style", "long", "checked", "forgotten"]
    assert set(found.files) == {"vmexit.flat", "old.flat", "long.flat"}
    assert [one.deadline_s for one in found.cases] == [90, 30, 90, 90, 90]
    lines = {one.name: one.line(PLACE) for one in found.cases}
    assert lines["cpuid"].endswith("-kernel /files/vmexit.flat -smp 2  -append 'cpuid' < /dev/null")
    assert " -device edu  " in lines["long"].replace("\\", "")
    assert "-m 2048" in lines["long"].splitlines()[-1]


def test_switches_of_a_variant_are_on_the_command_line(kut: Path) -> None:
    place = Place("/f", "/q", "/w", "kvm,pmu-passthrough=on", ("-global", "a.b=on"), 4)
    line = suites.kvm_unit_tests(kut).cases[0].line(place)
    words = shlex.split(line.splitlines()[-1])
    assert words[:5] == ["exec", "timeout", "-k", "5", "360"]
    assert words[words.index("-accel") + 1] == "kvm,pmu-passthrough=on"
    assert words[words.index("-global", words.index("-accel")) + 1] == "a.b=on"
    assert words[words.index("-machine") + 1] == "q35"


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (1, "SUMMARY: 3 tests", "", Outcome("pass")),
        (1, "", "qemu: warning: TCG doesn't support it", Outcome("pass")),
        (1, "", "qemu: no KVM", Outcome("fail", "status 1: qemu: no KVM")),
        (0, "", "", Outcome("fail", "status 0: ")),
        (3, "PASS: a\nFAIL: b\nSUMMARY: 2", "", Outcome("fail", "status 3: FAIL: b")),
        (77, "SUMMARY: 1 tests, 1 skipped", "", Outcome("skip", "SUMMARY: 1 tests, 1 skipped")),
        (124, "at it", "", Outcome("fail", "timeout; the last it said: at it")),
    ],
)
def test_what_counts_as_passed(status: int, out: str, err: str, expected: Outcome) -> None:
    assert suites.unit_test_outcome(Result("x", status, out, err)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.mak": None}, "it has no config.mak"),
        ({"config.mak": "ARCH=arm64\n"}, "are for arm64"),
        ({"config.mak": "CONFIG_EFI=y\n"}, "are for UEFI"),
        ({"x86/unittests.cfg": None}, "has no x86/unittests.cfg"),
        ({"x86/unittests.cfg": "[a]\nfile = none.flat\n"}, "no test is built"),
    ],
)
def test_what_a_folder_lacks(kut: Path, change: Mapping[str, str | None], message: str) -> None:
    for name, text in change.items():
        if text is None:
            (kut / name).unlink()
        else:
            (kut / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        suites.kvm_unit_tests(kut)


def test_the_same_passes_everywhere(
    lab: fakes.FakeLab, kut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("kvm-unit-tests", kut, "--series", "pmu-passthrough")
    assert suite(lab, *words) == 0
    out = capsys.readouterr().out
    assert "kvm-unit-tests on vanilla: 2 pass, 1 fail, 2 skip" in out
    assert "fail on vanilla: long: status 3: FAIL: a thing" in out
    assert "skip on vanilla: checked: /no/such/parameter=Y does not hold" in out
    assert "off: what passes is the same" in out
    assert "on-pmu-passthrough: what passes is the same" in out
    assert lab.booted == ["vanilla", "patched"]  # off and on share a host


def test_a_test_that_is_lost_is_told_and_is_status_1(
    lab: fakes.FakeLab, kut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = kut / "x86/vmexit.flat"
    flat.write_text('case "$*" in *qemu-off*) echo "FAIL: it"; exit 3 ;; esac; exit 1\n')
    long = kut / "x86/long.flat"
    long.write_text('case "$*" in *qemu-off*) exit 1 ;; esac; exit 3\n')
    assert suite(lab, "kvm-unit-tests", kut, "--variant", "vanilla,off") == 1
    out = capsys.readouterr().out
    assert "LOST on off: cpuid: fail status 3: FAIL: it" in out
    assert "gained on off: long" in out


def test_one_variant_has_nothing_to_be_compared_with(
    lab: fakes.FakeLab, kut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("kvm-unit-tests", kut, "--variant", "vanilla", "--only")
    assert suite(lab, *words, "cpuid,old-style") == 0
    assert suite(lab, *words, "long") == 1
    assert suite(lab, *words, "cpui") == 2
    assert "did you mean 'cpuid'?" in capsys.readouterr().err


def test_an_earlier_run_is_compared_with(
    lab: fakes.FakeLab, kut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("kvm-unit-tests", kut, "--variant", "vanilla")
    results = lab.settings.results_dir
    suite(lab, *words)
    before = next(results.iterdir()).rename(lab.cache.root / "before")
    assert suite(lab, *words, "--against", before) == 0
    next(results.iterdir()).rename(lab.cache.root / "second")
    (kut / "x86/old.flat").write_text("exit 3\n")
    assert suite(lab, *words, "--against", before) == 1
    assert "LOST on vanilla: old-style" in capsys.readouterr().out
    assert suite(lab, *words, "--against", kut) == 2
    assert "results.json: No such file" in capsys.readouterr().err
    log = (before / "vanilla.log").read_text()
    assert "=== cpuid\n" in log
    assert "SUMMARY: 1 tests" in log
    found = json.loads((before / "results.json").read_text())
    assert found["variants"]["vanilla"]["cpuid"] == ["pass", ""]


def test_nothing_that_passes_is_no_success(lab: fakes.FakeLab, kut: Path) -> None:
    for flat in (kut / "x86").glob("*.flat"):
        flat.write_text("exit 3\n")
    assert suite(lab, "kvm-unit-tests", kut, "--variant", "vanilla,off") == 2


def test_a_host_that_breaks_fails_what_is_left(
    lab: fakes.FakeLab, kut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(range(100))

    def check(self: fakes.QuietHost) -> None:
        if next(looks) == 1:
            raise MeasurementError("the host's kernel says: BUG")

    monkeypatch.setattr(fakes.QuietHost, "check", check)
    assert suite(lab, "kvm-unit-tests", kut, "--variant", "vanilla") == 1
    (folder,) = lab.settings.results_dir.iterdir()
    found = suites.read(folder)["vanilla"]
    assert found["cpuid"] == found["old-style"] == Outcome("pass")
    assert found["long"] == Outcome("fail", "not run: the host's kernel says: BUG")


# --- the kernel's selftests ------------------------------------------------------------------


@pytest.fixture
def selftests(tmp_path: Path) -> Path:
    """A folder with two programs, a script and a library."""
    folder = tmp_path / "kvm"
    (folder / "x86").mkdir(parents=True)
    source = tmp_path / "one.c"
    source.write_text(
        '#include <stdio.h>\nint main(void)\n{\n\tputs("TAP version 13\\n1..3\\nok 1 first");\n'
        '\tputs("ok 2 second # SKIP no such CPU\\nnot ok 3 - third");\n\treturn STATUS;\n}\n'
    )
    for name, status in (("one", 1), ("x86/two", 4)):
        subprocess.run(["gcc", f"-DSTATUS={status}", "-o", folder / name, source], check=True)
    (folder / "script.sh").write_text("#!/bin/sh\nexit 0\n")
    (folder / "script.sh").chmod(0o755)
    (folder / "helper.so").write_bytes((folder / "one").read_bytes())
    (folder / "helper.so").chmod(0o755)
    (folder / "one.o").write_bytes((folder / "one").read_bytes())
    return folder


def test_programs_are_found_and_their_parts_read(
    lab: fakes.FakeLab, selftests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (selftests / "one.o").chmod(0o644)
    found = suites.selftests(selftests)
    assert set(found.files) == {"one", "x86.two"}
    assert suite(lab, "selftests", selftests, "--variant", "vanilla,off") == 0
    out = capsys.readouterr().out
    assert "selftests on vanilla: 2 pass, 3 fail, 3 skip" in out
    assert "skip on vanilla: x86.two: not ok 3 - third" in out
    assert "fail on vanilla: one: third" in out
    assert "skip on vanilla: one: second: SKIP no such CPU" in out
    assert "off: what passes is the same" in out


def test_a_folder_without_programs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no selftest is built there"):
        suites.selftests(tmp_path)


def test_a_suite_that_is_not_known(lab: fakes.FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite(lab, "kvm-unit-test", "/") == 2
    assert suite(lab, "selftests", "/no/such") == 2
    assert "/no/such is not a folder" in capsys.readouterr().err
