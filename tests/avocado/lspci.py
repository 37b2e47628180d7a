# SPDX-License-Identifier: GPL-2.0-or-later
"""One measurement as an avocado test: the seed of the nightly jobs.

Run with: avocado run tests/avocado/lspci.py
"""

from __future__ import annotations

import json
from pathlib import Path

from avocado import Test  # type: ignore[attr-defined]

from nearmetal.core import settings
from nearmetal.core.settings import Settings
from nearmetal.machines import inventory
from nearmetal.runs import execute as run


class Lspci(Test):  # type: ignore[misc]
    """The lspci test on every variant there is, on the testbed or on a host of an inventory.

    :avocado: tags=testbed,lspci
    """

    timeout = 3600
    tests = ("lspci",)

    def test(self) -> None:
        """Measures and fails when a check fails; the report is in the job's results."""
        name, file = self.params.get("host"), self.params.get("inventory")
        server = inventory.pick(Path(file or "inventory.yaml"), name) if name else None
        results = Path(self.outputdir)
        conf = Settings(settings.repository(), settings.default_cache_dir().absolute(), results)
        status, folder = run.execute(
            conf, run.Options(tests=self.tests, server=server, command=f"avocado {self.name}")
        )
        report = json.loads((folder / "report.json").read_text())
        for row in report["measurements"]:
            self.log.info(
                "%s %s %s: %s %s",
                row["name"],
                row["variant"],
                row["context"],
                row["median"],
                row["unit"],
            )
        bad = [one for one in report["checks"] if one["status"] in ("fail", "error")]
        if status != 0:
            self.fail("; ".join(f"{one['name']}: {one['reason']}" for one in bad))
