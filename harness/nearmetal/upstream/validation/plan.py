# SPDX-License-Identifier: GPL-2.0-or-later
"""Which stages ``validate --full`` has for a series of Linux or of QEMU."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from ...core import proc
from ..validate import Base, BuildSetup, Candidate, LinuxBuild, QemuBuild, Touched
from .linux import FolderBuild, Symbol, lines_off, lines_on, own_symbols
from .stage import Need, Stage
from .tools import Coccinelle, KernelDoc, LinuxDocuments, QemuDocuments

_ARM64_PACKAGE = "gcc-aarch64-linux-gnu, with gcc-N-multilib of your gcc's number beside it"
_NO_CODE = ("Documentation/", "tools/", "scripts/", "samples/", "usr/")

SPHINX = Need("sphinx-build", "python3-sphinx")
ARM64 = "aarch64-linux-gnu-"


@functools.cache
def arm64_compiler() -> str | None:
    """A gcc for arm64, by its number where there is no plain one, or None.

    Debian's cross compilers remove gcc-multilib, which the option ROMs of QEMU want; the package
    gcc-12-multilib, which it depends on, stays if it is asked for.
    """
    if shutil.which(f"{ARM64}gcc"):
        return f"{ARM64}gcc"
    for version in range(30, 9, -1):
        if shutil.which(f"{ARM64}gcc-{version}"):
            return f"{ARM64}gcc-{version}"
    return None


def _in(pattern: str) -> Callable[[Touched], bool]:
    matcher = re.compile(pattern)
    return lambda file: matcher.search(file.path) is not None and not file.deleted


def _code(file: Touched) -> bool:
    """Code of the kernel, and what decides whether it is built."""
    return not file.path.startswith(_NO_CODE) and file.path.endswith((".c", ".S", ".h"))


_C_FILES = _in(r"^(?!(?:Documentation|tools|scripts|samples|usr)/).*\.c$")
_HEADERS = _in(r"^(?!(?:tools|samples)/).*\.h$")
_ELSEWHERE = _in(r"^(?:drivers|include|virt|kernel|mm|lib)/.*\.[chS]$")
_ON_X86 = _in(r"^(?:drivers|include|virt|kernel|mm|lib|arch/x86)/.*\.[chS]$")
_LINUX_PAGES = _in(r"^Documentation/")
_QEMU_PAGES = _in(r"^docs/|^qemu-options\.hx$|^qapi/")
_QEMU_CODE = _in(r"^(?!(?:docs|tests)/).*\.(?:c|h|inc)$")


_UNQUAL = "-D__typeof_unqual__=__typeof__"


@functools.cache
def checker() -> str | None:
    """The command for sparse that this machine's one takes current kernels with, or None.

    Linux asks for __typeof_unqual__ (scripts/checker-valid.sh), which no release of sparse
    knows. With that word defined away, sparse sees a qualifier too many.
    """
    if shutil.which("sparse") is None:
        return None
    for command in ("sparse", f"sparse {_UNQUAL}"):
        with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
            file.write("static int f(const int *q) { __typeof_unqual__(*q) v = *q; return v; }\n")
            file.flush()
            done = proc.run([*command.split(), file.name], deadline_s=60, check=False)
        if done.status == 0 and "error" not in done.stderr:
            return command
    return None


@dataclass(frozen=True)
class _Linux:
    """What the stages of a kernel are made from."""

    plain: LinuxBuild
    symbols: tuple[Symbol, ...]

    def build(self, **more: object) -> FolderBuild:
        """A build by folders, as the default one but for ``more``."""
        same = FolderBuild(
            self.plain.fragment,
            self.plain.jobs,
            self.plain.make_arguments,
            environment=self.plain.environment,
        )
        return replace(same, **more)  # type: ignore[arg-type]

    def stages(self) -> tuple[Stage, ...]:
        """All stages of a series for Linux, the quick ones first."""
        return (
            self._kernel_doc(),
            self._sparse(),
            *self._configurations(),
            *self._machines(),
            Stage(
                "documentation",
                LinuxDocuments(self.plain.jobs),
                "documents",
                _LINUX_PAGES,
                (SPHINX,),
                with_options=False,
            ),
            Stage(
                "coccicheck",
                Coccinelle(self.plain.jobs),
                "coccicheck",
                _C_FILES,
                (Need("spatch", "coccinelle"), Need("ocamlopt", "ocaml-nox")),
                with_options=False,
            ),
        )

    def _kernel_doc(self) -> Stage:
        return Stage("kernel-doc", KernelDoc(), "kernel-doc", _HEADERS, with_options=False)

    def _sparse(self) -> Stage:
        command = checker() or "sparse"
        return Stage(
            "sparse",
            self.build(words=("W=1", "C=1", f"CHECK={command}"), tools=("gcc", "sparse")),
            "full",
            _code,
            (Need("sparse that takes this kernel", "sparse 0.6.4", lambda: bool(checker())),),
        )

    def _configurations(self) -> tuple[Stage, ...]:
        """The series' own options off and on, and everything as modules and built in."""
        on = {modules: lines_on(self.symbols, modules=modules) for modules in (True, False)}
        off = lines_off(self.symbols)
        if not self.symbols:
            return (Stage("built in", self.build(builtin=True), "full-y", _code),)
        return (
            Stage("option on, modules", self.build(over=on[True]), "full", _code),
            Stage("option off, modules", self.build(over=off), "full", _code),
            Stage("option on, built in", self.build(over=on[False], builtin=True), "full-y", _code),
            Stage("option off, built in", self.build(over=off, builtin=True), "full-y", _code),
        )

    def _machines(self) -> tuple[Stage, ...]:
        program = arm64_compiler() or f"{ARM64}gcc"
        arm64 = self.build(
            fragment=Path(str(files("nearmetal") / "data" / "arm64.config")),
            arch="arm64",
            over=lines_on(self.symbols, modules=True),
            make_arguments=(
                "ARCH=arm64",
                f"CROSS_COMPILE={ARM64}",
                f"CC=ccache {program}",
            ),
            tools=(program,),
        )
        i386 = self.build(
            make_arguments=("ARCH=i386", *self.plain.make_arguments),
            over="CONFIG_64BIT=n\n" + lines_on(self.symbols, modules=True),
        )
        compiler = Need(f"{ARM64}gcc", _ARM64_PACKAGE, lambda: arm64_compiler() is not None)
        return (
            Stage("arm64", arm64, "full-arm64", _ELSEWHERE, (compiler,)),
            Stage("i386", i386, "full-i386", _ON_X86),
        )


def _qemu(plain: QemuBuild, version: str) -> tuple[Stage, ...]:
    """The stages of a series for QEMU: two targets with -Werror, the manual."""
    changed = {"--disable-werror": "--enable-werror", "--disable-fdt": "--enable-fdt=system"}
    arguments = tuple(changed.get(word, word) for word in plain.arguments)
    arguments = tuple(
        f"{word},aarch64-softmmu" if word.startswith("--target-list=") else word
        for word in arguments
    )
    number = re.sub(r"^\d+:|[+~-].*$", "", version)
    theme = Need(
        "theme of Sphinx", "python3-sphinx-rtd-theme", lambda: _imports("sphinx_rtd_theme")
    )
    fdt = Need("libfdt.h", "libfdt-dev", lambda: Path("/usr/include/libfdt.h").is_file())
    return (
        Stage(
            "werror, x86_64 and aarch64",
            replace(plain, arguments=arguments),
            "full",
            _QEMU_CODE,
            (fdt,),
        ),
        Stage(
            "documentation",
            QemuDocuments(number, plain.jobs),
            "documents",
            _QEMU_PAGES,
            (SPHINX, theme),
        ),
    )


def _imports(module: str) -> bool:
    """Whether Debian's Python, which runs Sphinx, has a module."""
    words = ["/usr/bin/python3", "-c", f"import {module}"]
    return proc.run(words, deadline_s=60, check=False).status == 0


def stages(candidate: Candidate, base: Base) -> tuple[Stage, ...]:
    """The stages of a series on its base, with its own options; none for other trees."""
    setup: BuildSetup | None = base.build
    found: tuple[Stage, ...] = ()
    if isinstance(setup, LinuxBuild):
        found = _Linux(setup, own_symbols(candidate)).stages()
    elif isinstance(setup, QemuBuild):
        found = _qemu(setup, base.version)
    return tuple(one.for_series(candidate) for one in found if one.work(candidate))
