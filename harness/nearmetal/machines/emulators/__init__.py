# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated hosts, a module each: how to switch one on, and what it lacks."""
