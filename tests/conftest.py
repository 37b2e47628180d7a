# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that tests start use the package of this tree, as the tests do."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "harness")
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # the user's own configuration is none of ours
