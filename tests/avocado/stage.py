# SPDX-License-Identifier: GPL-2.0-or-later
"""A command as an avocado test: the long stages of the nightly that are no test of the main job."""

from __future__ import annotations

import shlex
from pathlib import Path

from avocado import Test  # type: ignore[attr-defined]

from nearmetal.core import proc, settings
from nearmetal.core.errors import UsageError


class Stage(Test):  # type: ignore[misc]
    """Runs ``command`` in the repository; fails where its status is not 0, with its last line.

    :avocado: tags=stage
    """

    timeout = 6 * 3600

    def test(self) -> None:
        """Run it, with all output in ``stage.log``; it dies with this program."""
        if reason := self.params.get("skip"):
            self.cancel(reason)
        log = Path(self.outputdir) / "stage.log"
        env = shlex.split(self.params.get("environment", default=""))
        try:
            done = proc.run(
                shlex.split(self.params.get("command", default="true")),
                deadline_s=float(self.params.get("deadline", default=self.timeout)),
                cwd=settings.repository(),
                env=dict(word.split("=", 1) for word in env),
                log=log,
                check=False,
            )
        except (proc.CommandFailed, UsageError) as error:
            self.fail(str(error))
        if done.status != 0:
            last = [one for one in done.stdout.splitlines() if one.strip()][-1:]
            self.fail(f"status {done.status}: {last[0] if last else 'it said nothing'}")
