// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-touch CPU ECAM-BASE BUS:DEVICE.FUNCTION...
 *
 * On one CPU, reads and writes config space of functions that another CPU may
 * take away, until SIGTERM: by ECAM, which is mapped through /dev/mem, and
 * through sysfs, i.e. the ports. What is written is Vendor ID, which is
 * read-only: the write is dispatched, and changes nothing.
 *
 * Prints {"rounds": N, "present": reads of a Vendor ID that is there, "absent":
 * and that is not}. An absent function, or a sysfs file that is gone, is no
 * error; the function's number stays the same when it comes back.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>

#include "mark.h"

#define MAX_FUNCTIONS 16
#define PAGE 4096

static volatile sig_atomic_t stop;

static void end(int signal)
{
	stop = signal;
}

int main(int argc, char **argv)
{
	volatile uint32_t *page[MAX_FUNCTIONS];
	char path[MAX_FUNCTIONS][64];
	uint64_t rounds = 0, present = 0, absent = 0, base;
	unsigned int bus, device, function;
	int memory, i, fd, count = argc - 3;
	uint32_t id, zero = 0;
	cpu_set_t cpus;

	if (count < 1 || count > MAX_FUNCTIONS)
		errx(2, "usage: nm-touch CPU ECAM-BASE BUS:DEVICE.FUNCTION...");
	CPU_ZERO(&cpus);
	CPU_SET(number(argv[1]), &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		err(1, "CPU %s", argv[1]);
	base = number(argv[2]);
	memory = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
	if (memory < 0)
		err(1, "/dev/mem (CONFIG_DEVMEM, root)");
	for (i = 0; i < count; i++) {
		if (sscanf(argv[3 + i], "%x:%x.%x", &bus, &device, &function) != 3)
			errx(2, "%s is no function", argv[3 + i]);
		page[i] = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory,
			       base + ((uint64_t)bus << 20 | device << 15 | function << 12));
		if (page[i] == MAP_FAILED)
			err(1, "ECAM of %s", argv[3 + i]);
		snprintf(path[i], sizeof(path[i]), "/sys/bus/pci/devices/0000:%s/config",
			 argv[3 + i]);
	}
	signal(SIGTERM, end);
	for (; !stop; rounds++) {
		for (i = 0; i < count; i++) {
			*page[i] = 0;
			if (*page[i] == UINT32_MAX)
				absent++;
			else
				present++;
			fd = open(path[i], O_RDWR | O_CLOEXEC);
			if (fd < 0)
				continue;
			if (pread(fd, &id, sizeof(id), 0) == sizeof(id))
				(void)!pwrite(fd, &zero, sizeof(zero), 0);
			close(fd);
		}
	}
	printf("{\"rounds\": %" PRIu64 ", \"present\": %" PRIu64 ", \"absent\": %" PRIu64 "}\n",
	       rounds, present, absent);
	return 0;
}
