# SPDX-License-Identifier: GPL-2.0-or-later
"""Other people's suites of KVM, as the user built them, run on the hosts of several variants.

A suite is a folder of programs and a list of cases; a case is a line of shell for the host, which
has the suite's files and QEMU. What passes on vanilla has to pass on the others.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..core import ui
from ..core.cache import Cache, sha256_file
from ..core.errors import MeasurementError, UsageError
from ..core.text import first_line, nearest
from ..machines.host import Host
from ..machines.lab import Lab
from ..machines.shell import Result
from ..patches.variants import Config

Status = Literal["pass", "fail", "skip"]

EMULATED_FACTOR = 4
"""How much more time a case gets on an emulated host."""
UNIT_TEST_S = 90.0
"""What kvm-unit-tests gives a test without a timeout of its own (scripts/runtime.bash)."""
SELFTEST_S = 120.0
"""A kernel selftest gets 45 s by itself (tools/testing/selftests/kselftest/runner.sh)."""
_TIMEOUT = 124
_KSFT_SKIP = 4
"""Exit statuses of timeout(1), and of a selftest that cannot run here (kselftest.h)."""
_KUT_PASS, _KUT_SKIP = 1, 77
"""QEMU's exit status by isa-debug-exit, twice the test's plus 1 (lib/report.c: 0, and 77 >> 1)."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and why it did not pass."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """Where a case runs: the suite's files and QEMU, by their paths on the host."""

    files: str
    qemu: str
    firmware: str
    accel: str
    extra: tuple[str, ...] = ()
    factor: int = 1


@dataclass(frozen=True)
class Case:
    """One case. ``line`` is what the host's shell runs, ``told`` what came of it, by name."""

    name: str
    deadline_s: float
    line: Callable[[Place], str]
    told: Callable[[Result], Mapping[str, Outcome]]


@dataclass(frozen=True)
class Suite:
    """A suite: its name, its files by the name that they have in one flat folder, its cases."""

    name: str
    files: Mapping[str, Path]
    cases: tuple[Case, ...]

    def only(self, names: Sequence[str]) -> Suite:
        """The suite with these cases; UsageError with the nearest name."""
        known = [one.name for one in self.cases]
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no test '{name}'", hint=nearest(name, known)[:400]
                )
        cases = tuple(one for one in self.cases if not names or one.name in names)
        return Suite(self.name, self.files, cases)


# --- kvm-unit-tests --------------------------------------------------------------------------


@dataclass
class _Entry:
    """A section of unittests.cfg."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)


def parse_unittests(text: str) -> list[_Entry]:
    """The sections of a unittests.cfg, in order (kvm-unit-tests: docs/unittests.md)."""
    found: list[_Entry] = []
    lines = iter(text.splitlines())
    for line in lines:
        if head := re.fullmatch(r"\[(.*)\]", line.strip()):
            found.append(_Entry(head[1]))
        elif (pair := re.fullmatch(r"(\w+) *= *(.*)", line)) and found:
            value = pair[2]
            if value.startswith('"""'):
                value = value[3:]
                for more in lines:
                    end = more.rstrip().endswith('"""')
                    value = value.removesuffix("\\") + "\n" + (more.rstrip()[:-3] if end else more)
                    if end:
                        break
            found[-1].keys[pair[1]] = value
    return found


def kvm_unit_tests(folder: Path) -> Suite:
    """The suite in a folder where kvm-unit-tests was built for x86-64. Raises UsageError."""
    mak = folder / "config.mak"
    if not mak.is_file():
        raise UsageError(
            f"{folder}: no kvm-unit-tests were built there: it has no config.mak",
            hint="./configure && make there first",
        )
    made = dict(re.findall(r"^(\w+)=(.*)$", mak.read_text(), re.M))
    if (arch := made.get("ARCH", "x86_64")) not in ("x86_64", "i386"):
        raise UsageError(f"{folder}: these are for {arch}; the hosts are x86-64")
    if made.get("CONFIG_EFI") == "y":
        raise UsageError(
            f"{folder}: these are for UEFI (*.efi)", hint="configure them without --enable-efi"
        )
    listed = next(
        (
            one
            for base in (folder, folder / made.get("SRCDIR", "."))
            if (one := base / "x86" / "unittests.cfg").is_file()
        ),
        None,
    )
    if listed is None:
        raise UsageError(f"{folder} has no x86/unittests.cfg", hint="name the folder of the build")
    entries = [
        one
        for one in parse_unittests(listed.read_text())
        if one.keys.get("arch", arch) == arch
        and one.keys.get("accel", "kvm") == "kvm"
        and not {"nodefault", "migration", "panic"} & set(one.keys.get("groups", "").split())
    ]
    files = {
        name: folder / "x86" / name
        for one in entries
        if (name := one.keys.get("file", "")) and (folder / "x86" / name).is_file()
    }
    if not files:
        raise UsageError(f"{folder}: no test is built", hint=f"make -C {folder}")
    return Suite("kvm-unit-tests", files, tuple(_unit_test(one, files) for one in entries))


def _unit_test(entry: _Entry, files: Mapping[str, Path]) -> Case:
    keys = entry.keys
    seconds = float(re.sub(r"\D", "", keys.get("timeout", "")) or UNIT_TEST_S)
    program = keys.get("file", "")

    def line(place: Place) -> str:
        if program not in files:
            return "echo not built; exit 77"
        script = ["MAX_SMP=$(nproc)"]
        for pair in keys.get("check", "").split():
            path, _, value = pair.partition("=")
            path = shlex.quote(path)
            script.append(
                f'[ "$(cat {path} 2>/dev/null)" = {shlex.quote(value)} ] || '
                f"{{ echo {shlex.quote(f'{pair} does not hold')}; exit 77; }}"
            )
        words = [
            *("timeout", "-k", "5", str(int(seconds * place.factor))),
            *(place.qemu, "-L", place.firmware),
            *("--no-reboot", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-global", "kvm-pit.lost_tick_policy=discard"),
            *("-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"),
            *("-serial", "stdio", "-device", "pci-testdev"),
            # q35, as the series' switches are of it
            *("-machine", "q35", "-accel", place.accel, *place.extra),
            *("-kernel", f"{place.files}/{program}"),
        ]
        # words of the list are a shell's: quotes, and backticks for a date
        tail = f"-smp {keys.get('smp', '1')}"
        tail += f" {keys.get('qemu_params', keys.get('extra_params', ''))}"
        if arguments := keys.get("test_args"):
            tail += f" -append {arguments}"
        script.append(f"exec {shlex.join(words)} {' '.join(tail.split(chr(10)))} < /dev/null")
        return "\n".join(script)

    def told(result: Result) -> Mapping[str, Outcome]:
        return {entry.name: unit_test_outcome(result)}

    return Case(entry.name, seconds, line, told)


def unit_test_outcome(result: Result) -> Outcome:
    """What QEMU's exit status and standard error say (kvm-unit-tests: scripts/arch-run.bash)."""
    errors = [row for row in result.stderr.splitlines() if row and "warning" not in row.lower()]
    said = [row for row in result.stdout.splitlines() if row.strip()]
    last = said[-1] if said else ""
    failed = [row for row in said if row.startswith("FAIL")]
    if result.status == _KUT_SKIP:
        return Outcome("skip", last)
    if result.status == _TIMEOUT:
        return Outcome("fail", f"timeout; the last it said: {last}")
    if result.status == _KUT_PASS and not errors:
        return Outcome("pass")
    reason = "; ".join(failed[:3] or errors[:1] or [last])
    return Outcome("fail", f"status {result.status}: {reason}")


# --- the kernel's selftests ------------------------------------------------------------------


def selftests(folder: Path) -> Suite:
    """The programs of kernel selftests in a folder, as ``make`` or ``make install`` left them.

    Scripts are left out: the hosts have no bash. Raises UsageError.
    """
    files = {
        str(path.relative_to(folder)).replace("/", "."): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and os.access(path, os.X_OK) and _is_program(path)
    }
    if not files:
        raise UsageError(
            f"{folder}: no selftest is built there",
            hint="make -C tools/testing/selftests/kvm in your Linux, then name that folder",
        )
    return Suite("selftests", files, tuple(_selftest(name) for name in files))


def _is_program(path: Path) -> bool:
    """Whether a file is an ELF program: ET_EXEC or ET_DYN, and no library by its name."""
    with path.open("rb") as stream:
        head = stream.read(18)
    kind = int.from_bytes(head[16:18], "little")
    return head[:4] == b"\x7fELF" and kind in (2, 3) and ".so" not in path.name


def _selftest(name: str) -> Case:
    def line(place: Place) -> str:
        program = shlex.quote(f"{place.files}/{name}")
        return (
            f"cd /tmp && exec timeout -k 5 {int(SELFTEST_S * place.factor)} {program} < /dev/null"
        )

    def told(result: Result) -> Mapping[str, Outcome]:
        return selftest_outcomes(name, result)

    return Case(name, SELFTEST_S, line, told)


_TAP = re.compile(r"^(ok|not ok) \d+ (?:- )?(\S.*?)(?: # (SKIP.*|.*))?$")


def selftest_outcomes(name: str, result: Result) -> Mapping[str, Outcome]:
    """A program's own outcome, and those of its parts from KTAP (dev-tools/ktap.rst)."""
    said = [row for row in (result.stdout + result.stderr).splitlines() if row.strip()]
    last = said[-1].strip() if said else ""
    whole = {
        0: Outcome("pass"),
        _KSFT_SKIP: Outcome("skip", last),
        _TIMEOUT: Outcome("fail", f"timeout; the last it said: {last}"),
    }.get(result.status, Outcome("fail", f"status {result.status}: {last}"))
    found = {name: whole}
    for row in result.stdout.splitlines():
        if part := _TAP.match(row.strip()):
            state, what, rest = part[1], part[2], part[3] or ""
            status: Status = "skip" if rest.startswith("SKIP") else "pass"
            status = "fail" if state == "not ok" else status
            found[f"{name}: {what}"] = Outcome(status, rest)
    return found


# --- running ---------------------------------------------------------------------------------


def kept(cache: Cache, suite: Suite) -> Path:
    """The suite's files in the store, which hosts see."""
    used = dict(suite.files)

    def copy(work: Path) -> None:
        for name, path in used.items():
            shutil.copy(path, work / name)

    ingredients = {"files": {name: sha256_file(path) for name, path in used.items()}}
    return cache.make("suite", ingredients, copy, what=f"keeping {suite.name}").path


def grouped(configs: Sequence[Config]) -> list[list[Config]]:
    """The variants that can be run on one boot of the host, in order."""
    hosts: dict[tuple[Path, ...], list[Config]] = {}
    for one in configs:
        hosts.setdefault(one.linux_patches, []).append(one)
    return list(hosts.values())


def run(
    lab: Lab, suite: Suite, configs: Sequence[Config], logs: Path
) -> dict[str, dict[str, Outcome]]:
    """All outcomes by variant; what a dead host leaves undone has failed. Logs are written."""
    files = kept(lab.cache, suite)
    found: dict[str, dict[str, Outcome]] = {}
    for group in grouped(configs):
        here = logs / group[0].label
        here.mkdir(parents=True, exist_ok=True)
        left = list(group)
        try:
            with lab.host(group[0], here) as host:
                while left:
                    config = left[0]
                    host.load_kvm(config.modules)
                    with host.parameters(config.modules):
                        place = _place(lab, host, config, files)
                        outcomes = found.setdefault(config.label, {})
                        _run_on(host, suite, place, outcomes, logs / f"{config.label}.log", config)
                    left.pop(0)
        except MeasurementError as error:
            ui.tell_error(error)
            for config in left:
                outcomes = found.setdefault(config.label, {})
                for case in suite.cases:
                    reason = f"not run: {first_line(error.message)}"
                    outcomes.setdefault(case.name, Outcome("fail", reason))
    return found


def _place(lab: Lab, host: Host, config: Config, files: Path) -> Place:
    qemu = lab.qemu(config)
    accel = config.accel.get(host.facts.kvm_module, {})
    return Place(
        files=host.place(files),
        qemu=host.place(qemu.program),
        firmware=host.place(qemu.firmware),
        accel=",".join(("kvm", *(f"{key}={value}" for key, value in accel.items()))),
        extra=config.qemu_args,
        factor=EMULATED_FACTOR if host.facts.emulated else 1,
    )


def _run_on(
    host: Host,
    suite: Suite,
    place: Place,
    outcomes: dict[str, Outcome],
    log: Path,
    config: Config,
) -> None:
    """Run all cases in one place. Raises MeasurementError when the host breaks."""
    with ui.step(f"{suite.name} on {config.label}") as step, log.open("w") as stream:
        host.forget_log()
        for number, case in enumerate(suite.cases, 1):
            step.status = f"({number} of {len(suite.cases)}: {case.name})"
            begun = time.monotonic()
            line = case.line(place)
            deadline = case.deadline_s * place.factor + 60
            result = host.shell.run(line, deadline_s=deadline, check=False)
            stream.write(f"=== {case.name}\n{line}\n{result.stdout}{result.stderr}")
            stream.write(f"=== status {result.status}\n")
            stream.flush()
            told = case.told(result)
            outcomes.update(told)
            mine = told.get(case.name, Outcome("fail", "it said nothing"))
            seconds = time.monotonic() - begun
            ui.say(f"    {mine.status:4} {case.name} ({seconds:.0f} s) {mine.reason}".rstrip())
            host.check()


# --- comparing -------------------------------------------------------------------------------


def passed(outcomes: Mapping[str, Outcome]) -> set[str]:
    """The names that passed."""
    return {name for name, one in outcomes.items() if one.status == "pass"}


@dataclass(frozen=True)
class Change:
    """How a variant's set of passes differs from vanilla's."""

    variant: str
    lost: tuple[str, ...]
    gained: tuple[str, ...]


def compare(
    base: Mapping[str, Outcome], others: Mapping[str, Mapping[str, Outcome]]
) -> list[Change]:
    """What each of the others lost and gained. Raises UsageError where nothing passed at all."""
    before = passed(base)
    if not before:
        reasons = [one.reason for one in base.values() if one.reason]
        raise UsageError(
            "nothing passed, so there is nothing to compare"
            + (f"; the first reason: {reasons[0]}" if reasons else ""),
            hint="programs have to run on the host: link selftests with LDFLAGS=-static",
        )
    return [
        Change(
            label,
            tuple(sorted(before - passed(outcomes))),
            tuple(sorted(passed(outcomes) - before)),
        )
        for label, outcomes in others.items()
    ]


def write(found: Mapping[str, Mapping[str, Outcome]], suite: Suite, path: Path) -> None:
    """Write all outcomes as JSON: by variant, by name, status and reason."""
    variants = {
        label: {name: [one.status, one.reason] for name, one in outcomes.items()}
        for label, outcomes in found.items()
    }
    path.write_text(json.dumps({"suite": suite.name, "variants": variants}, indent=1) + "\n")


def read(path: Path) -> dict[str, dict[str, Outcome]]:
    """Outcomes as ``write`` wrote them, from a file or its folder. Raises UsageError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        every = json.loads(file.read_text())["variants"]
        return {
            label: {name: Outcome(*words) for name, words in outcomes.items()}
            for label, outcomes in every.items()
        }
    except OSError as error:
        raise UsageError(
            f"{file}: {error.strerror}", hint="name the folder of an earlier 'nearmetal suite'"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{file} has no outcomes of a suite", hint="name the folder of an earlier run"
        ) from None
