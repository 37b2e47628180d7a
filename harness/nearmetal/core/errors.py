# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors a user may see: one line that says what is wrong, one hint what to do."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FAILED = 1
    """A check, a measurement or a validation failed."""
    USAGE = 2
    """Wrong use: a bad option, file or name."""
    ENVIRONMENT = 3
    """The environment is broken: no disk, no network, a build or a boot that does not work."""
    INTERRUPTED = 130


class NearmetalError(Exception):
    """An error told to the user without a traceback.

    ``message`` is one line; ``hint`` says what to do; ``detail`` are lines worth
    seeing (a compiler's error, a console's tail); ``status`` is the exit status.
    """

    status: Exit = Exit.ENVIRONMENT

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        detail: str | None = None,
        status: Exit | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail
        if status is not None:
            self.status = status
        if detail:
            self.add_note(detail)  # a test that fails with it shows that


class UsageError(NearmetalError):
    """The user asked for something that does not exist or cannot be."""

    status = Exit.USAGE


class EnvironmentBroken(NearmetalError):
    """Something that the harness needs is missing or does not work."""

    status = Exit.ENVIRONMENT


class MeasurementError(NearmetalError):
    """Something should have been measured and was not (a panic, a timeout, lost events)."""

    status = Exit.FAILED
