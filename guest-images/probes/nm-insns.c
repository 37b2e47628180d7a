// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-insns COUNT loop LENGTH
 * nm-insns COUNT config CONFIG-FILE OFFSET
 * nm-insns COUNT ports PORT
 * nm-insns COUNT msr REGISTER
 *
 * does something COUNT times, each time between two marks at which the
 * emulator logs how many instructions the CPU has executed (insns.h):
 *
 *   loop    a loop of exactly 2 * LENGTH + 1 instructions
 *   config  a read of the dword at OFFSET of a function's config space
 *           through sysfs, as agents and lspci do
 *   ports   a write of a byte to PORT of what was there before, and a read of
 *           it
 *   msr     a write of a performance event selector, with another event each
 *           time and not enabled, through /dev/cpu/0/msr, while another counter
 *           counts
 *
 * Prints {"pairs": COUNT, "value": what was read last}.
 */
#include <stdio.h>
#include <string.h>

#include "insns.h"
#include "mark.h"
#include "use-pmu.h"

static uint32_t value;
static off_t place;
static int fd;

static inline void loop(uint64_t length)
{
	asm volatile("mov %0, %%rcx\n"
		     "1: dec %%rcx\n"
		     "jnz 1b"
		     : : "r" (length) : "rcx", "cc");
}

static inline void config(void)
{
	if (pread(fd, &value, sizeof(value), place) != sizeof(value))
		err(1, "config space at %#lx", (long)place);
}

static inline void ports(uint8_t byte)
{
	if (pwrite(fd, &byte, 1, place) != 1 || pread(fd, &value, 1, place) != 1)
		err(1, "port %#lx", (long)place);
}

static inline void msr(uint64_t event)
{
	if (pwrite(fd, &event, sizeof(event), place) != sizeof(event))
		err(1, "MSR %#lx", (long)place);
}

#define REPEAT(count, what) \
	do { \
		for (uint64_t i = 0; i < (count); i++) { \
			insns_log(INSNS_BEGIN); \
			what; \
			insns_log(INSNS_END); \
		} \
	} while (0)

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[2] : "";
	uint64_t count, length = 0;

	if (!strcmp(what, "loop") && argc == 4)
		length = number(argv[3]);
	else if (!strcmp(what, "config") && argc == 5)
		place = number(argv[4]);
	else if ((!strcmp(what, "ports") || !strcmp(what, "msr")) && argc == 4)
		place = number(argv[3]);
	else
		errx(2, "usage: nm-insns COUNT loop LENGTH | config FILE OFFSET | ports PORT | msr REGISTER");
	count = number(argv[1]);
	if (*what != 'l') {
		const char *file = *what == 'c' ? argv[3] :
				   *what == 'p' ? "/dev/port" : "/dev/cpu/0/msr";

		fd = open(file, (*what == 'c' ? O_RDONLY : O_RDWR) | O_CLOEXEC);
		if (fd < 0)
			err(1, "%s", file);
	}

	/* all that is touched below is there, and known to whoever caches it */
	if (*what == 'c')
		config();
	if (*what == 'p' && pread(fd, &value, 1, place) != 1)
		err(1, "port %#lx", (long)place);
	if (*what == 'm')
		use_pmu();
	insns_count();
	if (*what == 'l')
		REPEAT(count, loop(length));
	else if (*what == 'c')
		REPEAT(count, config());
	else if (*what == 'p')
		REPEAT(count, ports(value));
	else
		REPEAT(count, msr(0xc2 + (i & 1)));
	insns_rest();
	if (*what == 'm')
		msr(0);
	printf("{\"pairs\": %llu, \"value\": %u}\n", (unsigned long long)count, value);
	return 0;
}
