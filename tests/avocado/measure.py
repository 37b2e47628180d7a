# SPDX-License-Identifier: GPL-2.0-or-later
"""One test of the main job on one host, as an avocado test; tests/avocado/job.py makes its suites.

Alone: ``avocado run tests/avocado/measure.py -p test=lspci -p testbed=amd``, or
``-m tests/avocado/guests.yaml`` in place of -p for a guest of each kind.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from avocado import Test  # type: ignore[attr-defined]

from nearmetal.core import proc

FLAG = {
    "testbed": "--testbed",
    "host": "--host",
    "inventory": "--inventory",
    "guest_cpus": "--guest-cpus",
    "guest_memory": "--guest-memory",
    "guest_cpu": "--guest-cpu",
}
GRACE_S = 60.0
"""For a run that is asked to end: it takes its guests and hosts down."""


class Measure(Test):  # type: ignore[misc]
    """A test of the main job, on vanilla, off and on of each series; fails where a check fails.

    :avocado: tags=nearmetal
    """

    timeout = 3 * 3600

    def test(self) -> None:
        """Run it in a program of its own, which dies with this one; keep its report."""
        if reason := self.params.get("skip"):
            self.cancel(reason)
        words = shlex.split(self.params.get("program", default=""))
        words = [*(words or (sys.executable, "-m", "nearmetal")), "run", "-q"]
        words += ["--only", self.params.get("test", default="lspci")]
        for key, flag in FLAG.items():
            if value := self.params.get(key):
                words += [flag, str(value)]
        series = (self.params.get("series") or "").split()
        if variants := self.params.get("variants") or ("vanilla,off,on" if series else ""):
            words += ["--variant", variants]
        for one in series:
            words += ["--series", one]
        results = Path(self.outputdir)
        words += ["--results-dir", str(results)]
        self.log.info("%s", " ".join(words))
        log = results / "run.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                proc.guarded(words), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
            try:
                status = process.wait(float(self.params.get("deadline", default=self.timeout)))
            except subprocess.TimeoutExpired as error:
                self.fail(f"the run did not end within {error.timeout:.0f} s")
            finally:
                _end(process)
        said = [one for one in log.read_text(errors="replace").splitlines() if one.strip()]
        self.log.info("%s", "\n".join(said))
        reports = [one for one in results.glob("*/report.json") if one.parent.name != "latest"]
        if not reports:
            hints = [at for at, one in enumerate(said) if one.lstrip().startswith("hint:")]
            wrong = [said[at - 1] for at in hints[-1:] if at] or said[-1:]
            self.error(wrong[0] if wrong else f"the run ended with status {status}, and no word")
        report = json.loads(reports[0].read_text())
        bad = [one for one in report["checks"] if one["status"] in ("fail", "error")]
        if bad or status:
            told = [f"{one['name']}: {_why(one)}" for one in bad]
            self.fail("; ".join(told) or f"the run ended with status {status}")


def _why(check: dict[str, str]) -> str:
    """What a check that failed saw, or why nothing could be seen."""
    if check["status"] == "fail" and check["observed"]:
        return check["observed"]
    return (check["reason"].splitlines() or [check["status"]])[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a run to end, and wait until what it has up is down."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
