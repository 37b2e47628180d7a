# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches as git commits: a work tree from patches/, and patches/ from a work tree.

A tree is one commit of the unpatched sources, then for each series an empty commit that holds
its cover letter (as ``b4 prep`` keeps it with the strategy ``commit``) and its patches.
Nothing else marks where a series begins, so commits may be reworded, moved and rebased
freely: a commit belongs to the nearest cover letter before it. The name of a series is in
the change-id of its cover letter (``<date>-<name>-<hex>``).

Two promises hold: the same base and patches give the same commits, whoever applies them,
and a tree that nobody changed gives back the same bytes. So nothing here looks at the
user's git configuration, identity or clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core import proc, ui
from ..core.cache import remove
from ..core.errors import EnvironmentBroken, Exit, NearmetalError, UsageError
from ..patches.series import TREES, Series, TreeName, of_tree, patch_files, series_folder

DEVELOPERS = "nearmetal developers"
ADDRESS = "nearmetal@localhost"
EPOCH = "2026-01-01T00:00:00+0000"
"""The date of everything that has none of its own: base commits, empty series."""

BRANCH = "nearmetal"
BASE_TAG = "nearmetal-base"

COVER_MARKER = "--- b4-submit-tracking ---"
"""The line by which b4 knows a cover letter's commit; JSON follows it."""

_MARKER_COMMENT = "# This section is used internally by b4 prep for tracking purposes."
_CHANGE_ID = re.compile(r"^[0-9]{8}-(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)-[0-9a-f]+$")
_NAME = re.compile(r"^[a-z0-9]+(?:-[a-z0-9]+)*$")
_PATCH_NAME = re.compile(r"^[0-9]{4}-.*\.patch$")

_DEBIAN_IGNORE = re.compile(r"(?m)^/\*\n(?=!/debian/$)")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

_QUICK_S = 120.0
_LONG_S = 3600.0

# git's own pattern for C, written down: it differs between versions of git, and the
# function's name behind @@ is part of a patch's bytes.
_C_FUNCTION = (
    "!^[ \t]*[A-Za-z_][A-Za-z_0-9]*:[[:space:]]*($|/[/*])\n^((::[[:space:]]*)?[A-Za-z_].*)$"
)

_CONFIG: Mapping[str, str] = {
    "advice.detachedHead": "false",
    "commit.gpgSign": "false",
    "core.attributesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.excludesFile": "/dev/null",
    "core.fileMode": "true",
    "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null",
    "core.pager": "cat",
    "core.quotePath": "true",
    "diff.cpp.xfuncname": _C_FUNCTION,
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "init.defaultBranch": BRANCH,
    "log.mailmap": "false",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "notes.displayRef": "refs/notes/none",
    "rerere.enabled": "false",
    "safe.directory": "*",
}
"""What git is told instead of the user's configuration, above a repository's own."""

_ENVIRONMENT: Mapping[str, str] = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": DEVELOPERS,
    "GIT_AUTHOR_EMAIL": ADDRESS,
    "GIT_COMMITTER_NAME": DEVELOPERS,
    "GIT_COMMITTER_EMAIL": ADDRESS,
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}

_FORMAT = (
    "--zero-commit",
    "--full-index",
    "--no-signature",
    "--no-numbered",
    "--subject-prefix=PATCH",
    "--suffix=.patch",
    "--filename-max-length=64",
    "--start-number=1",
    "--no-cover-letter",
    "--no-thread",
    "--no-attach",
    "--no-base",
    "--no-from",
    "--no-notes",
    "--no-to",
    "--no-cc",
    "--no-add-header",
    "--no-signoff",
    "--encode-email-headers",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-relative",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--unified=3",
    "--inter-hunk-context=0",
    "--find-renames=50%",
    "-l1000",
    "-O/dev/null",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--stat=72",
    "--summary",
    "--patch",
)

_APPLY = (
    "--no-3way",
    "--keep-cr",
    "--keep-non-patch",
    "--no-scissors",
    "--no-signoff",
    "--no-message-id",
    "--no-gpg-sign",
    "--no-rerere-autoupdate",
    "--committer-date-is-author-date",
    "--quoted-cr=nowarn",
    "--whitespace=nowarn",
    "--empty=stop",
    "--patch-format=mbox",
)

_IN_PROGRESS: Mapping[str, str] = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase or git am",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "BISECT_LOG": "bisect",
}


@dataclass(frozen=True)
class Checkout:
    """A work tree that was made: its folder, the commits of base and tip, the series in it."""

    tree: TreeName
    folder: Path
    base: str
    head: str
    series: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """A series that was written back, whether anything in it changed, and its patch count."""

    name: str
    folder: Path
    patches: int
    changed: bool


PartState = Literal["exported", "new", "differs", "broken", "gone"]


@dataclass(frozen=True)
class PartStatus:
    """A series of a tree beside patches/; ``text`` says in words what ``state`` does in one.

    ``broken`` cannot be exported; ``gone`` was checked out and is no longer in the tree.
    """

    name: str
    patches: int
    state: PartState
    text: str


@dataclass(frozen=True)
class Status:
    """What an export of a tree would meet; ``dirty`` counts files that are not committed.

    ``in_progress`` is what git is in the middle of. With an ``error`` the commits are no stack of
    series: nothing can be exported, and ``series`` is empty.
    """

    tree: TreeName
    version: str
    folder: str
    base: str
    in_progress: str | None
    dirty: int
    error: str | None
    series: tuple[PartStatus, ...]


class DoesNotApply(NearmetalError):
    """A patch does not apply; ``patch`` is its file and ``output`` what git said."""

    status = Exit.FAILED

    def __init__(self, patch: Path, onto: str, output: str) -> None:
        super().__init__(
            f"{patch} does not apply to {onto}",
            hint="rebase the series onto this base in a tree of a base that it applies to",
            detail=proc.tail(output, 8),
        )
        self.patch = patch
        self.output = output


@dataclass(frozen=True)
class Git:
    """git in one folder, deaf to the user's configuration and environment."""

    folder: Path

    def run(
        self,
        *words: str | Path,
        deadline_s: float = _QUICK_S,
        env: Mapping[str, str] | None = None,
        input_text: str | None = None,
        check: bool = True,
    ) -> proc.Completed:
        """Run a git command; raises EnvironmentBroken with git's words where it fails."""
        if shutil.which("git") is None:
            raise UsageError("the program 'git' is not installed", hint="install the package git")
        settings = [word for key, value in _CONFIG.items() for word in ("-c", f"{key}={value}")]
        environment = {**_ENVIRONMENT, **(env or {})}
        done = proc.run(
            [*_without_git_environment(environment), "git", *settings, *words],
            deadline_s=deadline_s,
            cwd=self.folder,
            env=environment,
            input_text=input_text,
            check=False,
        )
        if check and done.status != 0:
            raise EnvironmentBroken(
                f"git {words[0]} failed in {self.folder}",
                detail=proc.tail(done.stderr or done.stdout),
            )
        return done

    def text(self, *words: str | Path) -> str:
        """What a git command prints, without the last newline."""
        return self.run(*words).stdout.rstrip("\n")

    def ask(self, *words: str | Path) -> str | None:
        """What a git command prints, or None where it fails."""
        done = self.run(*words, check=False)
        return done.stdout.rstrip("\n") if done.status == 0 else None


def _without_git_environment(keep: Mapping[str, str] = _ENVIRONMENT) -> list[str]:
    """The prefix that drops every other GIT_ variable (a hook's GIT_DIR, GIT_DIFF_OPTS)."""
    names = sorted(name for name in os.environ if name.startswith("GIT_") and name not in keep)
    return ["env", *(word for name in names for word in ("-u", name))]


def default_folder(repo: Path, tree: TreeName) -> Path:
    """Where a tree lies unless the user says otherwise: trees/<tree> in the repository."""
    return repo / "trees" / tree


def trees_of(word: str) -> tuple[TreeName, ...]:
    """The trees that a word of the command line means (``testbed``: one for each emulator).

    Raises UsageError for any other word.
    """
    if word == "testbed":
        return tuple(tree for tree in TREES if tree.startswith("testbed-"))
    for tree in TREES:
        if tree == word:
            return (tree,)
    raise UsageError(f"there is no tree '{word}'", hint=f"known: testbed, {', '.join(TREES)}")


# -- base commits


def make_base_repository(sources: Path, tree: TreeName, version: str, folder: Path) -> str:
    """Make a bare repository with one commit, the pristine ``sources``; gives that commit.

    Minutes for Linux: keep it in the cache, trees are cloned from it by hard links. The
    commit's hash depends on the files, ``tree`` and ``version`` alone. The one difference to
    the sources are lines of Debian's packaging in .gitignore. ``folder`` may exist and be
    empty. Raises UsageError where ``sources`` is no folder.
    """
    if not sources.is_dir():
        raise UsageError(f"{sources} is not a folder with sources", hint="unpack the sources first")
    folder.mkdir(parents=True, exist_ok=True)
    git = Git(folder)
    git.run("init", "--quiet", "--bare", "--template=", ".")
    commit = _commit_sources(git, sources, tree, version)
    git.run("update-ref", f"refs/heads/{BRANCH}", commit)
    git.run("symbolic-ref", "HEAD", f"refs/heads/{BRANCH}")
    (folder / "index").unlink(missing_ok=True)
    return commit


def _commit_sources(git: Git, sources: Path, tree: TreeName, version: str) -> str:
    # bigFileThreshold=1 streams all blobs into one pack instead of 90000 loose files.
    options = {"core.bare": "false", "core.compression": "1", "core.bigFileThreshold": "1"}
    git.run(
        *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
        f"--git-dir={git.folder.resolve()}",
        f"--work-tree={sources.resolve()}",
        "add",
        "--all",
        "--force",
        ".",
        deadline_s=_LONG_S,
    )
    _unhide(git, sources)
    contents = git.run("write-tree", deadline_s=_LONG_S).stdout.strip()
    return git.run(
        "commit-tree",
        contents,
        env=_dates(EPOCH),
        input_text=f"{tree} {version}, pristine\n",
    ).stdout.strip()


def _unhide(git: Git, sources: Path) -> None:
    """Take Debian's packaging lines out of the base's .gitignore.

    They ignore every file of the tree, so that a file which a patch adds would be missing
    from ``git add`` and from the export without a word.
    """
    path = sources / ".gitignore"
    if not path.is_file() or path.is_symlink():
        return
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    cleaned = _DEBIAN_IGNORE.sub("", text)
    if cleaned == text:
        return
    blob = git.run("hash-object", "-w", "--stdin", input_text=cleaned).stdout.strip()
    git.run("update-index", "--cacheinfo", f"100644,{blob},.gitignore")


def _dates(date: str) -> dict[str, str]:
    return {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}


def clone_base(repository: Path, folder: Path) -> str:
    """Make a work tree of a base repository in ``folder``; gives the base commit.

    Objects are hard links or copies: the tree stays whole when the cache is pruned.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    Git(folder.parent).run(
        "clone",
        "--quiet",
        "--local",
        "--no-checkout",
        "--template=",
        repository.resolve(),
        folder.resolve(),
        deadline_s=_LONG_S,
    )
    git = Git(folder)
    git.run("remote", "remove", "origin")
    git.run("reset", "--quiet", "--hard", "HEAD", deadline_s=_LONG_S)
    git.run("tag", BASE_TAG, "HEAD")
    return git.text("rev-parse", "HEAD")


# -- applying


def apply_patches(git: Git, patches: Sequence[Path], onto: str) -> None:
    """``git am`` of the patches in order, without fuzz; ``onto`` names the base in errors.

    Raises DoesNotApply and leaves the tree as it was.
    """
    if not patches:
        return
    done = git.run(
        "am",
        *_APPLY,
        *(path.resolve() for path in patches),
        deadline_s=_LONG_S,
        check=False,
    )
    if done.status == 0:
        return
    counter = git.folder / ".git" / "rebase-apply" / "next"
    number = int(counter.read_text()) if counter.is_file() else 1
    git.run("am", "--abort", check=False)
    raise DoesNotApply(patches[min(number, len(patches)) - 1], onto, done.stdout + done.stderr)


def apply_series(git: Git, series: Series, onto: str) -> None:
    """The cover letter's commit and then the patches of a series.

    Raises UsageError where the series has no cover letter or no folder, DoesNotApply.
    """
    patches = series.patches()
    message = cover_message(series)
    date = _author_date(git, patches[0]) if patches else EPOCH
    _commit_cover(git, message, f"cover letter of {series.name}", _dates(date))
    apply_patches(git, patches, onto)


def _commit_cover(git: Git, message: str, reason: str, env: Mapping[str, str]) -> str:
    """An empty commit on top; touches neither the index nor the files."""
    commit = git.run(
        "commit-tree", "HEAD^{tree}", "-p", "HEAD", env=env, input_text=message
    ).stdout.strip()
    git.run("update-ref", "-m", reason, "HEAD", commit)
    return commit


def _author_date(git: Git, patch: Path) -> str:
    """The Date header of a patch."""
    for line in patch.read_bytes().split(b"\n\n", 1)[0].splitlines():
        if line.startswith(b"Date: "):
            return line[6:].decode("ascii", "replace").strip()
    raise UsageError(f"{patch} has no Date header", hint="export it again from its tree")


def default_tracking(name: str) -> dict[str, Any]:
    """What b4 keeps about a series that was never sent; the same for the same name."""
    unique = hashlib.sha256(name.encode()).hexdigest()[:12]
    return {
        "series": {
            "revision": 1,
            "change-id": f"{EPOCH[:10].replace('-', '')}-{name}-{unique}",
            "prefixes": [],
        }
    }


def split_cover(message: str) -> tuple[str, dict[str, Any] | None]:
    """A cover letter's text, and b4's tracking where the message has that section.

    Raises UsageError where the section is not the JSON that b4 writes.
    """
    head, marker, rest = message.partition(COVER_MARKER)
    text = head.rstrip() + "\n"
    if not marker:
        return text, None
    try:
        tracking = json.loads(rest[rest.index("{") :])
        tracking["series"]["change-id"].split("-")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"the cover letter '{text.splitlines()[0]}' has a broken tracking section",
            hint=f"correct what follows '{COVER_MARKER}'",
        ) from None
    return text, tracking


def cover_name(tracking: Mapping[str, Any]) -> str:
    """The name of the series in its change-id; raises UsageError where there is none."""
    change_id = str(tracking["series"]["change-id"])
    match = _CHANGE_ID.match(change_id)
    if match is None:
        raise UsageError(
            f"the change-id '{change_id}' of a cover letter does not name a series",
            hint="write <yyyymmdd>-<series>-<hex>",
        )
    return match["name"]


def _join_cover(text: str, tracking: Mapping[str, Any]) -> str:
    section = json.dumps(tracking, indent=2)
    return f"{text.rstrip()}\n\n{COVER_MARKER}\n{_MARKER_COMMENT}\n{section}\n"


def cover_message(series: Series) -> str:
    """The message of the commit of a cover letter; raises UsageError where there is none."""
    try:
        written = series.cover.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"the series {series.name} has no {series.cover}", hint="write its cover letter"
        ) from None
    text, tracking = split_cover(written)
    if not text.strip():
        raise UsageError(f"{series.cover} is empty", hint="write the cover letter")
    if tracking is None:
        tracking = default_tracking(series.name)
    elif cover_name(tracking) != series.name:
        raise UsageError(
            f"{series.cover} belongs to the series {cover_name(tracking)}",
            hint=f"its change-id must hold {series.name}",
        )
    return _join_cover(text, tracking)


def _cover_text(name: str, message: str) -> str:
    """cover.txt of a cover commit: b4's section stays only where it says something."""
    text, tracking = split_cover(message)
    if tracking is None or tracking == default_tracking(name):
        return text
    return _join_cover(text, tracking)


# -- the commands


def tree_checkout(
    tree: TreeName,
    sources: Path,
    version: str,
    series: Sequence[Series],
    target: Path,
    *,
    base_repository: Path | None = None,
) -> Checkout:
    """Make a work tree in ``target``: the base, then every series of that tree in order.

    ``sources`` are the unpacked pristine sources of ``version``; ``base_repository``, made
    by make_base_repository, saves reading them. A tree without changes since its checkout or
    export is replaced. Raises UsageError where ``target`` holds anything else, DoesNotApply.
    """
    chosen = of_tree(series, tree)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with beside(target) as work:
        if base_repository is None:
            base_repository = work / "base.git"
            with ui.step(f"commit {tree} {version}"):
                make_base_repository(sources, tree, version, base_repository)
        fresh = work / "tree"
        with ui.step(f"check out {tree} {version}") as step:
            base = clone_base(base_repository, fresh)
            git = Git(fresh)
            for one in chosen:
                step.status = f"applies {one.name}"
                apply_series(git, one, f"{tree} {version}")
        head = git.text("rev-parse", "HEAD")
        git.run("config", "core.autocrlf", "false")
        git.run("config", "am.keepcr", "true")
        for key, value in (("tree", tree), ("version", version), ("exported", head)):
            git.run("config", f"nearmetal.{key}", value)
        for one in chosen:
            git.run("config", "--add", "nearmetal.series", one.name)
        _swap(fresh, target)
    return Checkout(tree, target, base, head, tuple(one.name for one in chosen))


def tree_status(folder: Path, patches: Path) -> str:
    """What a tree holds and where it differs from ``patches``, for a reader.

    Raises UsageError where ``folder`` is not one of our trees.
    """
    found = status_of(folder, patches)
    lines = [f"{found.tree} {found.version} in {found.folder}, base {found.base}"]
    if found.in_progress is not None:
        lines.append(f"  in the middle of a {found.in_progress}")
    if found.dirty:
        lines.append(f"  {found.dirty} files with changes that are not committed")
    if found.error is not None:
        return "\n".join([*lines, f"  cannot be exported: {found.error}"])
    if all(part.state == "gone" for part in found.series):
        lines.append("  no series")
    for part in found.series:
        if part.state == "gone":
            lines.append(f"  {part.name}: gone")
        else:
            count = f"{part.patches} patch{'es' if part.patches != 1 else ''}"
            lines.append(f"  {part.name}: {count}, {part.text}")
    return "\n".join(lines)


def status_of(folder: Path, patches: Path) -> Status:
    """What a tree holds and where it differs from ``patches``.

    Raises UsageError where ``folder`` is not one of our trees.
    """
    git = _open(folder)
    tree = _tree_of(git)
    error: str | None = None
    series: list[PartStatus] = []
    try:
        parts = _split(git)
    except UsageError as caught:
        error = caught.message
    else:
        with tempfile.TemporaryDirectory(prefix="nearmetal-") as scratch:
            for part in parts:
                final = series_folder(patches, tree, part.name)
                state, text = _compare(git, part, Path(scratch), final)
                series.append(PartStatus(part.name, len(part.commits), state, text))
        names = {part.name for part in parts}
        series += [
            PartStatus(name, 0, "gone", "gone") for name in _checked_out(git) if name not in names
        ]
    return Status(
        tree,
        git.text("config", "nearmetal.version"),
        str(folder),
        git.text("rev-parse", "--short", BASE_TAG),
        _in_progress(git),
        len(_dirty(git)),
        error,
        tuple(series),
    )


def tree_export(folder: Path, patches: Path, series: Sequence[Series]) -> tuple[Exported, ...]:
    """Write every series of a tree back to ``patches``; an unchanged one keeps its bytes.

    ``series`` are those of series.yaml: their order must be the tree's. All or nothing is
    written: everything is made and proved to survive ``git am`` first. Files of a series'
    folder that are neither cover.txt nor patches stay. Raises UsageError for a tree that is
    dirty or in the middle of a rebase, a series without a cover letter, a commit that
    ``git am`` would not give back.
    """
    git = _open(folder)
    tree = _tree_of(git)
    if what := _in_progress(git):
        raise UsageError(
            f"{folder} is in the middle of a {what}",
            hint="finish it ('git rebase --continue') or abort it, then export",
        )
    if dirty := _dirty(git):
        raise UsageError(
            f"{folder} has changes that are not committed ({dirty[0]})",
            hint="commit or remove them ('git status' lists them), then export",
        )
    parts = _split(git)
    names = [part.name for part in parts]
    for name in _checked_out(git):
        if name not in names:
            raise UsageError(
                f"the series {name} was checked out and is no longer in {folder}",
                hint="bring its cover letter back, or drop it on purpose:"
                f" git config --unset nearmetal.series '^{name}$'",
            )
    ordered = [one.name for one in of_tree(series, tree) if one.name in names]
    if ordered != [name for name in names if name in ordered]:
        raise UsageError(
            f"{folder} has the series in the order {', '.join(names)},"
            f" series.yaml in the order {', '.join(ordered)}",
            hint="make them agree",
        )
    _check_required(parts, of_tree(series, tree), folder)
    patches.mkdir(parents=True, exist_ok=True)
    exported: list[Exported] = []
    with beside(patches / "export") as work, ui.step(f"export {tree}"):
        for part in parts:
            _render(git, part, work / part.name)
        for part in parts:
            final = series_folder(patches, tree, part.name)
            fresh = work / part.name
            changed = not _same(fresh, final)
            if changed:
                _keep_others(final, fresh)
                final.parent.mkdir(parents=True, exist_ok=True)
                _swap(fresh, final)
            exported.append(Exported(part.name, final, len(part.commits), changed))
    git.run("config", "nearmetal.exported", git.text("rev-parse", "HEAD"))
    git.run("config", "--unset-all", "nearmetal.series", check=False)
    for name in names:
        git.run("config", "--add", "nearmetal.series", name)
    for name in names:
        if name not in ordered:
            ui.warn(f"{name} has no entry in series.yaml: without one it is never applied")
    return tuple(exported)


def _check_required(parts: Sequence[_Part], series: Sequence[Series], folder: Path) -> None:
    """Refuse a tree in which a series has fewer patches than another one requires of it."""
    counts = {part.name: len(part.commits) for part in parts}
    for one in series:
        for name, wanted in one.requires.items():
            least = 1 if wanted == "all" else wanted
            if one.name in counts and counts.get(name, 0) < least:
                raise UsageError(
                    f"{one.name} requires the first {least} patches of {name},"
                    f" and {folder} has {counts.get(name, 0)}",
                    hint="bring the patches back, or change requires: in series.yaml",
                )


def tree_new_series(folder: Path, name: str, title: str) -> str:
    """Begin a series at the tip of a tree: a cover letter's commit; gives that commit.

    ``title`` becomes the cover letter's subject; ``git commit --amend`` or ``b4 prep
    --edit-cover`` writes the rest. Raises UsageError for a name that is none or is taken.
    """
    if not _NAME.match(name):
        raise UsageError(
            f"'{name}' is not a valid name for a series",
            hint="use lowercase letters, digits and single dashes",
        )
    if not title.strip():
        raise UsageError("a series needs a title", hint="say in one line what it does")
    git = _open(folder)
    if what := _in_progress(git):
        raise UsageError(
            f"{folder} is in the middle of a {what}", hint="finish or abort it, then go on"
        )
    if name in [part.name for part in _split(git)]:
        raise UsageError(f"{folder} has a series {name} already", hint="choose another name")
    message = _join_cover(" ".join(title.split()), default_tracking(name))
    return _commit_cover(git, message, f"cover letter of {name}", _dates(EPOCH))


# -- what a tree holds


@dataclass(frozen=True)
class _Commit:
    """A commit as git log tells it; ``date`` as in a mail's header."""

    hash: str
    parents: tuple[str, ...]
    contents: str
    author: str
    mail: str
    date: str
    message: str

    @property
    def subject(self) -> str:
        return self.message.split("\n", 1)[0]


@dataclass(frozen=True)
class _Part:
    """A series in a tree: the commit of its cover letter and those of its patches."""

    name: str
    cover: _Commit
    commits: tuple[_Commit, ...]


def _open(folder: Path) -> Git:
    if not folder.exists():
        raise UsageError(
            f"there is no work tree in {folder}", hint="make one: nearmetal tree checkout TREE"
        )
    git = Git(folder)
    if not (folder / ".git").is_dir() or git.ask("config", "nearmetal.tree") is None:
        raise UsageError(
            f"{folder} is not a tree made by nearmetal", hint="make one: nearmetal tree checkout"
        )
    if git.ask("rev-parse", "--verify", "--quiet", f"{BASE_TAG}^{{commit}}") is None:
        raise UsageError(
            f"{folder} lacks the tag {BASE_TAG}",
            hint=f"set it to the commit of the unpatched sources: git tag {BASE_TAG} COMMIT",
        )
    return git


def _tree_of(git: Git) -> TreeName:
    return trees_of(git.text("config", "nearmetal.tree"))[0]


def _checked_out(git: Git) -> list[str]:
    return (git.ask("config", "--get-all", "nearmetal.series") or "").split()


def _in_progress(git: Git) -> str | None:
    for name, what in _IN_PROGRESS.items():
        if (git.folder / ".git" / name).exists():
            return what
    return None


def _dirty(git: Git) -> list[str]:
    status = git.run("status", "--porcelain", "--untracked-files=normal", deadline_s=_LONG_S).stdout
    return [line[3:] for line in status.splitlines()]


def _split(git: Git) -> list[_Part]:
    """The series of a tree in order; raises UsageError where it is not a plain stack of them."""
    if git.ask("merge-base", "--is-ancestor", BASE_TAG, "HEAD") is None:
        raise UsageError(
            f"{git.folder}: the tag {BASE_TAG} is not an ancestor of HEAD",
            hint=f"after a rebase onto another base: git tag -f {BASE_TAG} COMMIT",
        )
    parts: list[_Part] = []
    contents = git.text("rev-parse", f"{BASE_TAG}^{{tree}}")
    for commit in _commits(git):
        short = f"{commit.hash[:12]} ('{commit.subject}')"
        if len(commit.parents) != 1:
            raise UsageError(f"the commit {short} is a merge", hint="rebase instead of merging")
        empty = commit.contents == contents
        contents = commit.contents
        if f"\n{COVER_MARKER}\n" in f"\n{commit.message}\n":
            if not empty:
                raise UsageError(
                    f"the cover letter {short} carries changes",
                    hint="split them off with 'git rebase -i': a cover letter is an empty commit",
                )
            name = cover_name(split_cover(commit.message)[1] or {})
            if name in [part.name for part in parts]:
                raise UsageError(
                    f"two cover letters name the series {name}", hint="drop or rename one"
                )
            parts.append(_Part(name, commit, ()))
            continue
        if not parts:
            raise UsageError(
                f"the commit {short} belongs to no series: there is no cover letter before it",
                hint="begin one with 'nearmetal tree new-series', 'git rebase -i' it to the front",
            )
        if empty:
            raise UsageError(
                f"the commit {short} is empty", hint="drop it; every patch must change something"
            )
        last = parts[-1]
        parts[-1] = _Part(last.name, last.cover, (*last.commits, commit))
    return parts


def _commits(git: Git) -> list[_Commit]:
    """The commits after the base, oldest first."""
    log = git.text(
        "log",
        "--reverse",
        "--topo-order",
        "--no-color",
        "--no-decorate",
        "--no-notes",
        "--format=%H%x1f%P%x1f%T%x1f%an%x1f%ae%x1f%aD%x1f%B%x1e",
        f"{BASE_TAG}..HEAD",
    )
    found = []
    for record in log.split("\x1e"):
        if not record.strip():
            continue
        commit, parents, contents, author, mail, date, message = record.lstrip("\n").split(
            "\x1f", 6
        )
        found.append(
            _Commit(
                commit, tuple(parents.split()), contents, author, mail, date, message.rstrip("\n")
            )
        )
    return found


def _render(git: Git, part: _Part, folder: Path) -> None:
    """Write a series as patches/ keeps it; raises UsageError where ``git am`` would alter it."""
    folder.mkdir(parents=True)
    text = _cover_text(part.name, part.cover.message)
    (folder / "cover.txt").write_text(text, encoding="utf-8")
    tip = part.commits[-1] if part.commits else part.cover
    git.run(
        "format-patch",
        *_FORMAT,
        f"--output-directory={folder.resolve()}",
        f"{part.cover.hash}..{tip.hash}",
        deadline_s=_LONG_S,
    )
    files = patch_files(folder)
    if len(files) != len(part.commits):
        raise EnvironmentBroken(
            f"git format-patch wrote {len(files)} patches for {len(part.commits)} commits"
        )
    for commit, path in zip(part.commits, files, strict=True):
        _check_survives(git, commit, path)


def _check_survives(git: Git, commit: _Commit, path: Path) -> None:
    """Whether ``git am`` gives back a commit's author and message; raises UsageError if not."""
    with tempfile.TemporaryDirectory(prefix="nearmetal-") as scratch:
        head = mail_head(git, path, Path(scratch))
        count = len(list(Path(scratch).glob("[0-9]*")))
        body = (Path(scratch) / "message").read_text(encoding="utf-8", errors="replace")
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.splitlines()))
    given = f"{head.get('Subject', '')}\n\n{body.strip()}".strip()
    author = (head.get("Author"), head.get("Email"), head.get("Date"))
    same_author = author == (commit.author, commit.mail, commit.date)
    if count == 1 and given == commit.message and same_author:
        return
    line = _first_difference(commit.message, given)
    raise UsageError(
        f"the message of {commit.hash[:12]} would be changed by 'git am' (at: '{line}')",
        hint="reword it with 'git rebase -i': one-line subject, no '---', 'diff' or 'From' line",
    )


def mail_head(git: Git, patch: Path, scratch: Path) -> dict[str, str]:
    """What ``git am`` reads from a patch's head; the message goes to ``scratch``/message."""
    # git mailinfo reads standard input only, and a patch need not be text.
    done = proc.run(
        [
            *_without_git_environment(),
            "sh",
            "-c",
            'git mailsplit --keep-cr -o"$1" "$2" >/dev/null && exec git mailinfo -b'
            ' --encoding=UTF-8 --no-scissors "$1/message" /dev/null <"$1/0001"',
            "sh",
            scratch,
            patch.resolve(),
        ],
        deadline_s=_QUICK_S,
        cwd=git.folder,
        env=_ENVIRONMENT,
    )
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def _first_difference(wanted: str, given: str) -> str:
    ours = wanted.splitlines()
    theirs = given.splitlines()
    for number, line in enumerate(ours):
        if number >= len(theirs) or theirs[number] != line:
            return line
    return ours[-1] if ours else ""


def _compare(git: Git, part: _Part, scratch: Path, final: Path) -> tuple[PartState, str]:
    try:
        _render(git, part, scratch / part.name)
    except UsageError as error:
        return "broken", f"cannot be exported: {error.message}"
    if not final.is_dir():
        return "new", "new, not exported yet"
    if _same(scratch / part.name, final):
        return "exported", "as exported"
    return "differs", f"differs from {final}"


def _ours(path: Path) -> bool:
    return path.name == "cover.txt" or _PATCH_NAME.match(path.name) is not None


def _same(fresh: Path, final: Path) -> bool:
    if not final.is_dir():
        return False
    names = {path.name for path in fresh.iterdir()}
    if names != {path.name for path in final.iterdir() if _ours(path)}:
        return False
    return all(filecmp.cmp(fresh / name, final / name, shallow=False) for name in names)


def _keep_others(final: Path, fresh: Path) -> None:
    if not final.is_dir():
        return
    for path in final.iterdir():
        if _ours(path):
            continue
        if path.is_dir():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name)


# -- folders that appear whole


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A scratch folder on the same file system as ``target``, removed in the end.

    What a killed process left behind is removed by the next one.
    """
    prefix = f".{target.name}."
    for left in target.parent.glob(f"{prefix}[0-9]*.*"):
        owner = left.name.removeprefix(prefix).split(".")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            remove(left)
    work = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}.", dir=target.parent))
    work.chmod(0o755)
    try:
        yield work
    finally:
        remove(work)


def _swap(fresh: Path, final: Path) -> None:
    """Put ``fresh`` in the place of ``final``; what was there is where ``fresh`` was."""
    if not final.exists():
        fresh.rename(final)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is not None:
        names = os.fsencode(fresh), os.fsencode(final)
        if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    # A file system without RENAME_EXCHANGE: two steps.
    old = fresh.with_name(f"{fresh.name}.old")
    final.rename(old)
    try:
        fresh.rename(final)
    except OSError:
        old.rename(final)
        raise


def _check_replaceable(target: Path) -> None:
    """Raises UsageError where replacing ``target`` would lose anybody's work."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    git = Git(target)
    ours = (target / ".git").is_dir() and git.ask("config", "nearmetal.tree") is not None
    if not ours:
        raise UsageError(
            f"{target} exists and is not a tree made by nearmetal", hint="name another folder"
        )
    unchanged = git.ask("rev-parse", "HEAD") == git.ask("config", "nearmetal.exported")
    if _in_progress(git) or not unchanged or _dirty(git):
        raise UsageError(
            f"{target} has changes that are not in patches/",
            hint="export it with 'nearmetal tree export', or remove the folder",
        )
