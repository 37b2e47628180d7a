# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines that are up: consoles, shells, hosts, guests, emulators, the inventory."""
