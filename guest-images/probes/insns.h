/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Marks for the emulator's plugin that counts instructions
 * (guest-images/emulator/nm-insns.c): long NOPs with a displacement that is
 * ours. Where no plugin looks at them they do nothing.
 */
#ifndef NEARMETAL_INSNS_H
#define NEARMETAL_INSNS_H

#include <unistd.h>

/* spelt out: an assembler might choose another encoding */
#define INSNS_MARK(action, number) \
	asm volatile(".byte 0x0f, 0x1f, 0x84, 0x00, %c0, %c1, 0x4d, 0x4e" \
		     : : "i" (number), "i" (action) : "memory")

#define INSNS_BEGIN 1
#define INSNS_END 2

/* Logs the CPU's counts, with a number. */
#define insns_log(number) INSNS_MARK(3, number)

static inline void insns_count(void)
{
	INSNS_MARK(1, 0);
	/* all translations are dropped first, which is not done at once */
	usleep(200000);
}

static inline void insns_rest(void)
{
	INSNS_MARK(2, 0);
}

#endif
