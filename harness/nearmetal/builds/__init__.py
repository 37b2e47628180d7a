# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels, QEMU, Bochs, images and first file systems, each kept by what went into it.

Nothing here knows of machines or measurements. Patched variants come from the same functions
with the patches' files in the ingredients.
"""

from .emulators import QEMU_CONFIGURE, Bochs, Qemu, bochs, counter, qemu, qemu_python
from .images import (
    OVMF_CODE,
    OVMF_VARIABLES,
    Image,
    Keys,
    image,
    initramfs,
    keys,
    ovmf,
    probes,
)
from .linux import Kernel, kernel
from .own import kernel_of_build, kernel_of_tree, qemu_of_build, qemu_of_tree
from .recipe import BuildFailed, ccache, first_errors
from .selftests import kernel_selftests

__all__ = [
    "OVMF_CODE",
    "OVMF_VARIABLES",
    "QEMU_CONFIGURE",
    "Bochs",
    "BuildFailed",
    "Image",
    "Kernel",
    "Keys",
    "Qemu",
    "bochs",
    "ccache",
    "counter",
    "first_errors",
    "image",
    "initramfs",
    "kernel",
    "kernel_selftests",
    "kernel_of_build",
    "kernel_of_tree",
    "keys",
    "ovmf",
    "probes",
    "qemu",
    "qemu_of_build",
    "qemu_of_tree",
    "qemu_python",
]
