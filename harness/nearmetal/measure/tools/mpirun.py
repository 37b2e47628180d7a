# SPDX-License-Identifier: GPL-2.0-or-later
"""nccl-tests on several machines, started by Open MPI's mpirun on the first of them.

One process for each GPU, those of the first machine first. mpirun logs in to the others by SSH, as
the user of the first, and asks nobody: keys and host keys have to be there.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...core.errors import MeasurementError
from ...machines.inventory import Tool
from .reading import complaint, tail

PROGRAM = "mpirun"

_MENDS: Mapping[str, str] = {
    "Host key verification failed": "log in once from the first node to the others by hand: "
    "mpirun starts its daemons there by SSH",
    "Permission denied": "the first node gets into the others by SSH without a question only with "
    "its user's key in their authorized_keys",
    "Could not resolve hostname": "correct 'address' of the node: the first one finds it by that",
    "not enough slots": "fewer 'gpus', or words for 'mpirun' that allow more (--oversubscribe)",
    "unable to find the specified executable": "the program has to be at one path on all nodes",
    "could not access": "the program has to be at one path on all nodes",
    "unable to launch the specified application": "the program has to be at one path on all nodes",
    "unable to reliably start": "is Open MPI of one version at one path on all nodes, and does a "
    "firewall between them let it through?",
    "unrecognized argument": "Open MPI's mpirun is needed",
    "unrecognized option": "Open MPI's mpirun is needed",
}


def ranks(tool: Tool) -> int:
    """How many processes there are on all nodes."""
    return sum(end.gpus for end in tool.ends)


def words(tool: Tool) -> list[str]:
    """What to put in front of the program."""
    hosts = ",".join(f"{end.address}:{end.gpus}" for end in tool.ends)
    count = str(ranks(tool))
    return [PROGRAM, "--allow-run-as-root", "-np", count, "--host", hosts, *tool.mpirun]


def failure(output: str) -> MeasurementError | None:
    """What kept mpirun from starting the processes, if that is what its output speaks of."""
    mark = next((mark for mark in _MENDS if mark in output), None)
    if mark is None:
        return None
    said = complaint(output, (mark,))
    return MeasurementError(f"{PROGRAM}: {said}", detail=tail(output), hint=_MENDS[mark])
