# SPDX-License-Identifier: GPL-2.0-or-later
"""What every layer uses: errors, the records that flow, programs, the cache."""
