# SPDX-License-Identifier: GPL-2.0-or-later
"""Hold patches to what a maintainer asks: they apply, read well and build one by one.

For each series: it applies without fuzz, alone on the base and stacked with the others;
each patch passes its tree's ``checkpatch --strict``; each patch builds, alone, the objects
that it touches without a warning that its parent does not give. Findings are errors, which
fail the validation, or notes, which are told.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, Self

from ..core import proc, ui
from ..core.cache import key_of, remove, sha256_file
from ..core.errors import Exit, NearmetalError, UsageError
from ..core.kconfig import lost_options
from ..core.text import nearest
from ..patches import requires
from ..patches.series import (
    TREES,
    Enable,
    Series,
    TreeName,
    find_series,
    load_series,
    of_tree,
    patch_files,
    series_options,
)
from . import trees
from .results import Results

Severity = Literal["error", "note"]

_CHECKPATCH_S = 300.0
_BUILD_S = 3600.0

SIGNOFF_NOTE = "no Signed-off-by; the sender's is added at export"
MAINTAINERS_NOTE = "files are added, moved or deleted: does MAINTAINERS need an entry?"

_FOLDERS = ("linux", "qemu", "testbed")


@dataclass(frozen=True)
class Finding:
    """What is wrong, or worth knowing, about a patch; ``patch`` is "" for a whole series."""

    series: str
    patch: str
    rule: str
    severity: Severity
    text: str


@dataclass(frozen=True)
class Remark:
    """One line of checkpatch: ``level`` is ERROR, WARNING or CHECK, ``type`` may be ""."""

    line: int
    level: str
    type: str
    text: str


@dataclass(frozen=True)
class Diagnostic:
    """A warning or an error of a build; ``file`` is relative to the sources where it can be."""

    file: str
    line: int
    kind: Literal["warning", "error"]
    text: str


@dataclass(frozen=True)
class Touched:
    """A file that a patch touches."""

    path: str
    new: bool = False
    deleted: bool = False


@dataclass(frozen=True)
class Candidate:
    """A series to be validated; ``ours`` if it has our layout (cover.txt, series.yaml).

    ``below`` are the patches of others that it requires, and ``options`` the files with lines
    of the kernel's configuration that it and they add.
    """

    series: Series
    ours: bool = True
    below: tuple[Path, ...] = ()

    @property
    def options(self) -> tuple[Path, ...]:
        """The fragments of the kernel's configuration, as a build of its patches has them."""
        return series_options((*self.below, *self.series.patches()))


def candidate_of(series: Series, every: Sequence[Series]) -> Candidate:
    """A series of series.yaml to be validated, on top of what it requires."""
    return Candidate(series, below=requires.patches_before(series, every))


class BuildSetup(Protocol):
    """How objects of one tree are built."""

    def with_options(self, fragments: Sequence[Path]) -> BuildSetup:
        """The same for series that add options to the kernel's configuration."""

    def key(self) -> str:
        """A word that differs where a build of the same sources would."""

    def lost_options(self, build: Path) -> tuple[str, ...]:
        """The lines of those options that the configuration of ``build`` did not take."""

    def configure(self, source: Path, build: Path) -> None:
        """Make ``build`` fit ``source``, cheaply where nothing changed."""

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The targets that show whether a change of these files compiles."""

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Build the targets anew, all of them, and give everything the build complains about."""


@dataclass(frozen=True)
class Base:
    """The pristine sources that series of one tree apply to.

    ``repository`` is a base repository (trees.make_base_repository), which saves reading
    ``sources``; without ``build`` nothing is built, and that is told.
    """

    tree: TreeName
    sources: Path
    version: str
    repository: Path | None = None
    build: BuildSetup | None = None

    @property
    def name(self) -> str:
        return f"{self.tree} {self.version}"


# -- reading what tools print


_TERSE = re.compile(r"^(?:.*?):(?P<line>\d+): (?P<level>ERROR|WARNING|CHECK):(?P<rest>.*)$")
_TYPE = re.compile(r"^(?P<type>[A-Z][A-Z0-9_]+): (?P<text>.*)$")


def parse_checkpatch(output: str) -> tuple[Remark, ...]:
    """The remarks of ``checkpatch.pl --terse`` (Linux's with --show-types, or QEMU's)."""
    found = []
    for line in output.splitlines():
        match = _TERSE.match(line)
        if match is None:
            continue
        rest = match["rest"].strip()
        typed = _TYPE.match(rest)
        kind, text = (typed["type"], typed["text"]) if typed else ("", rest)
        found.append(Remark(int(match["line"]), match["level"], kind, text))
    return tuple(found)


TRACE_NOTE = "trace events are laid out as all of them are, which checkpatch does not know"
_TRACE_HEADER = re.compile(r"(?:^|/)trace(?:_\w+)?\.h$|^include/trace/")
_TRACE_LAYOUT = ("OPEN_ENDED_LINE", "PARENTHESIS_ALIGNMENT")


IMPORTED_NOTE = (
    "a headers update: files come and go, and their licences are those that Linux gives them"
)
_IMPORTED = re.compile(r"^(?:linux-headers|include/standard-headers)/")
_IMPORTED_REMARKS = (
    "added, moved or deleted file(s) imported from Linux",
    "Saw unacceptable licenses 'GPL-2.0-WITH-Linux-syscall-note'",
)


def only_imported(text: str) -> bool:
    """Whether a patch for QEMU changes only what scripts/update-linux-headers.sh imports."""
    files = re.findall(r"^(?:\+\+\+ b|--- a)/(\S+)", text, re.M)
    return bool(files) and all(_IMPORTED.match(one) for one in files)


def file_at(text: str, line: int) -> str:
    """The file that line ``line`` of a patch belongs to, or nothing."""
    heads = [one for one in text.splitlines()[:line] if one.startswith("+++ b/")]
    return heads[-1].removeprefix("+++ b/") if heads else ""


def judge_checkpatch(
    series: str, patch: str, remarks: Sequence[Remark], text: str = ""
) -> tuple[Finding, ...]:
    """Every remark is an error, but for a missing sign-off and the MAINTAINERS hint.

    The layout of trace events in trace headers (samples/trace_events/trace-events-sample.h)
    is told, too: ``text`` is the patch, to find the file of a remark. So is what QEMU's
    checkpatch always says of a headers update that has nothing else in it.
    """
    found = []
    imported = only_imported(text)
    for remark in remarks:
        if remark.text.startswith("Missing Signed-off-by"):
            found.append(Finding(series, patch, "sign-off", "note", SIGNOFF_NOTE))
        elif "does MAINTAINERS need updating" in remark.text:
            found.append(Finding(series, patch, "maintainers", "note", MAINTAINERS_NOTE))
        elif remark.type in _TRACE_LAYOUT and _TRACE_HEADER.search(file_at(text, remark.line)):
            found.append(Finding(series, patch, "trace-layout", "note", TRACE_NOTE))
        elif imported and remark.text.startswith(_IMPORTED_REMARKS):
            found.append(Finding(series, patch, "imported", "note", IMPORTED_NOTE))
        else:
            words = [f"line {remark.line}:", remark.level, remark.type, remark.text]
            said = " ".join(word for word in words if word)
            found.append(Finding(series, patch, "checkpatch", "error", said))
    return tuple(found)


_GCC = re.compile(
    r"^(?P<file>[^\s:]+):(?P<line>\d+):(?:\d+:)? (?:fatal )?(?P<kind>warning|error): (?P<text>.*)$"
)
_OBJTOOL = re.compile(r"^(?P<file>\S+\.o): (?P<kind>warning|error): (?P<text>objtool: .*)$")
_KERNEL_DOC = re.compile(
    r"^(?:Warning|WARNING|Error|ERROR): (?P<file>[^\s:]+):(?P<line>\d+) (?P<text>.*)$"
)
_MAKE = re.compile(r"^g?make(?:\[\d+\])?: \*\*\* (?P<text>.*)$")
_NINJA = re.compile(r"^(?:ninja: error: |FAILED: (?:\[code=\d+\] )?)(?P<text>.*)$")
_MESON = re.compile(r"^(?:\.\./)*(?P<file>\S*meson\.build):(?P<line>\d+):\d+: ERROR: (?P<text>.*)$")
_PLAIN_QUOTES = str.maketrans("\u2018\u2019", "''")
_MAKE_ECHO = re.compile(r"\[[^\]]*\] Error \d+|Waiting for unfinished jobs|Target .* not remade")


def parse_build(output: str, source: Path, build: Path) -> tuple[Diagnostic, ...]:
    """Warnings and errors of gcc, objtool, kernel-doc, make, ninja and meson, each once.

    Files are given relative to ``source``; a header's warning that many objects repeat is
    one. That make or ninja failed is told only where no compiler said why, and what was said
    before where make says no more than what it deletes.
    """
    found: dict[Diagnostic, None] = {}
    tools: dict[Diagnostic, None] = {}
    last = ""
    for raw in output.splitlines():
        line = raw.rstrip().translate(_PLAIN_QUOTES)
        if match := _GCC.match(line) or _OBJTOOL.match(line):
            number = int(match.groupdict().get("line") or 0)
            kind: Literal["warning", "error"] = "error" if match["kind"] == "error" else "warning"
            file = _relative(match["file"], source, build)
            found[Diagnostic(file, number, kind, match["text"])] = None
        elif match := _MESON.match(line):
            found[Diagnostic(match["file"], int(match["line"]), "error", match["text"])] = None
        elif match := _KERNEL_DOC.match(line):
            file = _relative(match["file"], source, build)
            found[Diagnostic(file, int(match["line"]), "warning", match["text"])] = None
        elif match := _MAKE.match(line):
            if not _MAKE_ECHO.search(match["text"]):
                text = match["text"].rstrip(".")
                if text.startswith("Deleting file") and last:
                    text = f"{text} after: {last}"
                tools[Diagnostic("", 0, "error", text)] = None
        elif match := _NINJA.match(line):
            tools[Diagnostic("", 0, "error", match["text"].strip())] = None
        else:
            last = line.strip() or last
    if any(one.kind == "error" for one in found):
        return tuple(found)
    return (*found, *tools)


def _relative(name: str, source: Path, build: Path) -> str:
    path = Path(os.path.normpath(build / name))
    for folder in (source, build):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return name


def new_diagnostics(
    before: Iterable[Diagnostic], after: Iterable[Diagnostic]
) -> tuple[Diagnostic, ...]:
    """What a build complains about now and did not before; a line that moved is not new."""
    known = Counter((one.file, one.kind, one.text) for one in before)
    found = []
    for one in after:
        key = (one.file, one.kind, one.text)
        if known[key] > 0:
            known[key] -= 1
        else:
            found.append(one)
    return tuple(found)


_HUNK = re.compile(r"^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class Section:
    """The part of a patch about one file: its name, and the lines of its hunks as they are."""

    touched: Touched
    lines: tuple[str, ...]

    @property
    def added(self) -> tuple[str, ...]:
        """The lines that the patch adds."""
        return tuple(line[1:] for line in self.lines if line.startswith("+"))

    def old(self) -> str:
        """What the hunks show of the file before the patch."""
        return "\n".join(line[1:] for line in self.lines if not line.startswith("+"))

    def new(self) -> str:
        """What the hunks show of the file with the patch."""
        return "\n".join(line[1:] for line in self.lines if not line.startswith("-"))


def sections(patch: str) -> list[Section]:
    """A patch by the files that it touches."""
    found: list[Section] = []
    path, new, deleted, lines = "", False, False, list[str]()
    left = [0, 0]

    def close() -> None:
        if path:
            found.append(Section(Touched(path, new, deleted), tuple(lines)))

    for line in patch.split("\n"):
        if left[0] > 0 or left[1] > 0:
            left[0] -= not line.startswith(("+", "\\"))
            left[1] -= not line.startswith(("-", "\\"))
            if not line.startswith("\\"):
                lines.append(line)
        elif line.startswith("diff --git "):
            close()
            # a/PATH b/PATH, unquoted: our trees have no names with spaces or quotes.
            path, new, deleted, lines = line.split(" b/", 1)[-1], False, False, []
        elif line.startswith("new file mode"):
            new = True
        elif line.startswith("deleted file mode"):
            deleted = True
        elif path and (match := _HUNK.match(line)):
            left = [int(count) if count is not None else 1 for count in match.groups()]
    close()
    return found


def touched_files(patch: str) -> tuple[Touched, ...]:
    """The files that a patch touches (a renamed one by its new name)."""
    return tuple(section.touched for section in sections(patch))


_WITH_SPDX = frozenset(
    {".c", ".cc", ".cpp", ".h", ".S", ".s", ".py", ".sh", ".pl", ".rs", ".rst", ".yaml", ".yml"}
)
_NAMES_WITH_SPDX = frozenset({"Makefile", "Kconfig", "Kbuild", "meson.build"})


def check_text(candidate: Candidate, patch: Path) -> tuple[Finding, ...]:
    """What a patch's own text must have: a sender, a subject, a body, SPDX in new files."""
    name = candidate.series.label
    text = patch.read_text(encoding="utf-8", errors="replace")
    head, _, rest = text.partition("\n\n")
    body = re.split(r"(?m)^---\s*$|^diff --git ", rest, maxsplit=1)[0]
    found = []

    def error(rule: str, words: str) -> None:
        found.append(Finding(name, patch.name, rule, "error", words))

    if not re.search(r"(?m)^From: .*<[^<>\s]+@[^<>\s]+>$", _unfolded(head)):
        error("author", "no From: line with a name and an address")
    if not re.search(r"(?m)^Subject: \[[^\]]*PATCH[^\]]*\] \S", _unfolded(head)):
        error("subject", "no Subject: [PATCH] line")
    if not body.strip():
        error("changelog", "the message has no body: say why the change is needed")
    signed = re.search(r"(?m)^Signed-off-by: ", body) is not None
    if candidate.ours and signed:
        error("sign-off", "patches are kept without Signed-off-by; the sender's is added at export")
    elif not signed:
        found.append(Finding(name, patch.name, "sign-off", "note", SIGNOFF_NOTE))
    for section in sections(text):
        path = PurePosixPath(section.touched.path)
        wants = path.suffix in _WITH_SPDX or path.name in _NAMES_WITH_SPDX
        if not section.touched.new or not wants or not section.added:
            continue
        if not any("SPDX-License-Identifier:" in line for line in section.added[:12]):
            error("spdx", f"the new file {path} has no SPDX-License-Identifier")
    return tuple(found)


def _unfolded(head: str) -> str:
    return re.sub(r"\n[ \t]+", " ", head)


# -- how objects are built


@dataclass(frozen=True)
class LinuxBuild:
    """Objects of a kernel configured from a fragment (``make allnoconfig``), with W=1."""

    fragment: Path
    jobs: int = 2
    make_arguments: tuple[str, ...] = ()
    """More words for make, such as ``CC=ccache gcc``."""
    options: tuple[Path, ...] = ()
    """More fragments, which are laid over the first one."""
    environment: Mapping[str, str] | None = None
    """Added for make."""

    def with_options(self, fragments: Sequence[Path]) -> Self:
        """The same with the options that series add (series.SERIES_OPTIONS)."""
        return replace(self, options=tuple(fragments))

    def wanted(self) -> str:
        """The lines of the configuration that are asked for."""
        return "".join(path.read_text() for path in (self.fragment, *self.options))

    def key(self) -> str:
        """The configuration, make's arguments and the compiler's version."""
        parts = {"configuration": self.wanted(), "make": self.make_arguments}
        return key_of({**parts, "compiler": version_of("gcc")})

    def lost_options(self, build: Path) -> tuple[str, ...]:
        """The lines of ``options`` that Kconfig dropped, because it misses a dependency."""
        lines = "".join(path.read_text() for path in self.options)
        return tuple(lost_options(lines, (build / ".config").read_text()))

    def configure(self, source: Path, build: Path) -> None:
        """``make allnoconfig`` from the fragments, then ``make prepare``."""
        build.mkdir(parents=True, exist_ok=True)
        fragment = build / "validate.fragment"
        fragment.write_text(self.wanted())
        environment = {"KCONFIG_ALLCONFIG": str(fragment.resolve())}
        self._make(source, build, ["allnoconfig"], env=environment)
        self._make(source, build, ["prepare"])

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """Objects of sources, and for headers the directories that live by them."""
        return linux_targets(touched)

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Build the targets with W=1; those whose sources do not exist are left out."""
        wanted = dict.fromkeys(built_with(source, target) for target in targets)
        present = [target for target in wanted if linux_source(source, target)]
        if not present:
            return ()
        for target in present:
            forget_objects(build, target)
        done = self._make(source, build, ["W=1", "--keep-going", *present], check=False)
        return parse_build(done.stdout, source, build)

    def _make(
        self,
        source: Path,
        build: Path,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> proc.Completed:
        return proc.run(
            [
                "make",
                "-C",
                source,
                f"O={build.resolve()}",
                f"-j{self.jobs}",
                *self.make_arguments,
                *words,
            ],
            deadline_s=_BUILD_S,
            env={**BUILD_ENVIRONMENT, **(self.environment or {}), **(env or {})},
            log=build / "validate.log",
            tree=True,
            check=check,
        )


@functools.cache
def version_of(program: str) -> str:
    """The first line of what a program says to --version, or nothing where there is none."""
    if shutil.which(program) is None:
        return ""
    done = proc.run([program, "--version"], deadline_s=60, check=False)
    return (done.stdout or done.stderr).partition("\n")[0]


# Kbuild drops LC_ALL: the compiler's language must be set by the others too.
BUILD_ENVIRONMENT = {
    "LC_ALL": "C",
    "LC_MESSAGES": "C",
    "LC_CTYPE": "C",
    "LANG": "C",
    "LANGUAGE": "",
    "TERM": "dumb",
}

_NOT_BUILT = ("Documentation/", "tools/", "scripts/", "samples/", "usr/")

# Headers have no object of their own: the directories whose code lives by them.
_LINUX_HEADERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^arch/x86/kvm/|^virt/kvm/|/kvm[^/]*\.h$", ("arch/x86/kvm/",)),
    (r"/perf_event[^/]*\.h$|^arch/x86/events/", ("arch/x86/events/", "arch/x86/kvm/")),
    (r"/vfio[^/]*\.h$|^drivers/vfio/", ("drivers/vfio/",)),
    (r"/iommu[^/]*\.h$|^drivers/iommu/", ("drivers/iommu/", "drivers/vfio/")),
    (r"^arch/x86/(?:include/asm/)?pci", ("arch/x86/pci/",)),
    (r"/pci[^/]*\.h$|^drivers/pci/", ("drivers/pci/", "drivers/vfio/")),
    (r"^include/|^arch/x86/include/", ("arch/x86/kvm/", "drivers/vfio/", "drivers/pci/")),
)


def linux_targets(touched: Sequence[Touched]) -> tuple[str, ...]:
    """The make targets for touched files of Linux.

    An object for each source file (a directory for virt/kvm, which is built from
    arch/x86/kvm); for headers the directories of KVM, VFIO, PCI, IOMMU and perf code that
    live by them. Tools, samples and documentation are not the kernel's objects.
    """
    targets: dict[str, None] = {}
    for file in touched:
        path = PurePosixPath(file.path)
        if file.deleted or file.path.startswith(_NOT_BUILT):
            continue
        if path.suffix in {".c", ".S"}:
            if file.path.startswith("virt/kvm/"):
                targets["arch/x86/kvm/"] = None
            elif not file.path.startswith("arch/") or file.path.startswith("arch/x86/"):
                targets[str(path.with_suffix(".o"))] = None
        elif path.suffix == ".h":
            for pattern, folders in _LINUX_HEADERS:
                if re.search(pattern, file.path):
                    targets.update(dict.fromkeys(folders))
                    break
    folders = tuple(target for target in targets if target.endswith("/"))
    return tuple(one for one in targets if one in folders or not one.startswith(folders))


def built_with(source: Path, target: str) -> str:
    """The object that a source is built into: that of a source beside it which includes it.

    KUnit tests of static functions are included so (Documentation/dev-tools/kunit/usage.rst) and
    do not compile by themselves. Other targets stay as they are.
    """
    if target.endswith("/"):
        return target
    stem = source / target
    include = re.compile(rf'^#include "{re.escape(stem.with_suffix(".c").name)}"$', re.M)
    for beside in sorted(stem.parent.glob("*.c")):
        if include.search(beside.read_text(encoding="utf-8", errors="replace")):
            return str(PurePosixPath(target).with_name(f"{beside.stem}.o"))
    return target


def linux_source(source: Path, target: str) -> bool:
    if target.endswith("/"):
        return (source / target).is_dir()
    stem = source / target
    return any(stem.with_suffix(suffix).is_file() for suffix in (".c", ".S"))


def forget_objects(build: Path, target: str) -> None:
    """Remove what make would not build again, and so say nothing about."""
    folders = [target] if target.endswith("/") else []
    if target == "arch/x86/kvm/":
        folders.append("virt/kvm/")
    for folder in folders:
        for path in (build / folder).rglob("*.o"):
            path.unlink()
    if not folders:
        (build / target).unlink(missing_ok=True)


@dataclass(frozen=True)
class QemuBuild:
    """Objects of a QEMU configured with ``arguments``, by ninja.

    ``environment`` is added for configure and ninja. Warnings must not stop the build
    (``--disable-werror``), or only the first file's are seen.
    """

    arguments: tuple[str, ...]
    jobs: int = 2
    environment: Mapping[str, str] | None = None

    def with_options(self, fragments: Sequence[Path]) -> QemuBuild:
        """The same: QEMU has no options of Linux' kind."""
        return self

    def key(self) -> str:
        """The arguments of configure and the compiler's version."""
        return key_of({"configure": self.arguments, "compiler": version_of("gcc")})

    def lost_options(self, build: Path) -> tuple[str, ...]:
        """None."""
        return ()

    def configure(self, source: Path, build: Path) -> None:
        """Run configure in an empty folder; later ninja regenerates what changed."""
        build.mkdir(parents=True, exist_ok=True)
        if (build / "build.ninja").is_file():
            return
        self._run(build, [source.resolve() / "configure", *self.arguments])

    def targets(self, source: Path, build: Path, touched: Sequence[Touched]) -> tuple[str, ...]:
        """The objects of sources, and those of the files that include a touched header."""
        self._run(build, ["ninja", "build.ninja"], check=False)
        database = build / "compile_commands.json"
        commands = json.loads(database.read_text(encoding="utf-8")) if database.is_file() else []
        return qemu_targets(touched, _objects(commands, source), _includes(source, touched))

    def compile(self, source: Path, build: Path, targets: Sequence[str]) -> tuple[Diagnostic, ...]:
        """Build the targets with ninja; those that this commit does not have are left out."""
        configured = self._run(build, ["ninja", "build.ninja"], check=False)
        if configured.status != 0:
            return parse_build(configured.stdout, source, build)
        database = build / "compile_commands.json"
        known = {entry["output"] for entry in json.loads(database.read_text(encoding="utf-8"))}
        present = [target for target in targets if target in known]
        for target in present:
            (build / target).unlink(missing_ok=True)
        if not present:
            return ()
        done = self._run(build, ["ninja", f"-j{self.jobs}", "-k0", *present], check=False)
        return parse_build(done.stdout, source, build)

    def _run(
        self, build: Path, words: Sequence[str | Path], *, check: bool = True
    ) -> proc.Completed:
        return proc.run(
            words,
            deadline_s=_BUILD_S,
            cwd=build,
            env={**BUILD_ENVIRONMENT, **(self.environment or {})},
            log=build / "validate.log",
            tree=True,
            check=check,
        )


_MOST_INCLUDERS = 40


def qemu_targets(
    touched: Sequence[Touched],
    objects: Mapping[str, Sequence[str]],
    includers: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    """The ninja targets for touched files of QEMU.

    ``objects`` are the objects by source file, ``includers`` the files that include a header,
    by header. Of a header that many include, 40 objects are built: those nearest to the files
    that the patch touches.
    """
    targets: dict[str, None] = {}
    near = {str(PurePosixPath(file.path).parent) for file in touched}
    for file in touched:
        if not file.deleted:
            targets.update(dict.fromkeys(objects.get(file.path, ())))
    for file in touched:
        found = [one for one in includers.get(file.path, ()) if one in objects]
        found.sort(key=lambda one: (str(PurePosixPath(one).parent) not in near, one))
        wanted = [target for one in found for target in objects[one]]
        targets.update(dict.fromkeys(wanted[:_MOST_INCLUDERS]))
    return tuple(targets)


def _objects(commands: Sequence[Mapping[str, str]], source: Path) -> dict[str, list[str]]:
    """The objects of compile_commands.json by source file, relative to the sources."""
    found: dict[str, list[str]] = {}
    for entry in commands:
        path = Path(os.path.normpath(Path(entry["directory"]) / entry["file"]))
        if path.is_relative_to(source.resolve()):
            name = str(path.relative_to(source.resolve()))
            found.setdefault(name, []).append(entry["output"])
    return found


def _includes(source: Path, touched: Sequence[Touched]) -> dict[str, list[str]]:
    """The files that include a touched header by name, by header."""
    found: dict[str, list[str]] = {}
    for file in touched:
        path = PurePosixPath(file.path)
        if file.deleted or path.suffix not in {".h", ".inc"}:
            continue
        written = file.path.removeprefix("include/")
        pattern = rf'^#include ["<](.*/)?{re.escape(PurePosixPath(written).name)}[">]'
        hits = trees.Git(source).ask("grep", "-E", "--full-name", "-e", pattern, "--", "*.c")
        for line in (hits or "").splitlines():
            name, _, include = line.partition(":")
            wanted = include.split('"')[1] if '"' in include else include.strip("<>")
            local = str(PurePosixPath(name).parent / wanted)
            if wanted == written or local == file.path:
                found.setdefault(file.path, []).append(name)
    return found


# -- what is validated


def find_candidates(
    directory: Path, *, tree: TreeName | None = None, only: str | None = None
) -> tuple[tuple[Candidate, ...], tuple[Finding, ...]]:
    """The series of a directory, and what is wrong with the directory itself.

    Either our layout (series.yaml and linux/, qemu/, testbed/ below it), or a flat folder of
    patches, which needs ``tree`` unless it is a series of such a layout. Raises UsageError
    for an unknown series, an empty folder, a tree that was not named.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a folder", hint="name a folder with patches")
    if (directory / "series.yaml").is_file():
        return _layout(directory, tree, only)
    if not patch_files(directory):
        raise UsageError(
            f"{directory} holds neither series.yaml nor patches", hint="name a folder with patches"
        )
    above = directory.resolve().parent.parent
    if (above / "series.yaml").is_file():
        every = load_series(above)
        for one in every:
            if one.folder.resolve() == directory.resolve():
                return (candidate_of(one, every),), ()
    if tree is None:
        raise UsageError(
            f"{directory} does not say which tree its patches are for",
            hint=f"add --tree {'|'.join(TREES)}",
        )
    name = directory.resolve().name
    if only is not None and only != name:
        raise UsageError(f"there is no series '{only}' in {directory}", hint=nearest(only, [name]))
    series = Series(name, tree, 1, "", "", (), Enable(), directory)
    return (Candidate(series, ours=False),), ()


def _layout(
    directory: Path, tree: TreeName | None, only: str | None
) -> tuple[tuple[Candidate, ...], tuple[Finding, ...]]:
    every = series = load_series(directory)
    if only is not None:
        find_series(series, only)
        series = tuple(one for one in series if one.name == only)
    if tree is not None:
        series = of_tree(series, tree)
    findings: list[Finding] = []
    known = {one.folder for one in every}
    if only is None and tree is None:
        for parent in _FOLDERS:
            for folder in sorted((directory / parent).glob("*/")):
                if folder.is_dir() and folder not in known and not folder.name.startswith("."):
                    findings.append(
                        Finding(
                            folder.name,
                            "",
                            "series.yaml",
                            "error",
                            "series.yaml has no entry for it",
                        )
                    )
    for one in series:
        if not one.patches():
            findings.append(Finding(one.label, "", "patches", "error", f"{one.folder} holds none"))
        text = ""
        if one.cover.is_file():
            text = one.cover.read_text(encoding="utf-8", errors="replace").strip()
        if not text:
            findings.append(
                Finding(one.label, "", "cover", "error", "cover.txt is missing or empty")
            )
        elif "\n" not in text:
            findings.append(
                Finding(one.label, "", "cover", "error", "cover.txt has a title and no text")
            )
    return tuple(candidate_of(one, every) for one in series if one.patches()), tuple(findings)


def trees_needed(candidates: Sequence[Candidate]) -> tuple[TreeName, ...]:
    """The trees whose bases a validation needs."""
    return tuple(tree for tree in TREES if any(one.series.tree == tree for one in candidates))


def validate(
    candidates: Sequence[Candidate],
    bases: Mapping[TreeName, Base],
    scratch: Path,
    *,
    quick: bool = True,
) -> list[Finding]:
    """Apply, check and build the candidates; gives what was found, in their order.

    ``scratch`` keeps a work tree and a build for each tree, which make the next time quick;
    nobody else may use it meanwhile. Without ``quick`` the stacked tree's objects are built
    too. Raises UsageError where a base is missing, CommandFailed where a base does not
    configure.
    """
    findings: list[Finding] = []
    for tree in trees_needed(candidates):
        if tree not in bases:
            raise UsageError(f"no sources of {tree} were given", hint="give its base")
        chosen = [one for one in candidates if one.series.tree == tree]
        chosen.sort(key=lambda one: one.series.order)
        findings += _validate_tree(chosen, bases[tree], scratch.resolve() / tree, quick)
    return findings


def exit_status(findings: Iterable[Finding]) -> Exit:
    """FAILED if any finding is an error."""
    return Exit.FAILED if any(one.severity == "error" for one in findings) else Exit.OK


def _validate_tree(
    candidates: Sequence[Candidate], base: Base, scratch: Path, quick: bool
) -> list[Finding]:
    findings: list[Finding] = []
    work = WorkTree.open(base, scratch)
    for candidate in candidates:
        series = candidate.series
        with ui.step(f"validate {series.label}") as step:
            patches = series.patches()
            for patch in patches:
                findings += check_text(candidate, patch)
                step.status = f"checkpatch {patch.name}"
                if not series.tree.endswith("bochs"):
                    findings += checkpatch(base, series.label, patch)
            step.status = "applies it alone"
            commits = work.apply(candidate, findings)
            if base.build is None:
                text = "not built: no build of this tree was set up"
                findings.append(Finding(series.label, "", "build", "note", text))
            else:
                setup = base.build.with_options(candidate.options)
                for patch, before, after in zip(patches, commits, commits[1:], strict=False):
                    step.status = f"builds {patch.name}"
                    findings += work.build_patch(setup, series.label, patch, before, after)
                if candidate.options and len(commits) > len(patches):
                    findings += work.lost_options(setup, series.label, commits[-1])
    findings += _validate_stack(candidates, base, work, quick)
    return _once(findings)


def _validate_stack(
    candidates: Sequence[Candidate], base: Base, work: WorkTree, quick: bool
) -> list[Finding]:
    """All series of a tree on top of one another."""
    if len(candidates) < 2:
        return []
    findings: list[Finding] = []
    with ui.step(f"validate all series of {base.tree}, stacked") as step:
        work.git.run("reset", "--quiet", "--hard", work.base)
        for candidate in candidates:
            series = candidate.series
            try:
                trees.apply_patches(work.git, series.patches(), "the series before it")
            except trees.DoesNotApply as error:
                text = f"does not apply on the series before it: {_said(error.output)}"
                findings.append(Finding(series.label, error.patch.name, "stacked", "error", text))
                return findings
        if quick or base.build is None:
            return findings
        step.status = "builds what they touch"
        options = dict.fromkeys(path for candidate in candidates for path in candidate.options)
        setup = base.build.with_options(tuple(options))
        head = work.git.text("rev-parse", "HEAD")
        touched = tuple(
            file
            for candidate in candidates
            for patch in candidate.series.patches()
            for file in touched_files(patch.read_text(encoding="utf-8", errors="replace"))
        )
        for one in work.new_of(setup, touched, work.base, head):
            findings.append(build_finding("all series", "", one, "stacked"))
    return findings


_LAYOUT = 2
"""Changes when the folders of a work tree do; ``src`` and ``out`` are those of a real build."""


@functools.cache
def _recipe() -> str:
    """Changes with the code that chooses what is built and reads what is said of it."""
    here = Path(__file__).parent
    code = [here / name for name in ("validate.py", "validation/linux.py", "validation/tools.py")]
    return key_of({path.name: sha256_file(path) for path in code})


@dataclass(frozen=True)
class WorkTree:
    """A work tree of a base, and a build of it, kept between validations."""

    git: trees.Git
    base: str
    build: Path
    onto: str
    seen: dict[tuple[str, str, tuple[str, ...]], tuple[Diagnostic, ...]]
    results: Results

    @classmethod
    def open(cls, base: Base, scratch: Path) -> WorkTree:
        """The work tree, as the base is; made anew where the base is another one."""
        source, mark = scratch / "src", scratch / "base"
        repository = base.repository
        wanted = f"{base.name} {base.sources.resolve()}"
        if repository is not None:
            wanted = trees.Git(repository).text("rev-parse", "HEAD")
        wanted = f"{_LAYOUT} {wanted}"
        if not (mark.is_file() and mark.read_text() == wanted):
            if scratch.exists():
                remove(scratch)
            scratch.mkdir(parents=True)
            with ui.step(f"make a work tree of {base.name}"):
                if repository is None:
                    repository = scratch / "base.git"
                    trees.make_base_repository(base.sources, base.tree, base.version, repository)
                trees.clone_base(repository, source)
            mark.write_text(wanted)
        git = trees.Git(source)
        # What a killed validation left.
        (source / ".git" / "index.lock").unlink(missing_ok=True)
        shutil.rmtree(source / ".git" / "rebase-apply", ignore_errors=True)
        git.run("reset", "--quiet", "--hard", trees.BASE_TAG, deadline_s=_BUILD_S)
        git.run("clean", "--quiet", "-ffdx", deadline_s=_BUILD_S)
        commit = git.text("rev-parse", f"{trees.BASE_TAG}^{{commit}}")
        results = Results(scratch.parent / "results").open()
        return cls(git, commit, scratch / "out", base.name, {}, results)

    def in_folder(self, name: str) -> WorkTree:
        """The same sources with another build of them."""
        return replace(self, build=self.build.with_name(name))

    def apply(self, candidate: Candidate, findings: list[Finding]) -> tuple[str, ...]:
        """The commits of a series on what it requires, alone on the base, up to one that fails.

        The first one is the commit that the series stands on; there is none where what it
        requires does not apply.
        """
        name, patches = candidate.series.label, candidate.series.patches()
        self.git.run("reset", "--quiet", "--hard", self.base)
        try:
            trees.apply_patches(self.git, candidate.below, self.onto)
        except trees.DoesNotApply as error:
            where = f"{error.patch.parent.name}/{error.patch.name}"
            text = f"{where}, which it requires, does not apply: {_said(error.output)}"
            findings.append(Finding(name, "", "requires", "error", text))
            return ()
        below = self.git.text("rev-parse", "HEAD")
        onto = f"{self.onto} with what it requires" if candidate.below else self.onto
        try:
            trees.apply_patches(self.git, patches, onto)
        except trees.DoesNotApply as error:
            text = f"does not apply to {onto}: {_said(error.output)}"
            findings.append(Finding(name, error.patch.name, "applies", "error", text))
            trees.apply_patches(self.git, patches[: patches.index(error.patch)], onto)
        listed = self.git.text("rev-list", "--reverse", f"{below}..HEAD").split()
        return (below, *listed)

    def build_patch(
        self, setup: BuildSetup, name: str, patch: Path, before: str, after: str
    ) -> list[Finding]:
        """What a patch adds to the complaints of the build, and what could not be built."""
        touched = touched_files(patch.read_text(encoding="utf-8", errors="replace"))
        found = [
            build_finding(name, patch.name, one, "build")
            for one in self.new_of(setup, touched, before, after)
        ]
        if not self.seen_targets(setup, touched, after):
            names = ", ".join(PurePosixPath(file.path).name for file in touched[:3])
            text = f"nothing of it is built with this configuration ({names})"
            found.append(Finding(name, patch.name, "build", "note", text))
        return found

    def lost_options(self, setup: BuildSetup, name: str, commit: str) -> list[Finding]:
        """The options of a whole series that its kernel's configuration does not take."""
        self.go(setup, commit)
        return [
            Finding(name, "", "kernel.config", "error", f"the configuration drops {line}")
            for line in setup.lost_options(self.build)
        ]

    def new_of(
        self, setup: BuildSetup, touched: Sequence[Touched], before: str, after: str
    ) -> tuple[Diagnostic, ...]:
        """The complaints about the touched files at ``after`` that ``before`` does not have."""
        targets = self.seen_targets(setup, touched, after)
        then = self._compile(setup, targets, before) if targets else ()
        now = self._compile(setup, targets, after) if targets else ()
        return new_diagnostics(then, now)

    def seen_targets(
        self, setup: BuildSetup, touched: Sequence[Touched], commit: str
    ) -> tuple[str, ...]:
        """The targets of touched files at a commit, as they were found the first time."""
        files = [[one.path, one.new, one.deleted] for one in touched]
        ingredients = {**self._ingredients(setup, commit), "touched": files}
        if (kept := self.results.get(ingredients)) is not None:
            return tuple(kept)
        self.go(setup, commit)
        found = setup.targets(self.git.folder, self.build, touched)
        self.results.keep(ingredients, found)
        return found

    def _ingredients(self, setup: BuildSetup, commit: str) -> dict[str, str]:
        contents = self.git.text("rev-parse", f"{commit}^{{tree}}")
        return {"recipe": _recipe(), "setup": setup.key(), "tree": contents}

    def _compile(
        self, setup: BuildSetup, targets: tuple[str, ...], commit: str
    ) -> tuple[Diagnostic, ...]:
        key = (setup.key(), commit, targets)
        if key not in self.seen:
            self.seen[key] = self._compile_anew(setup, targets, commit)
        return self.seen[key]

    def _compile_anew(
        self, setup: BuildSetup, targets: tuple[str, ...], commit: str
    ) -> tuple[Diagnostic, ...]:
        """Build, or take what an earlier validation kept.

        Errors are not kept: they may be those of a machine that was out of memory or disk.
        """
        ingredients = {**self._ingredients(setup, commit), "targets": list(targets)}
        if (kept := self.results.get(ingredients)) is not None:
            return tuple(Diagnostic(**one) for one in kept)
        self.go(setup, commit)
        found = setup.compile(self.git.folder, self.build, targets)
        if not any(one.kind == "error" for one in found):
            self.results.keep(ingredients, [asdict(one) for one in found])
        return found

    def go(self, setup: BuildSetup, commit: str) -> None:
        """Check a commit out, and configure its build where that is needed."""
        if self.git.text("rev-parse", "HEAD") != commit:
            self.git.run("reset", "--quiet", "--hard", commit, deadline_s=_BUILD_S)
        configured = self.build / "configured-for"
        wanted = f"{setup.key()} {self._configuration(commit)}"
        if not configured.is_file() or configured.read_text() != wanted:
            with ui.step(f"configure {self.onto}"):
                setup.configure(self.git.folder, self.build)
            configured.write_text(wanted)

    def _configuration(self, commit: str) -> str:
        """A word that changes with the files that a configuration is made from."""
        listed = self.git.text("ls-tree", "-r", commit)
        chosen = [
            line
            for line in listed.splitlines()
            if PurePosixPath(line.split("\t", 1)[1]).name.startswith(("Kconfig", "configure"))
        ]
        return key_of({"files": chosen})


def checkpatch(base: Base, name: str, patch: Path) -> tuple[Finding, ...]:
    script = base.sources / "scripts" / "checkpatch.pl"
    if not script.is_file():
        text = f"{base.name} has no scripts/checkpatch.pl"
        return (Finding(name, patch.name, "checkpatch", "error", text),)
    words = ["--strict", "--terse", "--no-summary", "--color=never"]
    if base.tree == "linux":
        words += ["--show-types", "--patch"]
    done = proc.run(
        ["perl", script, *words, f"--root={base.sources.resolve()}", patch.resolve()],
        deadline_s=_CHECKPATCH_S,
        cwd=base.sources,
        env={"LC_ALL": "C.UTF-8"},
        check=False,
        hint="install the package perl",
    )
    remarks = parse_checkpatch(done.stdout)
    if done.status not in (0, 1) or (done.status == 1 and not remarks):
        raise NearmetalError(
            f"checkpatch of {base.name} does not run",
            detail=proc.tail(done.stderr or done.stdout),
            hint="it needs perl with its standard modules",
        )
    text = patch.read_text(encoding="utf-8", errors="replace")
    return judge_checkpatch(name, patch.name, remarks, text)


def build_finding(name: str, patch: str, one: Diagnostic, rule: str) -> Finding:
    place = f"{one.file}:{one.line}: " if one.line else f"{one.file}: " if one.file else ""
    new = "new warning: " if one.kind == "warning" else "error: "
    return Finding(name, patch, rule, "error", f"{place}{new}{one.text}")


def _said(output: str) -> str:
    """The line of git am that says what does not fit."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    return lines[0].removeprefix("error: ") if lines else "git am refuses it"


def _once(findings: Iterable[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))


# -- telling


def render_findings(findings: Sequence[Finding], candidates: Sequence[Candidate]) -> str:
    """The findings as text for a terminal or a mail: by series, errors first."""
    lines: list[str] = []
    names = [one.series.label for one in candidates]
    counts = {one.series.label: len(one.series.patches()) for one in candidates}
    names += [one.series for one in findings if one.series not in names]
    for name in dict.fromkeys(names):
        mine = [one for one in findings if one.series == name]
        errors = [one for one in mine if one.severity == "error"]
        notes = [one for one in mine if one.severity == "note"]
        about = ""
        if name in counts:
            about = f" ({_count(counts[name], 'patch', 'patches')})"
        verdict = _count(len(errors), "error", "errors") if errors else "ok"
        lines.append(f"{name}{about}: {verdict}")
        lines += [f"  error {_where(one)}{one.rule}: {one.text}" for one in errors]
        lines += _render_notes(notes, counts.get(name, 0))
    errors = [one for one in findings if one.severity == "error"]
    total = _count(len(errors), "error", "errors")
    series = _count(len(dict.fromkeys(names)), "series", "series")
    lines += ["", f"{total} in {series}"]
    return "\n".join(lines)


def _render_notes(notes: Sequence[Finding], patches: int) -> list[str]:
    """Notes, one line for all patches that have the same."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for note in notes:
        groups.setdefault((note.rule, note.text), []).append(note)
    lines = []
    for (rule, text), same in groups.items():
        where = _where(same[0])
        if len(same) > 1:
            where = f"{'all' if len(same) == patches else len(same)} patches: "
        lines.append(f"  note  {where}{rule}: {text}")
    return lines


def _where(finding: Finding) -> str:
    return f"{finding.patch}: " if finding.patch else ""


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
