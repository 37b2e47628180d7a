# SPDX-License-Identifier: GPL-2.0-or-later
"""A run for people and programs: report.json, JUnit XML, the page, tables, comparisons."""
