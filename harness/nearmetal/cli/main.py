# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``nearmetal``: options in, exit status out; no work is done here."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from .. import __version__
from ..builds import all as builds
from ..core import settings, ui
from ..core.cache import Cache
from ..core.errors import Exit, NearmetalError, UsageError
from ..core.model import VARIANTS, Variant
from ..core.settings import Settings
from ..judging import checks
from ..machines import inventory
from ..machines.guest import running_guest
from ..measure.catalogue import TESTS, nearest
from ..measure.p2p import SETUPS
from ..patches import series, variants
from ..report import compare, tables
from ..report import document as report
from ..runs import execute as run
from ..upstream import bases, ontocmd, sendcmd, trees
from . import cachecmd, doctor

Handler = Callable[[argparse.Namespace, Settings], int]

_TREE_WORDS = ("testbed", *series.TREES)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"see '{self.prog} --help'")


TESTBEDS = ("amd", "intel")
BOTH = "both"


def _common(*further: str) -> _Parser:
    """The options of all commands; ``further`` are words for --testbed that one of them takes."""
    common = _Parser(add_help=False)
    group = common.add_argument_group("where things are")
    group.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="what is fetched and built (default: $NEARMETAL_CACHE or ~/.cache/nearmetal)",
    )
    group.add_argument(
        "--results-dir",
        type=Path,
        metavar="DIR",
        help="where runs are reported (default: results/ in the repository)",
    )
    group.add_argument(
        "--source-dir",
        type=Path,
        metavar="DIR",
        help="source archives that are used before any download (or $NEARMETAL_SOURCES)",
    )
    group.add_argument(
        "--linux-tree",
        type=Path,
        metavar="PATH",
        help="build this Linux (git tree, folder or tarball) as it stands",
    )
    group.add_argument(
        "--qemu-tree",
        type=Path,
        metavar="PATH",
        help="build this QEMU (git tree, folder or tarball) as it stands",
    )
    group.add_argument(
        "--testbed",
        choices=(*TESTBEDS, *further),
        help=f"which emulated host (default: {TESTBEDS[0]})"
        + ("; both: one after the other, in one report" if BOTH in further else ""),
    )
    group.add_argument(
        "-j",
        "--jobs",
        type=int,
        default=os.cpu_count() or 2,
        metavar="N",
        help="processes of a build (default: the CPUs there are)",
    )
    return common


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = _common()
    top = _Parser(
        prog="nearmetal",
        description="Builds the patch series, boots VMs on emulated or real hosts, measures, "
        "checks and reports.",
        epilog="Exit status: 0 all is well; 1 a check failed; 2 wrong use; "
        "3 the environment is broken.",
    )
    top.add_argument("--version", action="version", version=f"nearmetal {__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, summary: str, handler: Handler, options: _Parser = common
    ) -> argparse.ArgumentParser:
        description = summary[0].upper() + summary[1:] + "."
        one = sub.add_parser(name, help=summary, description=description, parents=[options])
        one.set_defaults(handler=handler)
        return one

    def target(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--host", metavar="NAME", help="a host of the inventory instead of the testbed"
        )
        one.add_argument(
            "--inventory",
            type=Path,
            metavar="FILE",
            default=Path("inventory.yaml"),
            help="YAML file that says how to reach hosts (default: inventory.yaml)",
        )

    one = command("doctor", "say what this machine (or a host) lacks", _doctor)
    target(one)
    one.add_argument(
        "--boot", action="store_true", help="also boot something: an opened /dev/kvm is no proof"
    )

    one = command("build", "fetch the sources and build all that a run needs", _build)
    one.add_argument(
        "--variant", action="append", metavar="VARIANT", help="only this variant; may be repeated"
    )

    one = command("run", "build, boot, measure, check and report", _run, _common(BOTH))
    target(one)
    one.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEST",
        help=f"only this test ({', '.join(TESTS)}); may be repeated",
    )
    one.add_argument(
        "--variant",
        action="append",
        metavar="VARIANT",
        help=f"only this variant ({', '.join(VARIANTS)}); may be repeated",
    )
    one.add_argument(
        "--checks",
        action="append",
        type=Path,
        metavar="FILE",
        help="judge by these checks instead of the default ones; may be repeated",
    )
    one.add_argument(
        "--keep",
        action="store_true",
        help="leave host and guest up after the measurements until Ctrl-C",
    )

    one = command("boot", "boot a host with a guest on it and leave them up until Ctrl-C", _boot)
    target(one)
    one.add_argument(
        "--variant", metavar="VARIANT", default="vanilla", help="which variant (default: vanilla)"
    )
    one.add_argument(
        "--series",
        metavar="NAME",
        help="which series is on, with --variant on (default: the first); of one with set-ups"
        " of its own, the guest is that of the last",
    )
    one.add_argument("--no-guest", action="store_true", help="only the host")

    one = command("ssh", "a shell on what 'boot' or 'run --keep' has left up", _ssh)
    one.add_argument("machine", choices=("host", "guest"), help="which machine")
    one.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="run this instead of a shell"
    )

    one = command("tree", "the patches as git commits: check out, look, export", _tree)
    one.description = (
        "The patches as git commits: the pristine sources in one commit, then each series, headed"
        " by an empty commit with its cover letter. Change them with git as you are used to, and"
        " write patches/ back with 'tree export'."
    )
    one.add_argument(
        "action",
        choices=("checkout", "status", "export", "new-series"),
        help="checkout: make the work tree; status: what an export would change; export: write"
        " patches/ back; new-series: begin one at the tip",
    )
    one.add_argument(
        "tree",
        choices=_TREE_WORDS,
        help="whose patches; testbed: those of both emulators, which users do not get",
    )
    one.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="the work tree (default: trees/<tree> in the repository)",
    )
    one.add_argument("--name", help="new-series: the name of the series")
    one.add_argument("--title", help="new-series: the subject of its cover letter")

    one = command("validate", "hold patches to what a maintainer asks of them", _validate)
    one.description = (
        "Applies each series to the sources that it is made for, alone and all stacked, runs"
        " checkpatch, looks at cover letters and documentation, and builds what each patch touches"
        " with its parent's warnings left out (minutes; a second time only what changed)."
        " docs/patches.md has the rules. Exit status 1: there are errors."
    )
    one.add_argument(
        "--patches",
        type=Path,
        metavar="DIR",
        help="a directory of patches (default: patches/ in the repository)",
    )
    one.add_argument(
        "--tree",
        choices=series.TREES,
        help="only the series for this tree; a folder that holds patches alone needs it",
    )
    one.add_argument("--series", metavar="NAME", help="only this series")
    extent = one.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", action="store_true", help="leave out the build of all series stacked"
    )
    extent.add_argument(
        "--full",
        action="store_true",
        help="also sparse, coccicheck, options off and on, built in, arm64 and i386, the"
        " documentation, check-uapi and qtests (hours; a tool that is missing is an error)",
    )
    extent.add_argument(
        "--onto",
        metavar="TREE",
        help="instead: try the patches on another tree, and say of each whether it applies, merges"
        " three ways, or conflicts and where. TREE is a git tree (its HEAD is taken), a folder or"
        " a tarball of Linux or QEMU, or a release, such as 10.2. Nothing is built, and nothing is"
        " written to TREE",
    )
    one.add_argument("--json", action="store_true", help="with --onto: print JSON, for programs")
    one.add_argument(
        "--fail-on-conflict",
        action="store_true",
        help="with --onto: exit status 1 if a patch conflicts (otherwise 0)",
    )

    one = command(
        "export", "write a series as mails that 'git send-email' sends and b4 reads", _export
    )
    one.description = (
        "Writes the cover letter and the patches of a series as mails, with you as their author "
        "and your Signed-off-by, to a new folder. The series is validated first, as 'validate "
        "--quick' does (minutes), and checkpatch is run on the mails. To: are the maintainers, "
        "Cc: reviewers and lists, from the tree's scripts/get_maintainer.pl. With --linux-tree "
        "or --qemu-tree, a git tree with the right commit checked out, the cover letter says "
        "base-commit. Nothing is sent: 'git send-email DIR/*.patch' does that."
    )
    one.add_argument("--series", required=True, metavar="NAME", help="which series")
    one.add_argument(
        "--tree",
        choices=series.TREES,
        help="only the part for this tree (default: all, each in a folder of its own)",
    )
    one.add_argument(
        "--signoff",
        required=True,
        metavar="'NAME <MAIL>'",
        help="who sends: author of the patches and of the cover letter, and their sign-off",
    )
    one.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a folder that is made"
    )
    one.add_argument(
        "-v",
        "--revision",
        type=int,
        metavar="N",
        help="[PATCH vN]; the cover letter must then say what changed (default: what b4 notes"
        " in cover.txt, or 1)",
    )
    one.add_argument(
        "--changes",
        type=Path,
        metavar="FILE",
        help="what changed, instead of what is below the line '---' in cover.txt; an item"
        " '- patch 3: text' is also put below the '---' of that patch",
    )
    one.add_argument("--rfc", action="store_true", help="[PATCH RFC]")
    one.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="WORD",
        help="[PATCH WORD], such as RESEND; may be repeated",
    )
    one.add_argument(
        "--no-maintainers", action="store_true", help="leave To: and Cc: out of the mails"
    )
    one.add_argument(
        "--unvalidated",
        action="store_true",
        help="don't validate, and write the mails whatever checkpatch finds in them",
    )

    one = command("report", "show a run's report again, or write its page anew", _report)
    one.add_argument(
        "run", nargs="?", default="latest", help="a run's name or folder (default: latest)"
    )
    one.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="put the table of results into this file, between its markers",
    )
    one.add_argument("--html", action="store_true", help="write report.html and junit.xml anew")

    one = command("compare", "compare the measurements of two runs", _compare)
    one.add_argument("a", help="a run's name or folder")
    one.add_argument("b", help="another")
    one.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="a change of the median within this share is none (default: 0.1)",
    )
    one.add_argument(
        "--mix-provenance",
        action="store_true",
        help="allow emulated figures beside those of hardware",
    )

    one = command("cache", "show and prune what is cached", _cache)
    one.add_argument(
        "--prune",
        action="store_true",
        help="remove what no run has used for --older-than days, and broken attempts",
    )
    one.add_argument(
        "--older-than",
        type=float,
        default=30.0,
        metavar="DAYS",
        help="with --prune (default: 30); 0 removes everything",
    )
    return top


def _settings(options: argparse.Namespace) -> Settings:
    repo = settings.repository()
    source = options.source_dir or (
        Path(os.environ["NEARMETAL_SOURCES"]) if os.environ.get("NEARMETAL_SOURCES") else None
    )
    if options.jobs < 1:
        raise UsageError("--jobs must be 1 or more")
    for name in ("linux_tree", "qemu_tree"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise UsageError(f"--{name.replace('_', '-')} {path}: there is nothing there")
    return Settings(
        repo=repo,
        cache_dir=(options.cache_dir or settings.default_cache_dir()).expanduser().absolute(),
        results_dir=(options.results_dir or repo / "results").expanduser().absolute(),
        source_dir=source.expanduser().absolute() if source else None,
        linux_tree=options.linux_tree,
        qemu_tree=options.qemu_tree,
        jobs=options.jobs,
        testbed=TESTBEDS[0] if options.testbed in (None, BOTH) else options.testbed,
    )


def _variants(names: Sequence[str] | None) -> tuple[Variant, ...]:
    for name in names or ():
        if name not in VARIANTS:
            raise UsageError(f"there is no variant '{name}'", hint=nearest(name, VARIANTS))
    return tuple(variant for variant in VARIANTS if variant in (names or ()))


def _server(options: argparse.Namespace) -> inventory.Server | None:
    # an empty name is one that is wrong: the testbed is not what was meant
    if options.host is None:
        return None
    if options.testbed is not None:
        raise UsageError(
            f"--host {options.host} and --testbed {options.testbed}: a server is no emulated host",
            hint="leave one of the two out",
        )
    return inventory.pick(options.inventory, options.host)


def _doctor(options: argparse.Namespace, conf: Settings) -> int:
    return doctor.examine(conf, _server(options), boot=options.boot)


def _build(options: argparse.Namespace, conf: Settings) -> int:
    every = series.load_series(conf.repo / "patches")
    plan = variants.configs(every, _variants(options.variant) or variants.available(every))
    built = run.build_all(conf, Cache(conf.cache_dir).open(), plan, with_testbed=True)
    table = Table("role", "variant", "source", "sha256")
    for record in built.records:
        table.add_row(record.role, record.variant, record.source, record.sha256[:16])
    ui.console.print(table)
    return Exit.OK


def _run(options: argparse.Namespace, conf: Settings) -> int:
    status, _ = run.execute(
        conf,
        run.Options(
            tests=tuple(options.only),
            variants=_variants(options.variant),
            testbeds=TESTBEDS if options.testbed == BOTH else (),
            server=_server(options),
            checks=tuple(options.checks or ()),
            keep=options.keep,
            command=shlex.join(["nearmetal", *sys.argv[1:]]),
        ),
    )
    return status


def _boot(options: argparse.Namespace, conf: Settings) -> int:
    every = series.load_series(conf.repo / "patches")
    config = _one_config(
        variants.configs(every, _variants([options.variant])), options.variant, options.series
    )
    server = _server(options)
    cache = Cache(conf.cache_dir).open()
    built = run.build_all(conf, cache, [config], with_testbed=server is None)
    logs = conf.results_dir / "boot"
    logs.mkdir(parents=True, exist_ok=True)
    with run.host_for(conf, cache, built, config, server, logs) as host:
        here = cachecmd.Session(host=host.shell.address, guest=None)
        if options.no_guest:
            with cachecmd.session(cache, here):
                _wait("the host is up: 'nearmetal ssh host'; Ctrl-C ends it")
            return Exit.OK
        host.load_kvm(config.modules)
        assigned = host.assigned
        parts = run.guest_parts(conf, cache, built, config, host, assigned)
        if config.setups:
            parts, _ = run.for_setup(parts, SETUPS[config.setups[-1]], host)
        with (
            host.parameters(config.modules),
            host.vfio(assigned, config.functions),
            running_guest(host, parts, logs=logs, label=config.label) as guest,
            cachecmd.session(
                cache, cachecmd.Session(host=host.shell.address, guest=guest.shell.address)
            ),
        ):
            _wait("host and guest are up: 'nearmetal ssh host' or '... guest'; Ctrl-C ends them")
    return Exit.OK


def _one_config(plan: Sequence[variants.Config], variant: str, name: str | None) -> variants.Config:
    """The one to boot. Raises UsageError for a series that no variant of the plan switches on."""
    if name is None:
        return plan[0]
    if variant != "on":
        raise UsageError(
            f"--series says what is on, and nothing is in the variant '{variant}'",
            hint="add --variant on, or leave --series out",
        )
    found = {config.series: config for config in plan if config.series}
    if name not in found:
        raise UsageError(f"there is no series '{name}' to switch on", hint=nearest(name, [*found]))
    return found[name]


def _wait(text: str) -> None:
    ui.say(text)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        ui.say("ending")


def _ssh(options: argparse.Namespace, conf: Settings) -> int:
    cache = Cache(conf.cache_dir).open()
    line = cachecmd.ssh_command(cache, builds.keys(cache), options.machine, options.words)
    if shutil.which("ssh") is None:
        raise UsageError(
            "the program 'ssh' is not installed", hint="apt-get install openssh-client"
        )
    os.execvp(line[0], line)


def _tree(options: argparse.Namespace, conf: Settings) -> int:
    patches = conf.repo / "patches"
    every = series.load_series(patches)
    cache = Cache(conf.cache_dir).open()
    for name in trees.trees_of(options.tree):
        if options.tree == "testbed" and not [one for one in every if one.tree == name]:
            continue
        folder = options.dir or trees.default_folder(conf.repo, name)
        if options.action == "checkout":
            with ui.step(f"checking out {name}"):
                done = bases.checkout(conf, cache, name, every, folder)
            print(done.folder)
        elif options.action == "status":
            print(trees.tree_status(folder, patches))
        elif options.action == "export":
            for one in trees.tree_export(folder, patches, every):
                state = "written" if one.changed else "unchanged"
                print(f"{one.folder}: {one.patches} patches, {state}")
        else:
            if not options.name or not options.title:
                raise UsageError(
                    "new-series needs --name and --title",
                    hint="--name my-series --title 'KVM: Do something better'",
                )
            print(trees.tree_new_series(folder, options.name, options.title))
    return Exit.OK


def _validate(options: argparse.Namespace, conf: Settings) -> int:
    if options.onto is not None:
        text, status = ontocmd.run(
            conf,
            Cache(conf.cache_dir).open(),
            options.onto,
            patches=options.patches,
            tree=options.tree,
            only=options.series,
            as_json=options.json,
            strict=options.fail_on_conflict,
        )
        print(text)
        return status
    if options.json or options.fail_on_conflict:
        raise UsageError(
            "--json and --fail-on-conflict say how --onto ends",
            hint="add --onto TREE, or leave them out",
        )
    text, status = bases.run_validate(
        conf,
        Cache(conf.cache_dir).open(),
        patches=options.patches,
        tree=options.tree,
        only=options.series,
        quick=options.quick,
        full=options.full,
    )
    print(text)
    return status


def _export(options: argparse.Namespace, conf: Settings) -> int:
    request = sendcmd.Request(
        name=options.series,
        signoff=options.signoff,
        output=options.output,
        tree=options.tree,
        revision=options.revision,
        prefixes=(*(["RFC"] if options.rfc else []), *options.prefix),
        changes=options.changes,
        validated=not options.unvalidated,
        maintainers=not options.no_maintainers,
    )
    for path in sendcmd.export(conf, Cache(conf.cache_dir).open(), request):
        print(path)
    return Exit.OK


def _folder_of(conf: Settings, name: str) -> Path:
    path = conf.results_dir / name
    return path if path.exists() else Path(name)


def _report(options: argparse.Namespace, conf: Settings) -> int:
    folder = _folder_of(conf, options.run)
    whole = report.read(folder)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        report.write_atomically(options.readme, tables.update_readme(text, whole))
    if options.html:
        report.write(whole, folder if folder.is_dir() else folder.parent)
    ui.console.print(tables.render_terminal(whole))
    return checks.exit_status(whole.checks)


def _compare(options: argparse.Namespace, conf: Settings) -> int:
    first, second = (report.read(_folder_of(conf, name)) for name in (options.a, options.b))
    result = compare.compare(
        first, second, tolerance=options.tolerance, mix_provenance=options.mix_provenance
    )
    if sys.stdout.isatty():
        ui.console.print(compare.render_rich(result))
    else:
        print(compare.render_text(result))
    return Exit.OK


def _cache(options: argparse.Namespace, conf: Settings) -> int:
    return cachecmd.show(Cache(conf.cache_dir).open(), prune=options.prune, days=options.older_than)


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns the exit status; an error is one line and its mend."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = parser().parse_args(argv)
        handler: Handler = options.handler
        return int(handler(options, _settings(options)))
    except NearmetalError as error:
        ui.tell_error(error)
        return int(error.status)
    except KeyboardInterrupt:
        ui.say("interrupted; what is whole in the cache stays, the next run goes on from there")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(Exit.OK)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        ui.tell_error(
            NearmetalError(
                f"{error.strerror or error}{place}",
                hint="is there disk left, and may we write there?",
            )
        )
        return int(Exit.ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
