# SPDX-License-Identifier: GPL-2.0-or-later
"""Pristine sources: which releases, from where, with which checksums."""
