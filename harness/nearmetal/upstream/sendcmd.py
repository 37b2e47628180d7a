# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``export``: what is validated, made into mails, checked again and put in place."""

from __future__ import annotations

import email.utils
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core import ui
from ..core.cache import Cache
from ..core.errors import Exit, NearmetalError, UsageError
from ..core.settings import Settings
from ..core.text import nearest
from ..patches import requires
from ..patches.series import Series, TreeName, load_series
from ..sources.archive import Source
from . import bases, sending, trees, validate


@dataclass(frozen=True)
class Request:
    """What is to be exported, for whom, and where to.

    ``tree`` None means all parts of a feature; each is then in a folder of its own, for lists
    of its own. ``changes`` is a file with what a revision changed.
    """

    name: str
    signoff: str
    output: Path
    tree: TreeName | None = None
    revision: int | None = None
    prefixes: tuple[str, ...] = ()
    changes: Path | None = None
    validated: bool = True
    maintainers: bool = True


def picked(every: Sequence[Series], name: str, tree: TreeName | None) -> tuple[Series, ...]:
    """The parts of a feature; raises UsageError with the nearest name, or the trees there are."""
    named = [one for one in every if one.name == name]
    if not named:
        raise UsageError(
            f"there is no series '{name}'",
            hint=nearest(name, list(dict.fromkeys(one.name for one in every)))
            if every
            else "patches/series.yaml has none yet",
        )
    found = tuple(one for one in named if tree in (None, one.tree))
    if not found:
        raise UsageError(
            f"the series '{name}' has no part for {tree}",
            hint=f"it has one for {' and '.join(one.tree for one in named)}",
        )
    return found


def export(settings: Settings, cache: Cache, request: Request) -> tuple[Path, ...]:
    """Write the mails of a series to ``request.output``; gives the files.

    The folder appears whole or not at all. Raises UsageError for a wrong sign-off, name or
    folder, NearmetalError where the validation or checkpatch of the mails finds errors, unless
    the request is for what is not validated.
    """
    sender = sending.sender_of(request.signoff)
    every = load_series(settings.repo / "patches")
    series = picked(every, request.name, request.tree)
    output = request.output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not an empty folder", hint="name a new one")
    if request.revision is not None and request.revision < 1:
        raise UsageError("-v must be 1 or more")
    mailing = sending.Mailing(
        sender=sender,
        recipients=sending.Recipients(),
        date=email.utils.localtime(),
        revision=request.revision,
        prefixes=request.prefixes,
        changes=_text_of(request.changes) if request.changes else None,
    )
    for one in series:
        sending.subject_of(one, mailing)  # what is wrong with it is told before the long work
    if request.validated:
        for one in series:
            _validate(settings, cache, one)
    output.parent.mkdir(parents=True, exist_ok=True)
    names: list[Path] = []
    with trees.beside(output) as work:
        fresh = work / "mails"
        for one in series:
            place = Path() if len(series) == 1 else Path(one.tree)
            (fresh / place).mkdir(parents=True)
            source, _ = bases.repository(settings, cache, one.tree)
            below = requires.patches_before(one, every)
            whole = replace(mailing, below=below)
            whole = _addressed(settings, source, one, whole, ask=request.maintainers)
            files = sending.write(one, whole, fresh / place)
            findings = check(files[1:], one, source)
            _tell(one, whole, findings, output / place, requires.in_words(one, every))
            if request.validated and validate.exit_status(findings) != Exit.OK:
                raise NearmetalError(
                    f"checkpatch finds errors in the mails of {one.label}",
                    hint="correct the patches in their tree, or write the mails anyway with"
                    " --unvalidated",
                    status=Exit.FAILED,
                )
            names += [output / place / path.name for path in files]
        if output.exists():
            output.rmdir()
        fresh.rename(output)
    return tuple(names)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--changes {path} cannot be read: {error}") from None


def _validate(settings: Settings, cache: Cache, series: Series) -> None:
    ui.say(f"validating {series.label} first, as validate --quick does (--unvalidated: not)")
    text, status = bases.run_validate(
        settings, cache, patches=None, tree=series.tree, only=series.name, quick=True
    )
    if status != Exit.OK:
        raise NearmetalError(
            f"{series.label} is not exported: its validation finds errors",
            detail=text,
            hint="correct the patches, or export anyway with --unvalidated",
            status=Exit.FAILED,
        )


def _addressed(
    settings: Settings, source: Source, series: Series, mailing: sending.Mailing, *, ask: bool
) -> sending.Mailing:
    """The mailing with recipients and base, and a line for each that it lacks."""
    if ask:
        found = sending.ask_maintainers(source.folder, series.patches())
        if found is None:
            ui.say(f"no To: and Cc:: {source.name} has no scripts/get_maintainer.pl")
        else:
            mailing = replace(mailing, recipients=found.without(mailing.sender.mail))
    tree = _own_tree(settings, series.tree)
    if tree is None:
        option = "qemu" if source.name == "qemu" else "linux"
        more = f"; --{option}-tree names a git tree" if source.name in ("linux", "qemu") else ""
        ui.say(f"no base-commit: the base is not a commit, but {source.origin}{more}")
    elif trees.Git(tree).ask("config", "nearmetal.tree") is not None:
        ui.say(f"no base-commit: {tree} was made by nearmetal, so nobody else has its base commit")
    else:
        base = sending.base_commit(tree, mailing.below, series.patches())
        mailing = replace(mailing, base=base)
    return mailing


def _own_tree(settings: Settings, tree: TreeName) -> Path | None:
    """The user's git tree for the series of a tree, if there is one."""
    own = {"linux": settings.linux_tree, "qemu": settings.qemu_tree}.get(bases.SOURCES[tree])
    return own.resolve() if own is not None and (own / ".git").exists() else None


def check(mails: Sequence[Path], series: Series, source: Source) -> tuple[validate.Finding, ...]:
    """What checkpatch says of the mails as they are sent: here a sign-off must be there."""
    if series.tree == "testbed-bochs":
        return ()
    base = validate.Base(series.tree, source.folder, source.version)
    found = [one for mail in mails for one in validate.checkpatch(base, series.label, mail)]
    return tuple(
        replace(one, severity="error", text="no Signed-off-by of its author")
        if one.rule == "sign-off"
        else one
        for one in found
    )


def _tell(
    series: Series,
    mailing: sending.Mailing,
    findings: Sequence[validate.Finding],
    folder: Path,
    needed: str,
) -> None:
    to, cc = len(mailing.recipients.to), len(mailing.recipients.cc)
    ui.say(f"{folder}: {sending.subject_of(series, mailing)}")
    if to:
        ui.say(f"  To: {to} maintainers, Cc: {cc} reviewers and lists, in each mail's header")
    if mailing.base:
        ui.say(f"  base-commit: {mailing.base}")
    if needed:
        ui.say(f"  it needs {needed}: prerequisite-patch-id in the cover letter names them")
    if series.draft and not mailing.prefixes:
        ui.say("  it is a draft: --rfc says so in the subjects")
    said = validate.render_findings(findings, [validate.Candidate(series)])
    ui.say("  checkpatch of the mails:")
    for line in said.splitlines()[:-2]:
        ui.say(f"    {line}")
