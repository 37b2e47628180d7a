// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Works that use or need performance counters. All print one JSON line.
 *
 * nm-pmu exact LOOPS RUNS
 *   counts a loop of 2 * LOOPS + 1 instructions, LOOPS of them branches, in
 *   user mode, RUNS times, with counters of its own
 * nm-pmu spin LOOPS
 *   that loop between two marks: something for perf to look at
 * nm-pmu rdpmc READS
 *   reads a counter READS times by RDPMC, as perf_event_mmap_page tells to,
 *   between two marks
 * nm-pmu switch ROUNDS
 *   hands a byte to another process on the same CPU and back, ROUNDS times,
 *   between two marks: two context switches each
 * nm-pmu write MSR WRITES
 *   writes an event selector WRITES times, with another event each time, but
 *   never enables it; between two marks, while another counter counts
 * nm-pmu fixed ROUNDS
 *   switches all of Intel's fixed counters on, lets them count a loop in user
 *   mode, reads them by RDPMC and switches them off, ROUNDS times, by their
 *   registers; between two marks. perf must not use counters meanwhile
 * nm-pmu leak RUNS EXITS
 *   counts all instructions of this guest while it exits EXITS times to KVM
 *   and as often to its user, RUNS times, each between two marks of the
 *   emulator's plugin (insns.h)
 */
#define _GNU_SOURCE
#include <linux/perf_event.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "insns.h"
#include "mark.h"
#include "use-pmu.h"

#define MOST_RUNS 1000

/* a port that nothing decodes: not the one of the marks */
#define EXIT_PORT 0x5f2

static int counter(uint64_t event, int group, int cpu, int user_only)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_HARDWARE, .size = sizeof(attr), .config = event,
		.pinned = group < 0, .disabled = group < 0, .exclude_kernel = user_only,
	};
	int fd = syscall(SYS_perf_event_open, &attr, cpu < 0 ? 0 : -1, cpu, group, 0);

	if (fd < 0)
		err(1, "perf_event_open");
	return fd;
}

static uint64_t value(int fd)
{
	uint64_t count;

	if (read(fd, &count, sizeof(count)) != sizeof(count))
		errx(1, "a counter was not scheduled");
	return count;
}

static void stay(void)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(0, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		err(1, "sched_setaffinity");
}

static inline void loop(uint64_t length)
{
	asm volatile("mov %0, %%rcx\n"
		     "1: dec %%rcx\n"
		     "jnz 1b"
		     : : "r" (length) : "rcx", "cc");
}

static uint64_t numbers[2][MOST_RUNS + 1];

static void print_numbers(const char *name, const uint64_t *from, uint64_t count)
{
	uint64_t i;

	printf("\"%s\": [", name);
	for (i = 0; i < count; i++)
		printf("%s%llu", i ? ", " : "", (unsigned long long)from[i]);
	printf("]");
}

static void exact(uint64_t loops, uint64_t runs)
{
	int insns = counter(PERF_COUNT_HW_INSTRUCTIONS, -1, -1, 1);
	int branches = counter(PERF_COUNT_HW_BRANCH_INSTRUCTIONS, insns, -1, 1);
	uint64_t i;

	for (i = 0; i < runs; i++) {
		ioctl(insns, PERF_EVENT_IOC_RESET, PERF_IOC_FLAG_GROUP);
		ioctl(insns, PERF_EVENT_IOC_ENABLE, PERF_IOC_FLAG_GROUP);
		loop(loops);
		ioctl(insns, PERF_EVENT_IOC_DISABLE, PERF_IOC_FLAG_GROUP);
		numbers[0][i] = value(insns);
		numbers[1][i] = value(branches);
	}
	printf("{\"loops\": %llu, ", (unsigned long long)loops);
	print_numbers("instructions", numbers[0], runs);
	printf(", ");
	print_numbers("branches", numbers[1], runs);
	printf("}\n");
}

static volatile struct perf_event_mmap_page *page_of(int fd)
{
	volatile struct perf_event_mmap_page *page =
		mmap(NULL, sysconf(_SC_PAGESIZE), PROT_READ, MAP_SHARED, fd, 0);

	if (page == MAP_FAILED)
		err(1, "mmap of a counter");
	if (!page->cap_user_rdpmc)
		errx(1, "the kernel doesn't let programs use RDPMC");
	return page;
}

static inline uint64_t rdpmc(uint32_t index)
{
	uint32_t low, high;

	asm volatile("rdpmc" : "=a" (low), "=d" (high) : "c" (index));
	return low | (uint64_t)high << 32;
}

static void read_often(uint64_t reads)
{
	int fd = counter(PERF_COUNT_HW_INSTRUCTIONS, -1, -1, 1);
	volatile struct perf_event_mmap_page *page = page_of(fd);
	uint64_t i, done = 0;
	uint32_t seq, index;

	ioctl(fd, PERF_EVENT_IOC_ENABLE, 0);
	mark_begin();
	for (i = 0; i < reads; i++) {
		do {
			seq = page->lock;
			asm volatile("" : : : "memory");
			index = page->index;
			if (index) {
				rdpmc(index - 1);
				done++;
			}
			asm volatile("" : : : "memory");
		} while (page->lock != seq);
	}
	mark_end();
	if (done < reads)
		errx(1, "%llu of %llu reads found the counter off",
		     (unsigned long long)(reads - done), (unsigned long long)reads);
	printf("{\"samples\": %llu}\n", (unsigned long long)done);
}

static void pass(int from, int to)
{
	char byte;

	if (read(from, &byte, 1) != 1 || write(to, &byte, 1) != 1)
		err(1, "pipe");
}

static void hand_over(uint64_t rounds)
{
	int there[2], back[2];
	uint64_t i;
	pid_t child;

	stay();
	if (pipe(there) || pipe(back))
		err(1, "pipe");
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (!child) {
		for (i = 0; i < rounds; i++)
			pass(there[0], back[1]);
		_exit(0);
	}
	mark_begin();
	for (i = 0; i < rounds; i++) {
		if (write(there[1], "", 1) != 1)
			err(1, "pipe");
		if (read(back[0], &(char){0}, 1) != 1)
			err(1, "pipe");
	}
	mark_end();
	waitpid(child, NULL, 0);
	printf("{\"samples\": %llu}\n", (unsigned long long)rounds);
}

static void select_often(uint32_t msr, uint64_t writes)
{
	uint64_t i, selector;
	int fd = open("/dev/cpu/0/msr", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		err(1, "/dev/cpu/0/msr");
	stay();
	use_pmu();
	mark_begin();
	for (i = 0; i <= writes; i++) {
		selector = i == writes ? 0 : 0xc2 + (i & 1);
		if (pwrite(fd, &selector, sizeof(selector), msr) != sizeof(selector))
			err(1, "MSR %#x", msr);
	}
	mark_end();
	printf("{\"samples\": %llu}\n", (unsigned long long)writes + 1);
}

#define MOST_FIXED 16
#define FIXED_LOOPS 1000
#define MSR_FIXED_CTR0 0x309
#define MSR_FIXED_CTR_CTRL 0x38d
#define MSR_PERF_GLOBAL_CTRL 0x38f

static void wrmsr(int fd, uint32_t msr, uint64_t value)
{
	if (pwrite(fd, &value, sizeof(value), msr) != sizeof(value))
		err(1, "MSR %#x", msr);
}

static void fixed(uint64_t rounds)
{
	int fd = open("/dev/cpu/0/msr", O_RDWR | O_CLOEXEC);
	uint64_t i, n, before[MOST_FIXED], count, all, control = 0;
	uint32_t a, b, c, counters;

	if (fd < 0)
		err(1, "/dev/cpu/0/msr");
	if (pread(fd, &all, sizeof(all), MSR_PERF_GLOBAL_CTRL) != sizeof(all))
		err(1, "MSR %#x", MSR_PERF_GLOBAL_CTRL);
	__cpuid(0xa, a, b, c, counters);
	counters &= 0x1f;
	if (!counters || counters > MOST_FIXED)
		errx(1, "%u fixed counters", counters);
	stay();
	for (n = 0; n < counters; n++) {
		wrmsr(fd, MSR_FIXED_CTR0 + n, 0);
		control |= 2ULL << 4 * n;
	}
	mark_begin();
	for (i = 0; i < rounds; i++) {
		wrmsr(fd, MSR_FIXED_CTR_CTRL, control);
		wrmsr(fd, MSR_PERF_GLOBAL_CTRL, ((1ULL << counters) - 1) << 32);
		for (n = 0; n < counters; n++)
			before[n] = rdpmc(1 << 30 | n);
		loop(FIXED_LOOPS);
		for (n = 0; n < counters; n++) {
			count = rdpmc(1 << 30 | n) - before[n];
			/* the first one counts instructions; nothing is known of the others */
			if (count < (n ? 1 : 2 * FIXED_LOOPS + 1))
				errx(1, "fixed counter %d counted %d", (int)n, (int)count);
		}
		wrmsr(fd, MSR_PERF_GLOBAL_CTRL, 0);
		wrmsr(fd, MSR_FIXED_CTR_CTRL, 0);
	}
	mark_end();
	wrmsr(fd, MSR_PERF_GLOBAL_CTRL, all);
	printf("{\"samples\": %llu, \"counters\": %u}\n", (unsigned long long)rounds, counters);
}

static void leak(uint64_t runs, uint64_t exits)
{
	int fd = counter(PERF_COUNT_HW_INSTRUCTIONS, -1, 0, 0);
	int port = open("/dev/port", O_RDWR | O_CLOEXEC);
	volatile struct perf_event_mmap_page *page = page_of(fd);
	uint32_t a, b, c, d, index;
	uint64_t i, k, start;

	if (port < 0)
		err(1, "/dev/port");
	stay();
	ioctl(fd, PERF_EVENT_IOC_ENABLE, 0);
	index = page->index;
	if (!index)
		errx(1, "the counter is off");
	index--;
	insns_count();
	/* the first run is for whoever has to see all this once */
	for (i = 0; i <= runs; i++) {
		start = rdpmc(index);
		if (i)
			insns_log(INSNS_BEGIN);
		for (k = 0; k < exits; k++) {
			__cpuid(0, a, b, c, d);
			if (pwrite(port, "", 1, EXIT_PORT) != 1)
				err(1, "/dev/port");
		}
		if (i)
			insns_log(INSNS_END);
		numbers[0][i] = (rdpmc(index) - start) & 0xffffffffffff;
		if (page->index != index + 1)
			errx(1, "the counter has moved");
	}
	insns_rest();
	printf("{");
	print_numbers("instructions", numbers[0] + 1, runs);
	printf("}\n");
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	uint64_t first = argc > 2 ? number(argv[2]) : 0;
	uint64_t second = argc > 3 ? number(argv[3]) : 0;

	if (second > MOST_RUNS && !strcmp(what, "exact"))
		errx(2, "at most %d runs", MOST_RUNS);
	if (first > MOST_RUNS && !strcmp(what, "leak"))
		errx(2, "at most %d runs", MOST_RUNS);
	mark_open();
	if (!strcmp(what, "exact") && argc == 4) {
		exact(first, second);
	} else if (!strcmp(what, "spin") && argc == 3) {
		mark_begin();
		loop(first);
		mark_end();
		printf("{\"loops\": %llu}\n", (unsigned long long)first);
	} else if (!strcmp(what, "rdpmc") && argc == 3) {
		read_often(first);
	} else if (!strcmp(what, "switch") && argc == 3) {
		hand_over(first);
	} else if (!strcmp(what, "write") && argc == 4) {
		select_often(first, second);
	} else if (!strcmp(what, "fixed") && argc == 3) {
		fixed(first);
	} else if (!strcmp(what, "leak") && argc == 4) {
		leak(first, second);
	} else {
		errx(2, "usage: nm-pmu exact LOOPS RUNS | spin LOOPS | rdpmc READS | switch ROUNDS |\n"
			"  write MSR WRITES | fixed ROUNDS | leak RUNS EXITS");
	}
	return 0;
}
