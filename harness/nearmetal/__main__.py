# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m nearmetal``."""

import sys

from .cli.main import main

sys.exit(main())
