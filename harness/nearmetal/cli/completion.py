# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``completion`` and ``man``, both made from the parser: what is there is in them.

shtab has no fish and argparse-manpage no sub-subcommands; each is about as much code as this.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import __version__
from ..core.errors import Exit
from ..core.model import VARIANTS
from ..core.settings import Settings
from ..measure import registry
from ..patches import series
from .common import Commands, Parser, common_options


@dataclass(frozen=True)
class Word:
    """An option, or a word that stands by itself: what may be written for its value."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...] = ()
    """Known ones; none where anything goes."""
    files: bool = False


@dataclass(frozen=True)
class Level:
    """A command, or the program itself (``at`` is empty): what may follow it."""

    at: str
    """The commands up to it, as in ``/tree/checkout``."""
    parser: argparse.ArgumentParser
    commands: tuple[tuple[str, str], ...]
    """Its own commands, and what they do."""
    words: tuple[Word, ...]

    @property
    def options(self) -> tuple[Word, ...]:
        """Those of its words that are options."""
        return tuple(word for word in self.words if word.names)

    @property
    def first(self) -> tuple[str, ...]:
        """What may be written behind it: commands, values of words, options."""
        plain = [value for word in self.words if not word.names for value in word.values]
        names = [name for word in self.options for name in word.names]
        return (*(name for name, _ in self.commands), *plain, *names)

    @property
    def files(self) -> bool:
        """Whether a file may be written behind it."""
        return any(word.files for word in self.words if not word.names)


def levels(parser: argparse.ArgumentParser, known: dict[str, Collection[str]]) -> Iterator[Level]:
    """The program and all its commands; ``known`` are values.

    Its keys are names of options, or a command and a name, as in ``/run only``.
    """
    return _levels(parser, "", known)


def _levels(
    parser: argparse.ArgumentParser, at: str, known: dict[str, Collection[str]]
) -> Iterator[Level]:
    below: dict[str, argparse.ArgumentParser] = {}
    helps: dict[str, str] = {}
    words = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            helps = {one.dest: one.help or "" for one in action._choices_actions}
        elif action.help != argparse.SUPPRESS:
            key = f"{at} {action.dest}"
            values = action.choices or known.get(key, known.get(action.dest, ()))
            words.append(
                Word(
                    tuple(action.option_strings),
                    _expanded(parser, action),
                    action.nargs != 0,
                    tuple(map(str, values)),
                    files=action.type is Path,
                )
            )
    yield Level(at, parser, tuple((name, helps[name]) for name in below), tuple(words))
    for name, one in below.items():
        yield from _levels(one, f"{at}/{name}", known)


def _expanded(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def bash(every: Sequence[Level]) -> str:
    """A completion for bash."""
    return "\n".join(
        [
            "# completion of nearmetal for bash: made by 'nearmetal completion bash'",
            "_nearmetal() {",
            "\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} at= word",
            "\tCOMPREPLY=()",
            '\tfor word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            f'\t\tcase "$at/$word" in {_paths(every)}) at=$at/$word ;; esac',
            "\tdone",
            *_cases(
                every,
                'COMPREPLY=($(compgen -W "{}" -- "$cur"))',
                'COMPREPLY=($(compgen -f -- "$cur"))',
            ),
            "}",
            "complete -o filenames -F _nearmetal nearmetal",
            "",
        ]
    )


def zsh(every: Sequence[Level]) -> str:
    """A completion for zsh."""
    return "\n".join(
        [
            "#compdef nearmetal",
            "# completion of nearmetal for zsh: made by 'nearmetal completion zsh'",
            "_nearmetal() {",
            "\tlocal prev=${words[CURRENT-1]} at= word",
            "\tfor word in ${words[2,CURRENT-1]}; do",
            f'\t\tcase "$at/$word" in {_paths(every)}) at=$at/$word ;; esac',
            "\tdone",
            *_cases(every, "compadd -- {}", "_files"),
            "}",
            "compdef _nearmetal nearmetal",
            "",
        ]
    )


def _paths(every: Sequence[Level]) -> str:
    return " | ".join(level.at for level in every if level.at)


def _cases(every: Sequence[Level], words: str, files: str) -> Iterator[str]:
    """The values of the option before, or else what may follow the command."""
    yield '\tcase "$at $prev" in'
    for level in every:
        for one in level.options:
            if one.takes_value:
                pattern = " | ".join(f'"{level.at} {name}"' for name in one.names)
                told = words.format(" ".join(one.values)) if one.values else ""
                yield f"\t{pattern}) {files if one.files else told or ':'}; return ;;"
    yield "\tesac"
    yield '\tcase "$at" in'
    for level in every:
        told = words.format(" ".join(level.first))
        more = f"; {files.replace('=(', '+=(')}" if level.files else ""
        yield f'\t"{level.at}") {told}{more} ;;'
    yield "\tesac"


def fish(every: Sequence[Level]) -> str:
    """A completion for fish."""
    lines = [
        "# completion of nearmetal for fish: made by 'nearmetal completion fish'",
        "function __nearmetal_at",
        "\tset -l at ''",
        "\tfor word in (commandline -opc)[2..-1]",
        f"\t\tif contains -- $at/$word {' '.join(one.at for one in every if one.at)}",
        "\t\t\tset at $at/$word",
        "\t\tend",
        "\tend",
        '\ttest "$at" = "$argv[1]"',
        "end",
    ]
    for level in every:
        here = f"complete -c nearmetal -n '__nearmetal_at \"{level.at}\"'"
        if not level.files:
            lines.append(f"{here} -f")
        for name, about in level.commands:
            lines.append(f"{here} -a {name} -d {_quoted(about)}")
        for word in level.words:
            values = f" -a {_quoted(' '.join(word.values))}" if word.values else ""
            if not word.names:
                if values:
                    lines.append(f"{here}{values}")
                continue
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in word.names
            )
            takes = "" if not word.takes_value else " -r -F" if word.files else " -x"
            lines.append(f"{here} {names}{takes}{values} -d {_quoted(word.help)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """A text for fish, which takes backslashes within single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def manual(every: Sequence[Level]) -> str:
    """The man page of the program and of all its commands, in the man macros."""
    top = every[0].parser
    lines = [
        ".\\\" made by 'nearmetal man'",
        f'.TH NEARMETAL 1 "" "nearmetal {__version__}" "User Commands"',
        ".SH NAME",
        "nearmetal \\- build, boot, measure and judge patch series for virtual machines",
        ".SH SYNOPSIS",
        ".B nearmetal",
        "COMMAND [OPTIONS]",
        ".SH DESCRIPTION",
        _roff(top.description or ""),
        ".SH COMMANDS",
    ]
    for level in every[1:]:
        lines += [".SS " + _roff(f"nearmetal{level.at.replace('/', ' ')}")]
        usage = " ".join(level.parser.format_usage().removeprefix("usage: ").split())
        lines += [_roff(usage), ".PP", _roff(level.parser.description or "")]
        lines += [f".TP\n.B {_roff(name)}\n{_roff(about)}" for name, about in level.commands]
        for word, action in zip(
            level.words,
            [one for one in level.parser._actions if _is_word(one)],
            strict=True,
        ):
            value = action.metavar or (action.dest if not word.values else "|".join(word.values))
            head = ", ".join(word.names) + (f" {value}" if word.takes_value else "")
            lines += [".TP", f".B {_roff(head.strip())}", _roff(word.help)]
    lines += [
        ".SH FILES",
        ".TP",
        ".I ~/.config/nearmetal/config.yaml",
        "Defaults of your own: cache_dir, results_dir, jobs, inventory.",
        ".SH EXIT STATUS",
        _roff(top.epilog or ""),
        "",
    ]
    return "\n".join(line for line in lines if line != "") + "\n"


def _is_word(action: argparse.Action) -> bool:
    return not isinstance(action, argparse._SubParsersAction) and action.help != argparse.SUPPRESS


def _roff(text: str) -> str:
    """A text as troff takes it: no escapes, no line that begins as a request does."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def add(commands: Commands) -> None:
    """Add the commands."""
    one = commands.add(
        "completion",
        "print a completion script for a shell",
        partial(_completion, commands.top),
        common_options(only=()),
    )
    one.description = (
        "Print a completion script. bash: source <(nearmetal completion bash); zsh: the same,"
        " after compinit; fish: nearmetal completion fish | source."
    )
    one.add_argument("shell", choices=tuple(SHELLS), help="which shell")
    commands.add(
        "man",
        "print the man page",
        partial(_man, commands.top),
        common_options(only=()),
    ).description = "Print the man page: 'nearmetal man | man -l -' shows it."


def _known(conf: Settings) -> dict[str, Collection[str]]:
    """Values of options that are no choices, since a wrong one gets the nearest name."""
    every = dict.fromkeys(one.name for one in series.load_series(conf.repo / "patches"))
    return {
        "/run only": tuple(registry.tests()),
        "variant": VARIANTS,
        "series": tuple(every),
        "metric": tuple(registry.metrics()),
    }


def _completion(top: Parser, options: argparse.Namespace, conf: Settings) -> int:
    print(SHELLS[options.shell](list(levels(top, _known(conf)))), end="")
    return Exit.OK


def _man(top: Parser, options: argparse.Namespace, conf: Settings) -> int:
    print(manual(list(levels(top, _known(conf)))), end="")
    return Exit.OK
