# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``validate --full`` asks beyond the default: other checkers, configurations, machines.

``stage`` says what a stage is and runs it, ``linux``, ``qemu`` and ``tools`` how objects are
built and files are looked at, ``plan`` which stages a series gets, ``full`` goes through them.
"""
