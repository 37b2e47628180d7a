// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-agent SAMPLES [PERIOD-US]
 * nm-agent -n SAMPLES [PERIOD-US]
 *   a monitoring agent. Each period (1000 us unless told) it reads the first
 *   64 bytes of the config space of every PCI function, which is what an agent
 *   needs for presence, Command and Status, and, where the kernel lets it, the
 *   cycle and instruction counters of every CPU; with -n no counters. The
 *   sampling runs between two marks.
 *
 * Prints one JSON line: samples, functions, pmu_counters, late (periods that
 * began after their time), ns, pmu (what the kernel said when it has none).
 */
#include <dirent.h>
#include <errno.h>
#include <linux/perf_event.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>

#include "mark.h"

#define MOST_FUNCTIONS 256
#define MOST_COUNTERS 64

static int functions[MOST_FUNCTIONS], function_count;
static int counters[MOST_COUNTERS], counter_count;

static void open_functions(void)
{
	static const char root[] = "/sys/bus/pci/devices";
	char path[512];
	struct dirent *entry;
	DIR *dir = opendir(root);

	if (!dir)
		err(1, "%s", root);
	while ((entry = readdir(dir)) && function_count < MOST_FUNCTIONS) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s/config", root, entry->d_name);
		functions[function_count] = open(path, O_RDONLY);
		if (functions[function_count] < 0)
			err(1, "%s", path);
		function_count++;
	}
	closedir(dir);
}

static const char *open_counters(void)
{
	static const uint64_t events[] = {
		PERF_COUNT_HW_CPU_CYCLES, PERF_COUNT_HW_INSTRUCTIONS,
	};
	struct perf_event_attr attr = {
		.type = PERF_TYPE_HARDWARE, .size = sizeof(attr), .pinned = 1,
	};
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	long cpu;
	size_t i;

	for (cpu = 0; cpu < cpus; cpu++) {
		for (i = 0; i < 2 && counter_count < MOST_COUNTERS; i++) {
			int fd;

			attr.config = events[i];
			fd = syscall(SYS_perf_event_open, &attr, -1, cpu, -1, 0);
			if (fd < 0)
				return strerror(errno);
			counters[counter_count++] = fd;
		}
	}
	return "open";
}

int main(int argc, char **argv)
{
	uint64_t samples, period, start, end, due, i, late = 0;
	const char *pmu = "not asked for";
	int no_counters = argc > 1 && !strcmp(argv[1], "-n");
	char header[64];
	int k;

	argc -= no_counters;
	argv += no_counters;
	if (argc < 2 || argc > 3)
		errx(2, "usage: nm-agent [-n] SAMPLES [PERIOD-US]");
	samples = number(argv[1]);
	period = (argc == 3 ? number(argv[2]) : 1000) * 1000;
	open_functions();
	if (!no_counters)
		pmu = open_counters();
	mark_open();
	mark_begin();
	due = start = now_ns();
	for (i = 0; i < samples; i++) {
		struct timespec wake;

		for (k = 0; k < function_count; k++)
			if (pread(functions[k], header, sizeof(header), 0) < 0)
				err(1, "config space");
		for (k = 0; k < counter_count; k++) {
			uint64_t value;

			if (read(counters[k], &value, sizeof(value)) < 0)
				err(1, "counter");
		}
		due += period;
		if (now_ns() > due) {
			late++;
			due = now_ns();
			continue;
		}
		wake.tv_sec = due / 1000000000u;
		wake.tv_nsec = due % 1000000000u;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
	}
	end = now_ns();
	mark_end();
	printf("{\"samples\": %llu, \"functions\": %d, \"pmu_counters\": %d, \"late\": %llu, \"ns\": %llu, \"pmu\": \"%s\"}\n",
	       (unsigned long long)samples, function_count, counter_count,
	       (unsigned long long)late, (unsigned long long)(end - start), pmu);
	return 0;
}
