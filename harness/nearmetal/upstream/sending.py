# SPDX-License-Identifier: GPL-2.0-or-later
"""A series as mails: what ``git send-email`` sends and b4 reads.

Patches are kept without a sender. Here the sender becomes their author and signs them off; the
cover letter gets a shortlog, a diffstat and the base; all mails get the same recipients.
Message-Ids and threading are left to whatever sends them.
"""

from __future__ import annotations

import email.utils
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.header import Header
from pathlib import Path

from .. import __version__
from ..core import proc
from ..core.errors import NearmetalError, UsageError
from ..patches.series import Series
from . import trees
from .trees import Git

COVER_FILE = "0000-cover-letter.patch"

_SIGNOFF = re.compile(r"^(?P<name>[^<>\n]*[^<>\s]) <(?P<mail>[^<>@\s]+@[^<>@\s]+)>$")
_QUICK_S = 120.0
_MAINTAINERS_S = 600.0


@dataclass(frozen=True)
class Person:
    """Who sends, or who gets the mails; a list has no ``name``."""

    name: str
    mail: str

    def __str__(self) -> str:
        return f"{self.name} <{self.mail}>" if self.name else self.mail

    def header(self) -> str:
        """As an address stands in a mail's header: quoted or encoded where it must be."""
        return email.utils.formataddr((self.name, self.mail), "utf-8")


def sender_of(signoff: str) -> Person:
    """The sender that "Name <mail>" means; raises UsageError where it is not a sign-off."""
    match = _SIGNOFF.match(signoff)
    if match is None:
        raise UsageError(f"'{signoff}' is not a sign-off", hint='write "Name <mail@example.org>"')
    return Person(match["name"], match["mail"])


# -- who gets them


@dataclass(frozen=True)
class Recipients:
    """``to`` are maintainers, ``cc`` reviewers and lists."""

    to: tuple[Person, ...] = ()
    cc: tuple[Person, ...] = ()

    def without(self, mail: str) -> Recipients:
        """The others: the sender knows what he sends."""
        return Recipients(
            tuple(one for one in self.to if one.mail != mail),
            tuple(one for one in self.cc if one.mail != mail),
        )


_WITH_ROLE = re.compile(r"^(?P<who>.*<[^<>]+>|[^\s<>]+@[^\s<>]+) \((?P<role>.*)\)$")
_MAINTAINERS = ("maintainer", "supporter", "odd fixer")


def parse_maintainers(output: str) -> Recipients:
    """Who ``get_maintainer.pl --roles`` names, of Linux or of QEMU.

    Maintainers (of whatever status) go to To:, all others to Cc:; where nobody maintains a
    file, the lists are in To:, since a mail must go to somebody.
    """
    to: dict[str, Person] = {}
    cc: dict[str, Person] = {}
    lists: dict[str, Person] = {}
    for line in output.splitlines():
        match = _WITH_ROLE.match(line.strip())
        if match is None:
            continue
        name, mail = email.utils.parseaddr(match["who"])
        role = match["role"]
        where = to if role.startswith(_MAINTAINERS) else cc
        where.setdefault(mail, Person(name, mail))
        if "list" in role.split(":")[0]:
            lists.setdefault(mail, Person(name, mail))
    if not to:
        to = lists
    return Recipients(tuple(to.values()), tuple(one for mail, one in cc.items() if mail not in to))


def ask_maintainers(sources: Path, patches: Sequence[Path]) -> Recipients | None:
    """Who ``sources``/scripts/get_maintainer.pl names for all patches; None where it is not there.

    git's history is not asked: the base may have none. Raises NearmetalError where the script
    fails.
    """
    script = sources / "scripts" / "get_maintainer.pl"
    if not script.is_file():
        return None
    done = proc.run(
        [
            *("perl", script, "--no-git", "--no-git-fallback", "--roles", "--no-rolestats"),
            *(path.resolve() for path in patches),
        ],
        deadline_s=_MAINTAINERS_S,
        cwd=sources,
        check=False,
        hint="install the package perl",
    )
    if done.status != 0:
        raise NearmetalError(
            f"{script} ended with status {done.status}",
            detail=proc.tail(done.stderr or done.stdout, 5),
            hint="leave To: and Cc: out with --no-maintainers",
        )
    return parse_maintainers(done.stdout)


# -- what they apply to


def base_commit(tree: Path, below: Sequence[Path], patches: Sequence[Path]) -> str:
    """The commit at HEAD of a user's git tree, which the patches apply to, on top of ``below``.

    Nothing is written to the tree or to its objects. Raises UsageError where a patch does not
    apply, without fuzz, to HEAD.
    """
    git = Git(tree)
    commit = git.text("rev-parse", "HEAD")
    objects = Path(git.text("rev-parse", "--path-format=absolute", "--git-path", "objects"))
    with tempfile.TemporaryDirectory(prefix="nearmetal-") as scratch:
        env = {
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": f"{scratch}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        (Path(scratch) / "objects").mkdir()
        git.run("read-tree", commit, env=env)
        for patch in (*below, *patches):
            words = ("apply", "--cached", "--whitespace=nowarn", patch.resolve())
            done = git.run(*words, env=env, check=False)
            if done.status != 0:
                raise UsageError(
                    f"{patch.name} does not apply to HEAD of {tree} ({commit[:12]})",
                    detail=proc.tail(done.stderr, 3),
                    hint="check out the commit that the series is for,"
                    " or see what conflicts: nearmetal validate --onto",
                )
    return commit


def patch_ids(patches: Sequence[Path]) -> tuple[str, ...]:
    """The ids that ``git patch-id --stable`` gives, by which readers find a patch they have."""
    found = []
    for patch in patches:
        # a patch need not be text, so git reads the file itself
        words: list[str | Path] = [
            "sh",
            "-c",
            'exec git patch-id --stable <"$1"',
            "sh",
            patch.resolve(),
        ]
        found.append(proc.run(words, deadline_s=_QUICK_S).stdout.split()[0])
    return tuple(found)


# -- changes since the last version

_HEADING = re.compile(r"(?i)^change(?:s|log)\b.*:\s*$")
_OF_PATCHES = re.compile(r"(?i)^[-*] patch(?:es)? (?P<numbers>\d[\d, -]*): *(?P<text>.*)$")


_BEHIND = re.compile(r"\n\n---\n|\n---\n(?=[Cc]hange)")


def split_changes(text: str) -> tuple[str, str]:
    """A cover letter's text, and what stands behind its line ``---``, as b4 keeps it.

    That line has a blank one before it (or changes below it): it underlines no title.
    """
    body, *rest = _BEHIND.split(f"{text.rstrip()}\n", maxsplit=1)
    return body.rstrip() + "\n", "".join(rest).strip()


def section_of(changes: str, revision: int) -> str:
    """The lines below "Changes in v2:" (or since v1, in words of that kind), or nothing."""
    wanted = re.compile(rf"(?i)\bin v{revision}\b|\b(?:since|from) v{revision - 1}\b")
    lines: list[str] = []
    inside = False
    for line in changes.splitlines():
        if _HEADING.match(line):
            inside = wanted.search(line) is not None
        elif inside:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def _numbers(words: str) -> set[int]:
    found: set[int] = set()
    for word in words.split(","):
        first, _, last = word.partition("-")
        if first.strip().isdigit():
            end = int(last) if last.strip().isdigit() else int(first)
            found |= set(range(int(first), end + 1))
    return found


def changes_of_patch(section: str, number: int) -> str:
    """The items of one patch: ``- patch 3: text``, with the indented lines that go on with it."""
    lines: list[str] = []
    mine = False
    for line in section.splitlines():
        if line[:1].isspace() and line.strip():
            if mine:
                lines.append(line)
            continue
        match = _OF_PATCHES.match(line)
        mine = match is not None and number in _numbers(match["numbers"])
        if match is not None and mine:
            lines.append(f"- {match['text']}")
    return "\n".join(lines)


# -- the mails


@dataclass(frozen=True)
class Mailing:
    """What the mails of one series say besides the patches.

    ``revision`` and ``prefixes`` are those of the subject ([PATCH RFC v2 3/7]); ``revision``
    None means b4's in cover.txt, which is 1 if it was never sent. ``changes`` replaces what
    cover.txt has behind ``---``. ``base`` is a commit; ``below`` are the patches that the
    series needs below it; ``date`` is the cover letter's.
    """

    sender: Person
    recipients: Recipients
    date: datetime
    revision: int | None = None
    prefixes: tuple[str, ...] = ()
    changes: str | None = None
    base: str | None = None
    below: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Letter:
    """A mailing and what cover.txt says."""

    mailing: Mailing
    title: str
    body: str
    changes: str
    revision: int
    prefixes: tuple[str, ...]
    change_id: str
    count: int

    def tag(self, number: int) -> str:
        version = [f"v{self.revision}"] if self.revision > 1 else []
        width = len(str(self.count))
        words = ["PATCH", *self.prefixes, *version, f"{number:0{width}}/{self.count}"]
        return f"[{' '.join(words)}]"


def subject_of(series: Series, mailing: Mailing) -> str:
    """The subject of the cover letter."""
    letter = _letter(series, mailing)
    return f"{letter.tag(0)} {letter.title}"


def _letter(series: Series, mailing: Mailing) -> _Letter:
    text, tracking = trees.split_cover(trees.cover_message(series))
    about = (tracking or trees.default_tracking(series.name))["series"]
    revision = mailing.revision or int(about.get("revision", 1))
    whole, changes = split_changes(text)
    if mailing.changes is not None:
        changes = mailing.changes.strip()
    if revision > 1 and not section_of(changes, revision):
        raise UsageError(
            f"the cover letter of {series.label} does not say what changed in v{revision}",
            hint=f"write 'Changes in v{revision}:' and a list below a line '---' at its end,"
            " or into a file that --changes names",
        )
    title, _, body = whole.partition("\n")
    prefixes = dict.fromkeys((*mailing.prefixes, *map(str, about.get("prefixes", []))))
    return _Letter(
        mailing,
        title,
        body.strip(),
        changes,
        revision,
        tuple(prefixes),
        str(about["change-id"]),
        len(series.patches()),
    )


def write(series: Series, mailing: Mailing, folder: Path) -> tuple[Path, ...]:
    """Write the mails of a series into ``folder``, which is empty; gives the files in order.

    Patches of the project (and no one else's) become the sender's; all get his Signed-off-by
    after their own trailers. Raises UsageError for a series without patches, a cover letter
    that does not say what a revision changed, a patch that was not exported from a tree.
    """
    patches = series.patches()
    if not patches:
        raise UsageError(f"{series.folder} holds no patches", hint="export its tree first")
    letter = _letter(series, mailing)
    git = Git(folder)
    files = [folder / COVER_FILE]
    authors: dict[str, list[str]] = {}
    for number, patch in enumerate(patches, 1):
        head = _head_of(git, patch)
        ours = head.get("Email") == trees.ADDRESS
        author = mailing.sender.name if ours else head.get("Author", "")
        subject = re.sub(r"^\[PATCH\] ", "", head.get("Subject", ""))
        authors.setdefault(author, []).append(subject)
        copy = folder / patch.name
        copy.write_bytes(_patch_mail(patch, letter, number, ours=ours))
        _sign(git, copy, mailing.sender)
        files.append(copy)
    files[0].write_text(_cover_mail(git, letter, authors, patches), encoding="utf-8")
    return tuple(files)


def _head_of(git: Git, patch: Path) -> Mapping[str, str]:
    with tempfile.TemporaryDirectory(prefix="nearmetal-") as scratch:
        return trees.mail_head(git, patch, Path(scratch))


def _sign(git: Git, patch: Path, sender: Person) -> None:
    git.run(
        "interpret-trailers",
        "--in-place",
        "--where=end",
        "--if-exists=addIfDifferent",
        f"--trailer=Signed-off-by: {sender}",
        patch.name,
    )


def _mime() -> list[str]:
    return [
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=UTF-8",
        "Content-Transfer-Encoding: 8bit",
    ]


def _addressed(recipients: Recipients) -> list[str]:
    """The lines To: and Cc: of a mail's header, an address on each line."""
    lines = []
    for name, people in (("To", recipients.to), ("Cc", recipients.cc)):
        if people:
            lines.append(f"{name}: " + ",\n    ".join(one.header() for one in people))
    return lines


def _patch_mail(patch: Path, letter: _Letter, number: int, *, ours: bool) -> bytes:
    head, _, rest = patch.read_bytes().partition(b"\n\n")
    lines: list[bytes] = []
    numbered = False
    for line in re.split(rb"\n(?![ \t])", head):
        if ours and line.startswith(b"From: "):
            lines.append(f"From: {letter.mailing.sender.header()}".encode())
        elif line.startswith(b"Subject: [PATCH]"):
            numbered = True
            lines.append(line.replace(b"[PATCH]", letter.tag(number).encode(), 1))
            lines += [one.encode() for one in _addressed(letter.mailing.recipients)]
        else:
            lines.append(line)
    if not numbered:
        raise UsageError(
            f"{patch} has no subject that begins with [PATCH]", hint="export it from its tree"
        )
    changes = changes_of_patch(section_of(letter.changes, letter.revision), number)
    if changes:
        below = f"---\nChanges in v{letter.revision}:\n{changes}\n\n".encode()
        rest = re.sub(rb"(?m)^---\n", lambda _: below, rest, count=1)
    sender = str(letter.mailing.sender)
    plain = rest.isascii() and sender.isascii()
    if not plain and not re.search(rb"(?im)^Content-Type:", head):
        lines += [one.encode() for one in _mime()]
    return b"\n".join(lines) + b"\n\n" + rest


def _cover_mail(
    git: Git, letter: _Letter, authors: Mapping[str, list[str]], patches: Sequence[Path]
) -> str:
    mailing = letter.mailing
    subject = Header(
        f"{letter.tag(0)} {letter.title}", header_name="Subject", maxlinelen=998
    ).encode()
    head = [
        "From " + "0" * 40 + " Mon Sep 17 00:00:00 2001",
        f"From: {mailing.sender.header()}",
        f"Date: {email.utils.format_datetime(mailing.date)}",
        f"Subject: {subject}",
        *_addressed(mailing.recipients),
    ]
    base = [f"base-commit: {mailing.base}"] if mailing.base else []
    base.append(f"change-id: {letter.change_id}")
    base += [f"prerequisite-patch-id: {one}" for one in patch_ids(mailing.below)]
    content = [
        *([letter.body, ""] if letter.body else []),
        f"Signed-off-by: {mailing.sender}",
        "",
        *(["---", letter.changes, ""] if letter.changes else []),
        "---",
        *_shortlog(authors),
        *_diffstat(git, patches),
        "---",
        *base,
        "",
        "-- ",
        f"nearmetal {__version__}",
        "",
    ]
    text = "\n".join(content)
    if not text.isascii():
        head += _mime()
    return "\n".join([*head, "", text])


def _shortlog(authors: Mapping[str, list[str]]) -> list[str]:
    """The subjects by author, as git shortlog prints them."""
    lines: list[str] = []
    for author in sorted(authors):
        lines.append(f"{author} ({len(authors[author])}):")
        lines += [f"  {subject}" for subject in authors[author]]
        lines.append("")
    return lines


def _diffstat(git: Git, patches: Sequence[Path]) -> list[str]:
    """The lines that a series adds and removes, by file."""
    counts: dict[str, tuple[int, int]] = {}
    for patch in patches:
        for line in git.text("apply", "--numstat", patch.resolve()).splitlines():
            added, removed, name = line.split("\t", 2)
            before = counts.get(name, (0, 0))
            counts[name] = (
                before[0] + (int(added) if added.isdigit() else 0),
                before[1] + (int(removed) if removed.isdigit() else 0),
            )
    if not counts:
        return []
    width = max(len(name) for name in counts)
    lines = [
        f" {name:{width}} | {sum(counts[name]):4} {_bar(*counts[name])}".rstrip()
        for name in sorted(counts)
    ]
    plus, minus = (sum(count[side] for count in counts.values()) for side in (0, 1))
    lines.append(
        f" {_count(len(counts), 'file')} changed, {_count(plus, 'insertion')}(+),"
        f" {_count(minus, 'deletion')}(-)"
    )
    return [*lines, ""]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bar(added: int, removed: int, width: int = 20) -> str:
    total = added + removed
    if total > width:
        added, removed = -(-added * width // total), removed * width // total
    return "+" * added + "-" * removed
