// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-mmio read ADDRESS WIDTH COUNT
 *   reads WIDTH bits (32 or 64) at a physical address COUNT times, between two
 *   marks, through /dev/mem and uncached
 * nm-mmio write ADDRESS WIDTH VALUE
 *   writes there once
 * nm-mmio scan ADDRESS BYTES
 *   reads every dword of a range once
 *
 * Prints {"value": what was read last} or, for scan, {"dwords": {"offset":
 * value}} with those that are not zero. The kernel must allow it
 * (CONFIG_STRICT_DEVMEM off, or a range that no driver has).
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "mark.h"

#define PAGE 4096ull

static volatile uint8_t *map(uint64_t address, uint64_t length, int writing)
{
	int fd = open("/dev/mem", (writing ? O_RDWR : O_RDONLY) | O_SYNC | O_CLOEXEC);
	uint64_t first = address & ~(PAGE - 1);
	uint8_t *there;

	if (fd < 0)
		err(1, "/dev/mem (CONFIG_DEVMEM, root)");
	there = mmap(NULL, address + length - first, PROT_READ | (writing ? PROT_WRITE : 0),
		     MAP_SHARED, fd, first);
	if (there == MAP_FAILED)
		err(1, "mapping %#" PRIx64, address);
	return there + (address - first);
}

static uint64_t load(volatile uint8_t *at, uint64_t width)
{
	return width == 64 ? *(volatile uint64_t *)at : *(volatile uint32_t *)at;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int writing = !strcmp(what, "write"), scan = !strcmp(what, "scan");
	uint64_t address, width = 32, last, value = 0;
	volatile uint8_t *there;
	const char *comma = "";

	if (argc != (scan ? 4 : 5) || !(writing || scan || !strcmp(what, "read")))
		errx(2, "usage: nm-mmio read ADDRESS WIDTH COUNT | write ADDRESS WIDTH VALUE | scan ADDRESS BYTES");
	address = number(argv[2]);
	if (!scan)
		width = number(argv[3]);
	if (width != 32 && width != 64)
		errx(2, "32 or 64 bits, not %s", argv[3]);
	last = number(argv[scan ? 3 : 4]);
	there = map(address, scan ? last : width / 8, writing);

	if (scan) {
		printf("{\"dwords\": {");
		for (uint64_t at = 0; at < last; at += 4) {
			value = load(there + at, 32);
			if (value) {
				printf("%s\"%#" PRIx64 "\": %" PRIu64, comma, at, value);
				comma = ", ";
			}
		}
		printf("}}\n");
		return 0;
	}
	if (writing) {
		if (width == 64)
			*(volatile uint64_t *)there = last;
		else
			*(volatile uint32_t *)there = last;
	} else {
		mark_open();
		value = load(there, width);
		mark_begin();
		for (uint64_t i = 0; i < last; i++)
			value = load(there, width);
		mark_end();
	}
	printf("{\"value\": %" PRIu64 "}\n", value);
	return 0;
}
