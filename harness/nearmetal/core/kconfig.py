# SPDX-License-Identifier: GPL-2.0-or-later
"""Configurations of the kernel as lines of text."""

from __future__ import annotations


def lost_options(fragment: str, config: str) -> list[str]:
    """The lines of a configuration fragment that a .config does not hold."""
    lines = set(config.splitlines())
    lost = []
    for line in fragment.splitlines():
        if not line.startswith("CONFIG_"):
            continue
        name, _, value = line.partition("=")
        held = line in lines if value != "n" else not any(x.startswith(f"{name}=") for x in lines)
        if not held:
            lost.append(line)
    return lost
