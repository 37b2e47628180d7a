# SPDX-License-Identifier: GPL-2.0-or-later
"""PCI Express as pure functions: registers, config space, layouts of RAM around windows."""
