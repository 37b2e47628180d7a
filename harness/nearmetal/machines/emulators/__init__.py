# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated hosts, a module each: how to switch one on, and what it lacks."""

from collections.abc import Mapping
from types import MappingProxyType

from . import bochs, qemu
from .testbed import Emulator

EMULATORS: Mapping[str, Emulator] = MappingProxyType(
    {one.name: one for one in (qemu.EMULATOR, bochs.EMULATOR)}
)
"""All emulators by the name of their testbed; the first is the default."""

__all__ = ["EMULATORS", "Emulator"]
