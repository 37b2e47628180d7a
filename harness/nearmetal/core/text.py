# SPDX-License-Identifier: GPL-2.0-or-later
"""Texts for people: numbers, first lines, the nearest known name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str:
    """A hint that names the nearest known name, or lists all."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(set(known)))}"


def number(value: float | None) -> str:
    """A number for people: whole numbers in full, others to 4 significant digits."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}" if digits <= 9 else f"{value:.3e}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def minutes(seconds: float) -> str:
    """A time for people: seconds up to two minutes, then minutes and seconds."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60} s"


def first_line(text: str) -> str:
    """The first line of a reason; the others are a console's or a log's."""
    lines = text.splitlines()
    return lines[0] if lines else ""


_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str) -> str:
    """A text without terminal colours and without what XML 1.0 cannot hold, not even escaped.

    Consoles are full of both.
    """
    return _NOT_XML.sub("", _ANSI.sub("", text))
