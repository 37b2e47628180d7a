# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels, QEMU, Bochs, images and first file systems, each kept by what went into it."""
