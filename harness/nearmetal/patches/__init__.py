# SPDX-License-Identifier: GPL-2.0-or-later
"""patches/series.yaml: the series, what they require, and the variants that they make."""
