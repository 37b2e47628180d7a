# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches on their way to maintainers: work trees, validation, mails."""
