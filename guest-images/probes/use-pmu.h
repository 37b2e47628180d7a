/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Has a counter of CPU 0 count, branches in user mode, until the program ends:
 * KVM may treat a PMU that is in use in another way than one that is not.
 */
#ifndef NEARMETAL_USE_PMU_H
#define NEARMETAL_USE_PMU_H

#include <err.h>
#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline void use_pmu(void)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_HARDWARE, .size = sizeof(attr), .pinned = 1,
		.config = PERF_COUNT_HW_BRANCH_INSTRUCTIONS, .exclude_kernel = 1,
	};

	if (syscall(SYS_perf_event_open, &attr, -1, 0, -1, 0) < 0)
		err(1, "perf_event_open");
}

#endif
