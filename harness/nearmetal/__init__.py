# SPDX-License-Identifier: GPL-2.0-or-later
"""nearmetal: builds, boots, measures and judges the project's patch series.

Data flows one way: sources -> builds -> machines -> measurements -> checks -> report.
"""

__version__ = "0.1.0"
