# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks as data, and their verdicts."""
