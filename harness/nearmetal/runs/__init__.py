# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job: what is planned, and how it is carried out."""
