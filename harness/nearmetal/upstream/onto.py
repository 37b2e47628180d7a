# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the patches of a series fit another tree: as they are, by a three-way merge, or not.

A series is committed on its base, and its commits are picked onto the other tree's commit one
after the other, in a repository that sees the objects of both. Of a patch that conflicts, the
conflicting lines are resolved in its favour, so that those behind it are tried as if somebody had
resolved it. Nothing is written to either tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import EnvironmentBroken, UsageError
from .trees import EPOCH, Git

Result = Literal["applies", "merges", "conflicts", "is there"]

_LONG_S = 3600.0
_SHOWN = 60
_FILES_SHOWN = 6


@dataclass(frozen=True)
class Conflict:
    """Where a patch conflicts with a file.

    ``line`` is that of the first conflict in the merged file with its marks, ``count`` how many
    there are. ``here`` and ``patch`` say how the two sides differ from the base in the first one:
    the first line that a side adds (``+``), or else the first that it has not (``-``). Without
    ``line``, ``why`` says what is wrong with the whole file.
    """

    file: str
    line: int = 0
    count: int = 0
    here: str = ""
    patch: str = ""
    why: str = ""

    def __str__(self) -> str:
        if not self.line:
            return f"{self.file}: {self.why}"
        more = f", {self.count} places" if self.count > 1 else ""
        return f"{self.file}:{self.line}{more}: here {_cut(self.here)}  patch {_cut(self.patch)}"


@dataclass(frozen=True)
class Tried:
    """What became of one patch of a series."""

    series: str
    number: int
    patch: str
    subject: str
    result: Result
    conflicts: tuple[Conflict, ...] = ()


@dataclass(frozen=True)
class Commit:
    """A commit, and the folder of the objects that it is made of; ``name`` is for readers."""

    name: str
    objects: Path
    commit: str


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


# -- a repository that sees both trees


def work_repository(folder: Path, stores: Sequence[Path]) -> Git:
    """A repository in ``folder``, which is empty, that reads the objects of ``stores`` as well.

    Its work tree stays empty (sparse checkout), but for files with conflicts.
    """
    git = Git(folder)
    git.run("init", "--quiet", "--template=", ".")
    inside = folder / ".git"
    for name in ("objects/info", "info"):
        (inside / name).mkdir(exist_ok=True)
    lines = "".join(f"{store.resolve()}\n" for store in stores)
    (inside / "objects/info/alternates").write_text(lines)
    (inside / "info/sparse-checkout").write_text("/no-file-at-all\n")
    git.run("config", "core.sparseCheckout", "true")
    git.run("config", "merge.conflictStyle", "diff3")
    return git


def commit_series(git: Git, base: Commit, patches: Sequence[Path]) -> tuple[str, ...]:
    """The commits of the patches on ``base``, in order; raises UsageError where one fails."""
    env = {"GIT_INDEX_FILE": str(git.folder / ".git/index-of-base")}
    git.run("read-tree", base.commit, env=env, deadline_s=_LONG_S)
    parent, found = base.commit, []
    for patch in patches:
        if not _apply(git, patch, env):
            raise UsageError(
                f"{patch.name} does not apply to its own base, {base.name}",
                hint="see what is wrong with it: nearmetal validate --quick",
            )
        parent = _commit(git, parent, patch, env)
        found.append(parent)
    return tuple(found)


def _apply(git: Git, patch: Path, env: Mapping[str, str] | None = None) -> bool:
    words = ("apply", "--cached", "--whitespace=nowarn", patch.resolve())
    return git.run(*words, env=env, check=False).status == 0


def _commit(git: Git, parent: str, patch: Path, env: Mapping[str, str] | None = None) -> str:
    tree = git.run("write-tree", env=env).stdout.strip()
    dates = {"GIT_AUTHOR_DATE": EPOCH, "GIT_COMMITTER_DATE": EPOCH}
    return git.run(
        "commit-tree", tree, "-p", parent, env={**dates, **(env or {})}, input_text=patch.name
    ).stdout.strip()


# -- trying


def try_series(
    git: Git,
    label: str,
    base: Commit,
    target: Commit,
    patches: Sequence[Path],
    below: Sequence[Path] = (),
) -> tuple[Tried, ...]:
    """What becomes of the patches of a series on ``target``.

    ``below`` are the patches of others that it requires: they are put onto both first, and are
    not told of. Raises UsageError where the series does not apply to its base.
    """
    commits = commit_series(git, base, (*below, *patches))
    git.run("update-ref", "--no-deref", "HEAD", target.commit)
    _reset(git, target.commit)
    found = []
    for place, (patch, commit) in enumerate(zip((*below, *patches), commits, strict=True)):
        result, conflicts = _try(git, patch, commit)
        if place >= len(below):
            number = place - len(below) + 1
            found.append(Tried(label, number, patch.name, subject_of(patch), result, conflicts))
    return tuple(found)


def subject_of(patch: Path) -> str:
    """The subject of a patch, without [PATCH]."""
    head = patch.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    match = re.search(r"(?m)^Subject: (?:\[PATCH[^\]]*\] )?(.*(?:\n[ \t].*)*)", head)
    return " ".join(match[1].split()) if match else patch.name


def _reset(git: Git, commit: str) -> None:
    git.run("reset", "--quiet", "--hard", commit, deadline_s=_LONG_S)
    git.run("clean", "--quiet", "-ffdx")


def _try(git: Git, patch: Path, commit: str) -> tuple[Result, tuple[Conflict, ...]]:
    before = git.text("rev-parse", "HEAD")
    if _apply(git, patch):
        _reset(git, _commit(git, before, patch))
        return "applies", ()
    said = _pick(git, commit)
    if said is None:
        same = git.text("rev-parse", "HEAD^{tree}") == git.text("rev-parse", f"{before}^{{tree}}")
        return ("is there" if same else "merges"), ()
    conflicts = conflicts_of(git, said)
    _reset(git, before)
    if _pick(git, commit, "--strategy-option=theirs") is not None:
        _take_theirs(git, before, patch)
    return "conflicts", conflicts


def _pick(git: Git, commit: str, *words: str) -> str | None:
    """Pick a commit; what git says where it conflicts, or None where it does not."""
    done = git.run(
        "cherry-pick",
        "--allow-empty",
        "--keep-redundant-commits",
        *words,
        commit,
        deadline_s=_LONG_S,
        check=False,
    )
    if done.status == 0:
        return None
    if done.status == 1 and git.text("ls-files", "--unmerged"):
        return done.stdout + done.stderr
    raise EnvironmentBroken(
        f"git cherry-pick failed in {git.folder}", detail=(done.stderr or done.stdout).strip()
    )


def _take_theirs(git: Git, before: str, patch: Path) -> None:
    """Commit what is unmerged as the patch has it: whole files that one side has not."""
    for path, stages in _unmerged(git).items():
        git.run("update-index", "--force-remove", "--", path)
        if 3 in stages:
            mode, blob = stages[3]
            git.run("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
    _reset(git, _commit(git, before, patch))


# -- conflicts


def _unmerged(git: Git) -> dict[str, dict[int, tuple[str, str]]]:
    """Mode and blob of unmerged files by path and stage: 1 is the base, 2 here, 3 the patch."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for line in git.text("ls-files", "--unmerged", "-z").split("\0"):
        if line:
            about, path = line.split("\t", 1)
            mode, blob, stage = about.split()
            found.setdefault(path, {})[int(stage)] = (mode, blob)
    return found


def conflicts_of(git: Git, said: str) -> tuple[Conflict, ...]:
    """The conflicts of a merge that stopped; ``said`` is what git printed."""
    found = []
    for path, stages in _unmerged(git).items():
        file = git.folder / path
        if {2, 3} <= set(stages) and file.is_file() and not file.is_symlink():
            text = file.read_text(encoding="utf-8", errors="replace")
            conflict = first_conflict(path, text)
            if conflict is not None:
                found.append(conflict)
                continue
        found.append(Conflict(path, why=_why(path, stages, said)))
    return tuple(sorted(found, key=lambda one: one.file))


def first_conflict(path: str, text: str) -> Conflict | None:
    """The first conflict that is marked (diff3) in a merged file, and how many there are."""
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("<<<<<<< ")]
    if not starts:
        return None
    here: list[str] = []
    base: list[str] = []
    patch: list[str] = []
    side = here
    for line in lines[starts[0] + 1 :]:
        if line.startswith(">>>>>>> "):
            break
        if line.startswith("||||||| "):
            side = base
        elif line == "=======":
            side = patch
        else:
            side.append(line)
    return Conflict(
        path, starts[0] + 1, len(starts), _difference(base, here), _difference(base, patch)
    )


def _difference(base: Sequence[str], side: Sequence[str]) -> str:
    """The first line that a side has more than the base, or else less."""
    for sign, ours, others in (("+", side, base), ("-", base, side)):
        known = {line.strip() for line in others}
        for line in ours:
            if line.strip() and line.strip() not in known:
                return f"{sign}{' '.join(line.split())}"
    return "(order or space)"


def _why(path: str, stages: Mapping[int, tuple[str, str]], said: str) -> str:
    if set(stages) == {1, 3}:
        return "the patch changes it, and it is not in this tree"
    if set(stages) == {1, 2}:
        return "the patch removes or renames it, and it was changed in this tree"
    if set(stages) == {2, 3}:
        return "both have it and the base has not"
    for line in said.splitlines():
        if line.startswith("CONFLICT (") and path in line:
            return line.removeprefix("CONFLICT ").strip()
    return "it cannot be merged"


# -- telling


_WORDS: Mapping[Result, str] = {
    "applies": "applies",
    "merges": "three-way merge",
    "conflicts": "conflict",
    "is there": "there already",
}


def render(tried: Sequence[Tried], base: Mapping[str, str], target: str) -> str:
    """The results as text: a line a patch, and where it conflicts; ``base`` by series."""
    lines: list[str] = []
    width = max((len(word) for word in _WORDS.values()), default=0)
    for name in dict.fromkeys(one.series for one in tried):
        mine = [one for one in tried if one.series == name]
        lines.append(f"{name} (made for {base[name]}) onto {target}: {summary(mine)}")
        for one in mine:
            lines.append(f"  {one.number:2} {_WORDS[one.result]:{width}}  {one.subject}")
            lines += [f"       {conflict}" for conflict in one.conflicts[:_FILES_SHOWN]]
            if len(one.conflicts) > _FILES_SHOWN:
                lines.append(f"       and {len(one.conflicts) - _FILES_SHOWN} more files")
        lines.append("")
    lines.append(
        "applies: git am takes it. three-way merge: git cherry-pick takes it, where the base's"
        " files are at hand."
    )
    if any(one.result == "conflicts" for one in tried):
        lines.append(
            "conflict: the line in the merged file, what this tree and what the patch has there"
            " more (+) or less (-)"
        )
        lines.append(
            "than the base; the patches behind it are tried as if it were resolved for the patch."
        )
    return "\n".join(lines)


def summary(tried: Sequence[Tried]) -> str:
    """How many patches have which result, in words."""
    if all(one.result == "applies" for one in tried):
        return f"all {len(tried)} apply" if len(tried) != 1 else "it applies"
    counts = {result: sum(one.result == result for one in tried) for result in _WORDS}
    words = {
        "applies": "apply",
        "merges": "by three-way merge",
        "conflicts": "conflict",
        "is there": "there already",
    }
    return ", ".join(f"{count} {words[result]}" for result, count in counts.items() if count)


def to_json(tried: Sequence[Tried], target: str) -> str:
    """The results for programs: the target, and an object for each patch."""
    return json.dumps({"onto": target, "patches": [asdict(one) for one in tried]}, indent=1)
