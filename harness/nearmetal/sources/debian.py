# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's archive, asked through apt with a configuration of our own.

The machine's own sources say which mirror to use; only the suite is changed to trixie
(and trixie-backports, trixie-security). Lists, state and downloads live in the cache:
nothing on the machine is changed and no root is needed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from debian.debian_support import NativeVersion

from ..core import proc, ui
from ..core.cache import Cache, sha256_file
from ..core.errors import EnvironmentBroken

SUITE = "trixie"
_LIST_AGE_S = 24 * 3600.0
_DEADLINE_S = 1800.0
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Mirror:
    """One archive of the machine's sources: ``kind`` is ``main`` or ``security``."""

    kind: str
    uri: str
    signed_by: str


@dataclass(frozen=True)
class File:
    """A file of the archive: its name and SHA-256 as the signed index gives them."""

    name: str
    sha256: str
    version: str
    package: str
    is_source: bool


def mirrors(texts: Iterable[str], keyring: str = str(_KEYRING)) -> tuple[Mirror, ...]:
    """The Debian mirrors named in apt sources, deb822 (sources.list(5)) or one-line style."""
    found: dict[str, Mirror] = {}

    def add(uri: str, suites: list[str], signed_by: str) -> None:
        for suite in suites:
            base = suite.split("/")[0]
            codename = base.removesuffix("-security").removesuffix("-updates")
            if codename not in ("bookworm", "trixie", "forky", "sid", "stable", "oldstable"):
                continue
            kind = "security" if suite.endswith("-security") else "main"
            found.setdefault(kind, Mirror(kind, uri, signed_by or keyring))

    for text in texts:
        for stanza in re.split(r"\n\s*\n", text):
            lines = [line for line in stanza.splitlines() if not line.lstrip().startswith("#")]
            if any(re.match(r"(?i)uris\s*:", line) for line in lines):
                fields: dict[str, str] = {}
                name = ""
                for line in lines:
                    if line[:1].isspace() and name:
                        fields[name] += "\n" + line
                    elif ":" in line:
                        name, _, value = line.partition(":")
                        name = name.strip().lower()
                        fields[name] = value.strip()
                if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
                    continue
                for uri in fields.get("uris", "").split():
                    add(uri, fields.get("suites", "").split(), fields.get("signed-by", ""))
                continue
            for line in lines:
                one = re.match(
                    r"\s*deb\s+(?:\[(?P<opt>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)", line
                )
                if one:
                    option = re.search(r"signed-by=(\S+)", one["opt"] or "")
                    add(one["uri"], [one["suite"]], option[1] if option else "")
    return tuple(found[kind] for kind in ("main", "security") if kind in found)


def machine_mirrors() -> tuple[Mirror, ...]:
    """The Debian mirrors that this machine's own apt sources name."""
    return mirrors(
        path.read_text(errors="replace")
        for path in (
            Path("/etc/apt/sources.list"),
            *sorted(Path("/etc/apt/sources.list.d").glob("*.list")),
            *sorted(Path("/etc/apt/sources.list.d").glob("*.sources")),
        )
        if path.is_file()
    )


def sources_text(found: tuple[Mirror, ...], suite: str = SUITE) -> str:
    """Sources in deb822 style for a suite, with its backports and security updates."""
    suites = {"main": f"{suite} {suite}-backports", "security": f"{suite}-security"}
    return "\n".join(
        f"Types: deb deb-src\nURIs: {mirror.uri}\nSuites: {suites[mirror.kind]}\n"
        f"Components: main\nSigned-By: {mirror.signed_by}\n"
        for mirror in found
    )


@dataclass(frozen=True)
class Pinned:
    """A file of the archive that is known to be good.

    ``pool`` is its place below the archive's top; ``sha256`` was checked against the
    signed index or the signed .dsc that named it when it was pinned.
    """

    pool: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.pool.rsplit("/", 1)[-1]


class Gone(EnvironmentBroken):
    """The signed index names a file that the archive does not have any more."""


_NOT_FOUND = re.compile(r"\b404\b|Not Found")
"""What apt says of a file that a mirror has not (by HTTP, or by a mirror on disk)."""

_HELPER = Path("/usr/lib/apt/apt-helper")


@dataclass(frozen=True)
class Archive:
    """apt with its configuration, lists and state in the cache."""

    folder: Path

    @property
    def sources_file(self) -> Path:
        """The deb822 file with the suites in use (mmdebstrap takes it as it is)."""
        return self.folder / "nearmetal.sources"

    def _env(self) -> dict[str, str]:
        return {"APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def root(
        self,
        target: Path,
        suite: str,
        packages: Sequence[str],
        *,
        words: Sequence[str],
        log: Path,
        deadline_s: float,
    ) -> None:
        """Make a root file system of a suite in ``target`` by mmdebstrap; ``words``: its options.

        It runs as root, or in a user namespace where the machine allows that. Raises
        CommandFailed, a kind of EnvironmentBroken.
        """
        proc.run(
            [
                "mmdebstrap",
                f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
                *words,
                f"--include={','.join(packages)}",
                suite,
                target,
                self.sources_file,
            ],
            deadline_s=deadline_s,
            env={"SOURCE_DATE_EPOCH": "1"},
            log=log,
            tree=True,
            hint="check the network; without root user namespaces must be allowed",
        )

    def fetch(self, file: File, folder: Path) -> Path:
        """Download a file and verify its SHA-256; apt goes on where a broken one stopped.

        Raises Gone where the archive has no such file, which is remembered until the lists
        are read again; EnvironmentBroken where it cannot be had or is not what was signed.
        """
        target = folder / file.name
        words = ["source", "--download-only", "--tar-only"] if file.is_source else ["download"]
        for attempt in (1, 2):
            try:
                proc.run(
                    ["apt-get", *words, f"{file.package}={file.version}"],
                    deadline_s=_DEADLINE_S,
                    cwd=folder,
                    env=self._env(),
                    hint="check the network and the disk, then run again: the download goes on",
                )
            except proc.CommandFailed as error:
                if not _NOT_FOUND.search(error.output):
                    raise
                self._remember_gone(file.sha256)
                raise Gone(f"{file.name} is named by Debian's index, but gone") from None
            got = sorted(folder.glob("*.deb")) if not file.is_source else [target]
            if got and got[0].is_file() and sha256_file(got[0]) == file.sha256:
                return got[0]
            for path in got:
                path.unlink(missing_ok=True)
            if attempt == 1:
                ui.warn(f"{file.name} does not match the signed index; fetching it again")
        raise EnvironmentBroken(
            f"{file.name}: the download's SHA-256 is not {file.sha256}",
            hint="the mirror or a proxy changes files; use another mirror, or --source-dir",
        )

    def fetch_pinned(self, file: Pinned, folder: Path) -> Path:
        """Download a pinned file from the machine's own mirror; apt verifies its SHA-256.

        Raises Gone where the archive does not have it any more, EnvironmentBroken.
        """
        target = folder / file.name
        mirror = re.search(r"(?m)^URIs: (\S+)$", self.sources_file.read_text())
        assert mirror is not None  # open_archive wrote it
        address = f"{mirror[1].rstrip('/')}/{file.pool}"
        try:
            proc.run(
                [_HELPER, "download-file", address, target, f"SHA256:{file.sha256}"],
                deadline_s=_DEADLINE_S,
                env=self._env(),
                hint="check the network and the disk, then run again",
            )
        except proc.CommandFailed as error:
            target.unlink(missing_ok=True)
            if _NOT_FOUND.search(error.output):
                raise Gone(
                    f"{file.name} (known to work) is gone from Debian's archive",
                    hint="put it into a folder and name that with --source-dir",
                ) from None
            raise
        if sha256_file(target) != file.sha256:
            target.unlink()
            raise EnvironmentBroken(
                f"{file.name}: the download's SHA-256 is not {file.sha256}",
                hint="the mirror or something on the way alters files; use another,"
                " or --source-dir",
            )
        return target

    def is_gone(self, file: File) -> bool:
        """Whether the archive was found to lack this file since the lists were read."""
        stamp, gone = self.folder / "updated", self.folder / "gone" / file.sha256
        return gone.is_file() and stamp.is_file() and gone.stat().st_mtime >= stamp.stat().st_mtime

    def _remember_gone(self, sha256: str) -> None:
        (self.folder / "gone").mkdir(exist_ok=True)
        (self.folder / "gone" / sha256).touch()

    def binaries(self, package: str, wanted: str) -> list[File]:
        """The binary package's versions that match the regular expression, newest first."""
        out = proc.run(
            ["apt-cache", "show", package], deadline_s=120, env=self._env(), check=False
        ).stdout
        return parse_show(out, package, wanted)

    def tarballs(self, package: str, wanted: str) -> list[File]:
        """The source package's .orig tarballs whose version matches, newest first."""
        out = proc.run(
            ["apt-cache", "showsrc", package], deadline_s=120, env=self._env(), check=False
        ).stdout
        return parse_showsrc(out, package, wanted)


def parse_show(text: str, package: str, wanted: str) -> list[File]:
    """``apt-cache show``: the versions that match, in apt's order (newest first)."""
    files = []
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.M))
        if fields.get("Package") == package and re.match(wanted, fields.get("Version", "")):
            name = Path(fields["Filename"]).name
            files.append(File(name, fields["SHA256"], fields["Version"], package, False))
    return files


def parse_showsrc(text: str, package: str, wanted: str) -> list[File]:
    """``apt-cache showsrc``: the .orig tarballs of the versions that match, newest first."""
    files = []
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.M))
        version = fields.get("Version", "")
        upstream = version.split(":", 1)[-1]
        if fields.get("Package") != package or not re.match(wanted, upstream):
            continue
        sums = re.search(r"^Checksums-Sha256:\s*\n((?: .*\n?)+)", stanza, re.M)
        for digest, name in re.findall(
            r"^ ([0-9a-f]{64}) \d+ (\S+)$", sums[1] if sums else "", re.M
        ):
            if re.search(r"\.orig\.tar\.\w+$", name):
                files.append(File(name, digest, version, package, True))
    order = sorted({file.version for file in files}, key=version_key, reverse=True)
    return sorted(files, key=lambda file: order.index(file.version))


def version_key(version: str) -> NativeVersion:
    """Something to sort Debian's versions by (deb-version(7)): ~ comes before the end.

    Of a text that is no version, such as a file's name, what begins with its first digit counts.
    """
    found = re.search(r"\d[A-Za-z0-9.+:~-]*", version)
    return NativeVersion(found[0] if found else "0")


def open_archive(cache: Cache) -> Archive:
    """The archive with lists at most a day old; stale lists are used when there is no network.

    Raises EnvironmentBroken when the machine has no Debian sources or no list can be had.
    """
    folder = cache.root / "apt"
    archive = Archive(folder)
    found = machine_mirrors()
    if not any(mirror.kind == "main" for mirror in found):
        raise EnvironmentBroken(
            "this machine's apt sources name no Debian mirror",
            hint="run on Debian 12 or 13, or give the archives with --source-dir",
        )
    with cache.lock("apt"):
        for name in ("lists/partial", "archives/partial", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        text = sources_text(found)
        stamp = folder / "updated"
        changed = not archive.sources_file.is_file() or archive.sources_file.read_text() != text
        archive.sources_file.write_text(text)
        (folder / "apt.conf").write_text(
            f'Dir::Etc::sourcelist "{archive.sources_file}";\n'
            'Dir::Etc::sourceparts "-";\n'
            f'Dir::State::lists "{folder}/lists";\n'
            f'Dir::State::status "{folder}/status";\n'
            f'Dir::Cache "{folder}/cache";\n'
            f'Dir::Cache::archives "{folder}/archives";\n'
            'APT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "3";\n'
            "#clear APT::Update::Post-Invoke;\n"
            "#clear APT::Update::Post-Invoke-Success;\n"
        )
        # a stamp of the future is of a clock that was wrong: such lists would stay for ever
        age = time.time() - stamp.stat().st_mtime if stamp.is_file() else -1.0
        old = not 0 <= age <= _LIST_AGE_S
        if changed or old:
            with ui.step("reading Debian's package lists"):
                done = proc.run(
                    ["apt-get", "update", "-o", "APT::Update::Error-Mode=any"],
                    deadline_s=600,
                    env=archive._env(),
                    check=False,
                )
            if done.status == 0:
                stamp.touch()
            elif stamp.is_file():
                ui.warn("Debian's package lists could not be read again; the old ones are used")
            else:
                raise EnvironmentBroken(
                    "Debian's package lists could not be read",
                    hint=proc.DISK_HINT
                    if proc.disk_full(done.stderr)
                    else "check the network, or give the archives with --source-dir",
                    detail=proc.tail(done.stderr, 5),
                )
    return archive
