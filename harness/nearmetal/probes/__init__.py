# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read of a machine while it works: exits, instructions, routes, topology."""
