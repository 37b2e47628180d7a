# SPDX-License-Identifier: GPL-2.0-or-later
"""A series becomes mails: sender, sign-off, recipients, revision, base; all of it or nothing."""

from __future__ import annotations

import email
import email.policy
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from lib.repositories import commit, git, make_sources

from nearmetal.cli.main import main
from nearmetal.core.cache import Cache
from nearmetal.core.errors import NearmetalError, UsageError
from nearmetal.core.settings import Settings
from nearmetal.patches.series import Enable, Series
from nearmetal.sources.archive import Source
from nearmetal.upstream import bases, sendcmd, sending, trees
from nearmetal.upstream.sending import Mailing, Person, Recipients

DATA = Path(__file__).parent / "data" / "maintainers"
SENDER = Person("Jürgen Sender", "js@example.org")
WHEN = datetime(2026, 11, 30, 18, 0, tzinfo=UTC)
SOMEBODY = {
    "GIT_AUTHOR_NAME": "Žofie Nováková",
    "GIT_AUTHOR_EMAIL": "zofie@example.org",
}
OURS = {"GIT_AUTHOR_NAME": trees.DEVELOPERS, "GIT_AUTHOR_EMAIL": trees.ADDRESS}


def record(folder: Path, message: str, author: dict[str, str] = OURS) -> None:
    git(folder, "add", "--all")
    environment = {
        **os.environ,
        **author,
        "GIT_COMMITTER_NAME": "c",
        "GIT_COMMITTER_EMAIL": "c@example.org",
        "GIT_AUTHOR_DATE": "2026-03-04T05:06:07+0530",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    words = ["git", "commit", "--quiet", "--cleanup=whitespace", "--file=-"]
    subprocess.run(words, cwd=folder, env=environment, input=message, text=True, check=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's folder with patches/ and the sources that they are for."""
    folder = tmp_path_factory.mktemp("written")
    sources = make_sources(folder / "sources")
    tree = trees.tree_checkout("linux", sources, "7.3.4", [], folder / "author").folder
    trees.tree_new_series(tree, "config-cache", "KVM: Cache config reads, naïvely")
    text = (tree / "kvm/x86.c").read_text()
    (tree / "kvm/x86.c").write_text(text.replace("return 7;", "return 77;"))
    record(tree, "kvm: Return what is there\n\nWhy.\n\nReported-by: U <u@example.org>\n")
    (tree / "kvm/run").chmod(0o755)
    record(tree, "kvm: Let the script run\n\nIt could not.\n")
    (tree / "kvm/latin.txt").write_bytes(b"caf\xe9 au lait\n")
    record(tree, "kvm: Take what somebody wrote\n\nIt is his.\n", SOMEBODY)
    trees.tree_export(tree, folder / "patches", [])
    cover = folder / "patches/linux/config-cache/cover.txt"
    cover.write_text(cover.read_text() + "\nWhat it is for.\n")
    entry = '  - {name: config-cache, tree: linux, order: 1, base: "7.3", purpose: x.}\n'
    (folder / "patches/series.yaml").write_text(f"series:\n{entry}")
    return folder


@pytest.fixture
def place(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "repo"))


def one(place: Path) -> Series:
    folder = place / "patches/linux/config-cache"
    return Series("config-cache", "linux", 1, "7.3", "x", (), Enable(), folder)


def mailing(**more: object) -> Mailing:
    return Mailing(SENDER, Recipients(), WHEN, **more)  # type: ignore[arg-type]


def mails(place: Path, folder: Path, what: Mailing) -> list[email.message.EmailMessage]:
    folder.mkdir()
    files = sending.write(one(place), what, folder)
    assert [path.name[:5] for path in files] == ["0000-", "0001-", "0002-", "0003-"]
    return [
        email.message_from_bytes(path.read_bytes().split(b"\n", 1)[1], policy=email.policy.default)
        for path in files
    ]


def body(mail: email.message.EmailMessage) -> str:
    return str(mail.get_content())


# -- sender


def test_the_sender_is_author_and_signs_off(tmp_path: Path, place: Path) -> None:
    cover, *patches = mails(place, tmp_path / "out", mailing())
    assert [str(mail["From"]) for mail in (cover, *patches)] == [
        str(SENDER),
        str(SENDER),
        str(SENDER),
        "Žofie Nováková <zofie@example.org>",
    ]
    for patch in patches:
        assert body(patch).split("\n---\n")[0].endswith(f"\nSigned-off-by: {SENDER}")
    assert "Reported-by: U <u@example.org>\nSigned-off-by: Jürgen" in body(patches[0])
    text = body(cover)
    assert text.startswith(f"What it is for.\n\nSigned-off-by: {SENDER}\n\n---\n")
    assert "\nJürgen Sender (2):\n  kvm: Return what is there\n  kvm: Let the script run\n" in text
    assert "\nŽofie Nováková (1):\n  kvm: Take what somebody wrote\n" in text
    assert " 3 files changed, 2 insertions(+), 2 deletions(-)\n" in text
    assert "nearmetal developers" not in text
    assert cover["Subject"] == "[PATCH 0/3] KVM: Cache config reads, naïvely"
    assert str(cover["Date"]) == "Mon, 30 Nov 2026 18:00:00 +0000"
    assert str(patches[0]["Date"]) == "Wed, 04 Mar 2026 05:06:07 +0530"
    assert cover["Message-Id"] is None
    assert cover["To"] is None and patches[0]["Cc"] is None


def test_git_am_takes_what_was_written(tmp_path: Path, place: Path) -> None:
    recipients = Recipients((Person("Cédric, Jr.", "c@example.org"),), (Person("", "l@e.org"),))
    what = Mailing(SENDER, recipients, WHEN, changes="Changes in v2:\n- patch 2: x", revision=2)
    mails(place, tmp_path / "out", what)
    made = trees.tree_checkout("linux", place / "sources", "7.3.4", [], tmp_path / "t").folder
    files = sorted((tmp_path / "out").glob("*.patch"))[1:]
    git(made, "am", "--quiet", "--keep-cr", *map(str, files))
    log = git(made, "log", "--format=%an|%s|%(trailers:key=Signed-off-by,valueonly)", "-3")
    assert log.replace("\n\n", "\n").splitlines() == [
        f"Žofie Nováková|kvm: Take what somebody wrote|{SENDER}",
        f"Jürgen Sender|kvm: Let the script run|{SENDER}",
        f"Jürgen Sender|kvm: Return what is there|{SENDER}",
    ]
    assert git(made, "log", "--format=%B", "-1", "HEAD^") == (
        f"kvm: Let the script run\n\nIt could not.\n\nSigned-off-by: {SENDER}"
    )
    assert (made / "kvm/latin.txt").read_bytes() == b"caf\xe9 au lait\n"


def test_a_text_of_ascii_needs_no_mime(tmp_path: Path, place: Path) -> None:
    plain = Mailing(Person("A", "a@example.org"), Recipients(), WHEN)
    _, first, second, third = mails(place, tmp_path / "out", plain)
    assert first["MIME-Version"] is None and second["MIME-Version"] is None
    assert third.get_content_charset() == "utf-8"  # git send-email would ask
    assert third["Content-Transfer-Encoding"] == "8bit"


@pytest.mark.parametrize("signoff", ["Nobody", "<a@b.c>", "A <a@b.c> extra", "A <a b@c>"])
def test_what_is_no_sign_off_is_refused(signoff: str) -> None:
    with pytest.raises(UsageError, match="is not a sign-off"):
        sending.sender_of(signoff)


# -- subjects and changes


@pytest.mark.parametrize(
    ("what", "tag"),
    [
        ({}, "[PATCH 2/3]"),
        ({"prefixes": ("RFC",)}, "[PATCH RFC 2/3]"),
        (
            {"prefixes": ("RFC", "RESEND"), "revision": 3, "changes": "Changes since v2:\n- x"},
            "[PATCH RFC RESEND v3 2/3]",
        ),
    ],
)
def test_revision_and_prefixes(
    tmp_path: Path, place: Path, what: dict[str, object], tag: str
) -> None:
    found = mails(place, tmp_path / "out", mailing(**what))
    assert found[2]["Subject"] == f"{tag} kvm: Let the script run"
    assert str(found[0]["Subject"]).startswith(tag.replace("2/3", "0/3"))


CHANGES = """Changes in v2:
- patch 2: the script
  was not one (Sean)
- patches 1, 3: typos
- Rebased
- Link to v1: https://example.org/1

Changes in v1:
- patch 1: of long ago
"""


def test_changes_stand_below_the_line_of_cover_and_patches(tmp_path: Path, place: Path) -> None:
    cover = one(place).cover
    cover.write_text(f"{cover.read_text()}\n---\n{CHANGES}")
    found = mails(place, tmp_path / "out", mailing(revision=2))
    assert f"\nSigned-off-by: {SENDER}\n\n---\n{CHANGES.strip()}\n\n---\n" in body(found[0])
    below = [body(mail).split("\n---\n", 1)[1].split("\n\n")[0] for mail in found[1:]]
    assert below == [
        "Changes in v2:\n- typos",
        "Changes in v2:\n- the script\n  was not one (Sean)",
        "Changes in v2:\n- typos",
    ]


def test_the_revision_is_that_of_b4(tmp_path: Path, place: Path) -> None:
    tracking = trees.default_tracking("config-cache")
    tracking["series"].update(revision=2, prefixes=["RFC"])
    text = f"T\n\nWhy.\n\n---\n{CHANGES}"
    one(place).cover.write_text(trees._join_cover(text, tracking))
    found = mails(place, tmp_path / "out", mailing())
    assert found[0]["Subject"] == "[PATCH RFC v2 0/3] T"
    assert "\nchange-id: 20260101-config-cache-" in body(found[0])
    assert trees.COVER_MARKER not in body(found[0])


@pytest.mark.parametrize("changes", [None, "Changes in v1:\n- x", "Changes in v2:\n\n", "- x"])
def test_a_revision_must_say_what_changed(tmp_path: Path, place: Path, changes: str | None) -> None:
    with pytest.raises(UsageError, match="does not say what changed in v2") as caught:
        mails(place, tmp_path / "out", mailing(revision=2, changes=changes))
    assert "'Changes in v2:'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("T\n\nWhy\n---\nIt is.\n", ""),
        ("T\n\nWhy\n---\nIt is.\n\n---\nChanges in v2:\n- x\n", "Changes in v2:\n- x"),
        ("T\n\nIt is.\n---\nChanges in v2:\n- x\n---\ny\n", "Changes in v2:\n- x\n---\ny"),
    ],
)
def test_a_title_of_three_letters_is_no_end(text: str, changes: str) -> None:
    body, found = sending.split_changes(text)
    assert found == changes
    assert body.endswith("It is.\n")


def test_numbers_of_patches() -> None:
    section = "- patches 1-2, 4: a\n* patch 3: b\n  c\n- d\n  e"
    assert [sending.changes_of_patch(section, number) for number in range(1, 6)] == [
        "- a",
        "- a",
        "- b\n  c",
        "- a",
        "",
    ]


# -- recipients


def test_who_linux_names() -> None:
    found = sending.parse_maintainers((DATA / "linux.txt").read_text())
    assert [one.mail for one in found.to] == [
        "peterz@infradead.org",
        "x86@kernel.org",
        "pbonzini@redhat.com",
    ]
    assert [one.header() for one in found.cc] == [
        "Mark Rutland <mark.rutland@arm.com>",
        '"H. Peter Anvin" <hpa@zytor.com>',
        "Sean Christopherson <seanjc@google.com>",
        "linux-kernel@vger.kernel.org",
        "kvm@vger.kernel.org",
    ]


def test_who_qemu_names() -> None:
    found = sending.parse_maintainers((DATA / "qemu.txt").read_text())
    assert [one.name for one in found.to] == [
        "Yi Liu",
        "Eric Auger",
        "Paolo Bonzini",
        "Michael S. Tsirkin",
        "Cédric Le Goater",
    ]
    assert found.to[4].header() == "=?utf-8?q?C=C3=A9dric_Le_Goater?= <clg@redhat.com>"
    assert [one.mail for one in found.cc] == ["zhao1.liu@intel.com", "qemu-devel@nongnu.org"]
    assert "mst@redhat.com" not in [one.mail for one in found.without("mst@redhat.com").to]


def test_where_nobody_maintains_a_file_the_lists_are_asked() -> None:
    found = sending.parse_maintainers("a@example.org (open list)\nR <r@e.org> (reviewer:X)\n")
    assert [one.mail for one in found.to] == ["a@example.org"]
    assert [one.mail for one in found.cc] == ["r@e.org"]


def test_recipients_are_in_every_header(tmp_path: Path, place: Path) -> None:
    found = sending.parse_maintainers((DATA / "qemu.txt").read_text())
    for mail in mails(place, tmp_path / "out", Mailing(SENDER, found, WHEN)):
        assert [address.addr_spec for address in mail["To"].addresses] == [
            one.mail for one in found.to
        ]
        assert mail["To"].addresses[4].display_name == "Cédric Le Goater"
        assert [address.addr_spec for address in mail["Cc"].addresses] == [
            one.mail for one in found.cc
        ]


# -- base


def users_tree(place: Path) -> Path:
    folder = place / "sources"
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    commit(folder, "as it is\n")
    return folder


def test_base_commit_is_that_of_the_user_s_tree(place: Path) -> None:
    tree = users_tree(place)
    before = sorted(str(path) for path in tree.rglob("*"))
    head = git(tree, "rev-parse", "HEAD")
    patches = one(place).patches()
    assert sending.base_commit(tree, (), patches) == head
    assert sending.base_commit(tree, patches[:1], patches[1:]) == head
    assert sorted(str(path) for path in tree.rglob("*")) == before
    with pytest.raises(UsageError, match=r"0001-.* does not apply to HEAD") as caught:
        sending.base_commit(tree, patches, patches)
    assert "--onto" in str(caught.value.hint)


def test_base_and_what_is_required_stand_at_the_cover_s_end(tmp_path: Path, place: Path) -> None:
    below = one(place).patches()[:2]
    cover = mails(place, tmp_path / "out", mailing(base="1" * 40, below=below))[0]
    ids = sending.patch_ids(below)
    assert len(set(ids)) == 2
    assert body(cover).split("\n---\n")[-1].splitlines()[:4] == [
        f"base-commit: {'1' * 40}",
        "change-id: 20260101-config-cache-"
        + trees.default_tracking("config-cache")["series"]["change-id"].split("-")[-1],
        f"prerequisite-patch-id: {ids[0]}",
        f"prerequisite-patch-id: {ids[1]}",
    ]


# -- the command


CHECKPATCH = """#!/usr/bin/perl
open(my $mail, '<', $ARGV[-1]);
my $text = join('', <$mail>);
my $bad = 0;
sub complain { print "$ARGV[-1]:$_[0]\\n"; $bad = 1; }
complain("3: ERROR:TRAP: a trap") if $text =~ /^Subject:.*script/m && -e 'trap';
complain("0: ERROR: Missing Signed-off-by: line") if $text !~ /^Signed-off-by: /m;
exit $bad;
"""
MAINTAINER = """#!/usr/bin/perl
print "M <m\\@example.org> (maintainer:KVM)\\nJ <js\\@example.org> (reviewer:KVM)\\n";
print "l\\@example.org (open list)\\n";
"""


@pytest.fixture
def conf(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Sources with the scripts of a kernel, and a validation that finds nothing."""
    scripts = place / "sources/scripts"
    scripts.mkdir()
    (scripts / "checkpatch.pl").write_text(CHECKPATCH)
    (scripts / "get_maintainer.pl").write_text(MAINTAINER)
    source = Source("linux", "7.3.4", "0", "Debian linux-source-7.3 7.3.4-1", place / "sources")
    monkeypatch.setattr(bases, "repository", lambda *_: (source, Path()))
    monkeypatch.setattr(bases, "run_validate", lambda *_, **__: ("", 0))
    return Settings(place, tmp_path / "cache", tmp_path / "results")


def request(output: Path, **more: object) -> sendcmd.Request:
    what = {"name": "config-cache", "signoff": "A <a@example.org>", "output": output, **more}
    return sendcmd.Request(**what)  # type: ignore[arg-type]


def test_export_writes_all_and_tells_what_it_lacks(
    conf: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out"
    files = sendcmd.export(conf, Cache(conf.cache_dir).open(), request(output))
    assert sorted(output.iterdir()) == list(files) and len(files) == 4
    assert list(output.parent.iterdir()) == [output]
    said = capsys.readouterr().err
    assert "no base-commit: the base is not a commit, but Debian linux-source-7.3 7.3.4-1;" in said
    assert "To: 1 maintainers, Cc: 2 reviewers and lists" in said
    assert "linux/config-cache (3 patches): ok" in said
    assert "To: M <m@example.org>\n" in files[1].read_text()


def test_export_names_the_commit_of_the_user_s_tree(conf: Settings, tmp_path: Path) -> None:
    from dataclasses import replace

    tree = users_tree(conf.repo)
    files = sendcmd.export(
        replace(conf, linux_tree=tree), Cache(conf.cache_dir).open(), request(tmp_path / "out")
    )
    assert f"\nbase-commit: {git(tree, 'rev-parse', 'HEAD')}\n" in files[0].read_text()


def test_export_names_the_patches_that_are_needed_below(
    conf: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = conf.repo / "patches"
    shutil.copytree(patches / "linux/config-cache", patches / "linux/more")
    with (patches / "series.yaml").open("a") as stream:
        stream.write(
            '  - {name: more, tree: linux, order: 2, base: "7.3", purpose: x.,'
            " requires: {config-cache: 2}}\n"
        )
    what = request(tmp_path / "out", name="more")
    cover = sendcmd.export(conf, Cache(conf.cache_dir).open(), what)[0].read_text()
    for one_id in sending.patch_ids(one(conf.repo).patches()[:2]):
        assert f"prerequisite-patch-id: {one_id}\n" in cover
    assert cover.count("prerequisite-patch-id") == 2
    assert "it needs the first 2 patches of config-cache:" in capsys.readouterr().err


def test_the_sender_is_no_recipient(conf: Settings, tmp_path: Path) -> None:
    what = request(tmp_path / "out", signoff="J <js@example.org>")
    files = sendcmd.export(conf, Cache(conf.cache_dir).open(), what)
    assert "Cc: l@example.org\n" in files[1].read_text()


def test_nothing_is_written_while_the_validation_fails(
    conf: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def fails(*_: object, **words: object) -> tuple[str, int]:
        asked.append(words)
        return "linux/config-cache: 1 error", 1

    monkeypatch.setattr(bases, "run_validate", fails)
    cache = Cache(conf.cache_dir).open()
    output = tmp_path / "out"
    with pytest.raises(NearmetalError, match="not exported: its validation finds") as caught:
        sendcmd.export(conf, cache, request(output))
    assert "--unvalidated" in str(caught.value.hint)
    assert (asked[0]["only"], asked[0]["tree"], asked[0]["quick"]) == (
        "config-cache",
        "linux",
        True,
    )
    assert not output.exists()
    sendcmd.export(conf, cache, request(output, validated=False))
    assert len(list(output.iterdir())) == 4 and len(asked) == 1


def test_nothing_is_written_while_checkpatch_complains(
    conf: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (conf.repo / "sources/trap").touch()
    cache = Cache(conf.cache_dir).open()
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(NearmetalError, match="checkpatch finds errors in the mails"):
        sendcmd.export(conf, cache, request(output))
    assert list(output.iterdir()) == []
    assert "line 3: ERROR TRAP a trap" in capsys.readouterr().err
    sendcmd.export(conf, cache, request(output, validated=False))
    assert len(list(output.iterdir())) == 4


def test_a_mail_without_its_author_s_sign_off_is_an_error(
    conf: Settings, tmp_path: Path, written: Path
) -> None:
    source, _ = bases.repository(conf, Cache(conf.cache_dir), "linux")
    series = one(written)
    found = sendcmd.check(series.patches(), series, source)
    assert [finding.severity for finding in found] == ["error"] * 3
    assert found[0].text == "no Signed-off-by of its author"


def test_a_full_folder_and_a_wrong_part_are_refused(conf: Settings, tmp_path: Path) -> None:
    cache = Cache(conf.cache_dir).open()
    with pytest.raises(UsageError, match="not an empty folder"):
        sendcmd.export(conf, cache, request(conf.repo))
    with pytest.raises(UsageError, match="no part for qemu") as caught:
        sendcmd.export(conf, cache, request(tmp_path / "out", tree="qemu"))
    assert caught.value.hint == "it has one for linux"
    with pytest.raises(UsageError, match="no series 'config-cash'") as caught:
        sendcmd.export(conf, cache, request(tmp_path / "out", name="config-cash"))
    assert "config-cache" in str(caught.value.hint)


def test_the_command_line_s_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--series", "direct-p2p", "--output", str(tmp_path / "out")]
    words += ["--cache-dir", str(tmp_path)]
    for more, message in (
        (["--signoff", "Nobody"], "is not a sign-off"),
        (["--signoff", "A <a@b>", "-v", "0"], "-v must be"),
        (["--signoff", "A <a@b>", "-v", "2"], "does not say what changed in v2"),
        (["--signoff", "A <a@b>", "--changes", "/no/such"], "--changes /no/such"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
