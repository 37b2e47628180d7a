# SPDX-License-Identifier: GPL-2.0-or-later
"""What others' tools print on servers, read: pure functions from text to readings.

A module a tool. Each refuses what it does not know for sure (a text that ends early, a unit that
is not there, data that was wrong): a figure that was guessed is worse than none.
"""
