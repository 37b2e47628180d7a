# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests: each takes a bench (a guest on a host) and gives measurements.

A test is a module with ``NAMES`` (what it must measure, so that what is missing is told) and
``measure(bench)``.
"""
