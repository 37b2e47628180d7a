/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Marks: the host starts counting when the guest executes CPUID with a leaf
 * that no CPU has, and stops when it writes a byte to an I/O port that nothing
 * decodes (0x5f1 on q35 and pc). So what the host counts is what ran between
 * the two and nothing else. They differ because one tracepoint can hold an
 * enable_hist or a disable_hist trigger for an event, not both.
 */
#ifndef NEARMETAL_MARK_H
#define NEARMETAL_MARK_H

#include <cpuid.h>
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define MARK_LEAF 0x4e4d0000
#define MARK_PORT 0x5f1

static int mark_fd = -1;

static inline void mark_open(void)
{
	mark_fd = open("/dev/port", O_RDWR | O_CLOEXEC);
	if (mark_fd < 0)
		err(1, "/dev/port (CONFIG_DEVPORT, root)");
}

static inline void mark_begin(void)
{
	uint32_t a, b, c, d;

	__cpuid(MARK_LEAF, a, b, c, d);
}

static inline void mark_end(void)
{
	uint8_t byte = 1;

	if (pwrite(mark_fd, &byte, 1, MARK_PORT) != 1)
		err(1, "/dev/port");
}

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static inline uint64_t number(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 0);

	if (!*text || *end)
		errx(2, "not a number: %s", text);
	return value;
}

#endif
