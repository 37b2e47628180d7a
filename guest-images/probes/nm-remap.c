// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-remap CONFIG RESOURCE SECONDS: one CPU switches memory decoding of a PCI
 * function off and on (the file CONFIG of it), while another reads a register
 * of another function (its file RESOURCE, at offset 8) and compares it with what
 * it was at first. Neither function may have a driver.
 *
 * Prints {"switches", "reads", "wrong"}: nothing that is decoded all the time may
 * read as anything else while the memory map changes.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "mark.h"

#define COMMAND 4
#define DECODE 2
#define REGISTER 8	/* NVMe: VS, which never changes */

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", cpu);
}

static uint64_t toggle(const char *path, uint64_t end)
{
	uint64_t switches = 0;
	uint16_t before, value;
	int fd = open(path, O_RDWR);

	if (fd < 0 || pread(fd, &before, 2, COMMAND) != 2)
		err(1, "%s", path);
	while (now_ns() < end) {
		value = switches++ % 2 ? before | DECODE : before & ~DECODE;
		if (pwrite(fd, &value, 2, COMMAND) != 2)
			err(1, "%s", path);
	}
	if (pwrite(fd, &before, 2, COMMAND) != 2)
		err(1, "%s", path);
	return switches;
}

int main(int argc, char **argv)
{
	uint64_t reads = 0, wrong = 0, end;
	volatile uint64_t *shared;
	volatile uint32_t *at;
	uint32_t first;
	pid_t child;
	int fd, status;

	if (argc != 4)
		errx(2, "usage: nm-remap CONFIG RESOURCE SECONDS");
	fd = open(argv[2], O_RDWR | O_SYNC);
	if (fd < 0)
		err(1, "%s", argv[2]);
	at = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED || shared == MAP_FAILED)
		err(1, "%s", argv[2]);
	end = now_ns() + number(argv[3]) * 1000000000u;
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (!child) {
		run_on(0);
		*shared = toggle(argv[1], end);
		return 0;
	}
	run_on(1);
	first = at[REGISTER / 4];
	while (now_ns() < end)
		for (int i = 0; i < 256; i++, reads++)
			wrong += at[REGISTER / 4] != first;
	if (waitpid(child, &status, 0) != child || status)
		errx(1, "the other CPU failed");
	printf("{\"switches\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"wrong\": %" PRIu64 "}\n",
	       *shared, reads, wrong);
	return 0;
}
