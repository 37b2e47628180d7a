// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-config CONFIG-FILE OFFSET COUNT: reads the dword at OFFSET of a
 * function's config space COUNT times through sysfs, as agents and lspci do,
 * between two marks. Prints {"reads": COUNT, "ns": all of them, "value": last}.
 */
#include <stdio.h>

#include "mark.h"

int main(int argc, char **argv)
{
	uint64_t start, end, count, i;
	uint32_t value = 0;
	off_t offset;
	int fd;

	if (argc != 4)
		errx(2, "usage: nm-config CONFIG-FILE OFFSET COUNT");
	offset = number(argv[2]);
	count = number(argv[3]);
	fd = open(argv[1], O_RDONLY);
	if (fd < 0)
		err(1, "%s", argv[1]);
	mark_open();
	mark_begin();
	start = now_ns();
	for (i = 0; i < count; i++)
		if (pread(fd, &value, sizeof(value), offset) != sizeof(value))
			err(1, "%s at %#lx", argv[1], (long)offset);
	end = now_ns();
	mark_end();
	printf("{\"reads\": %llu, \"ns\": %llu, \"value\": %u}\n",
	       (unsigned long long)count, (unsigned long long)(end - start), value);
	return 0;
}
