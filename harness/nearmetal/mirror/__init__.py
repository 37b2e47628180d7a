# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that looks like its host: its PCI tree, its NUMA nodes, what its peers can do."""
