# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests, a package each, which carry themselves: ``api`` has the records that they define.

``registry`` finds them; nothing outside of a test's package knows its names.
"""
