# SPDX-License-Identifier: GPL-2.0-or-later
"""Run after run: what is remembered, what changed and since when, and the page of a night."""
