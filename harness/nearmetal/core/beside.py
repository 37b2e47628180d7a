# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of work beside each other, each in a process of its own.

Processes, not threads: an interrupt reaches each of them, and what one waits for it can be
stopped in. A child ends with its parent, however that ends (PR_SET_PDEATHSIG, prctl(2)).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from . import ui
from .errors import NearmetalError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
"""include/uapi/linux/prctl.h"""
_END_S = 60.0
"""For a child to give back what it has, once it was told to end."""


def beside(work: Mapping[str, Callable[[], T]]) -> list[T]:
    """What each piece of work returns, in their order; the first is done in this process.

    The names stand before what each of them tells. What is returned is pickled. Raises what the
    first that broke did, once all others have ended: a NearmetalError or an OSError; a fault of
    another kind, or the end of a process by a signal, is told as a NearmetalError.
    """
    (first, mine), *others = work.items()
    with ExitStack() as stack:
        children = [_start(stack, name, one) for name, one in others]
        with ui.labelled(first):
            results = [mine()]
        for name, process, answer in children:
            results.append(_result(name, process, answer))
    return results


def _start(
    stack: ExitStack, name: str, work: Callable[[], T]
) -> tuple[str, ForkProcess, Connection]:
    """A child at work; the stack ends it where it is still at it."""
    context = multiprocessing.get_context("fork")
    answer, ours = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, work, ours, os.getpid()), name=name)
    process.start()
    ours.close()
    stack.callback(_end, process)
    return name, process, answer


def _end(process: ForkProcess) -> None:
    """Let a child end in order, or end it."""
    if process.is_alive():
        process.terminate()
    process.join(_END_S)
    if process.is_alive():
        process.kill()
        process.join()


def _child(name: str, work: Callable[[], object], answer: Connection, parent: int) -> None:
    """What a child does: it sends (True, result) or (False, error)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    try:
        with ui.labelled(name, alone=False):
            result = work()
        answer.send((True, result))
    except KeyboardInterrupt:
        os._exit(130)
    except NearmetalError as error:
        told = NearmetalError(
            error.message, hint=error.hint, detail=error.detail, status=error.status
        )
        answer.send((False, told))
    except OSError as error:
        answer.send((False, OSError(error.errno, error.strerror, error.filename)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        detail = "".join(traceback.format_exception(error))
        answer.send((False, NearmetalError(f"{name} broke: {text}", detail=detail)))


def _result(name: str, process: ForkProcess, answer: Connection) -> Any:
    try:
        good, found = answer.recv()
    except EOFError:
        process.join()
        status = process.exitcode or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise NearmetalError(
            f"the process for {name} {how}", hint="out of memory? see dmesg"
        ) from None
    if not good:
        assert isinstance(found, Exception)
        raise found
    return found
