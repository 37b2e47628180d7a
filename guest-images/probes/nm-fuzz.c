// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-fuzz SEED OPERATIONS ECAM-BASE [-w BB:DD.F]... [-b BB:DD.F] [-i BB:DD.F]
 *
 * A seeded random program of config accesses to the functions that sysfs shows.
 * Each read through sysfs, which takes ports 0xcf8 and 0xcfc below offset 256, is
 * held against reads of the same bytes through the memory-mapped window (ECAM)
 * before and after it, which no cache serves: equal to neither is a mismatch.
 *
 * -w  functions that nobody uses: their writable registers are changed, their
 *     BARs sized, and they are reset (FLR) if they can
 * -b  a root port: the bus behind it is given another number, and its own again
 * -i  an edu device (QEMU, docs/specs/edu.rst): its INTx is raised and lowered,
 *     which changes Interrupt Status with no config write at all
 *
 * SIGTERM ends it behind the operation that it is at.
 *
 * Prints {"operations", "reads", "writes", "resets", "renumberings",
 * "interrupts", "mismatches", "first"}.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "mark.h"

#define MAX_FUNCTIONS 64
#define NEW_BUS 0x60

static uint64_t seed;
static uint64_t ecam_base;
static volatile uint8_t *ecam_bus[256];
static uint16_t functions[MAX_FUNCTIONS], writable[MAX_FUNCTIONS];
static int nr_functions, nr_writable;
static int port = -1, intx = -1;
static volatile uint32_t *intx_regs;
static unsigned long reads, writes, resets, renumberings, interrupts, mismatches;
static char first[160];

static uint32_t rnd(uint32_t below)
{
	/* xorshift64*, Vigna 2016 */
	seed ^= seed >> 12;
	seed ^= seed << 25;
	seed ^= seed >> 27;
	return (uint32_t)((seed * 0x2545f4914f6cdd1dull) >> 32) % below;
}

static volatile uint8_t *ecam(uint16_t bdf, int offset)
{
	int bus = bdf >> 8;

	if (!ecam_bus[bus]) {
		int fd = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
		void *map;

		if (fd < 0)
			err(1, "/dev/mem");
		map = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			   ecam_base + ((uint64_t)bus << 20));
		if (map == MAP_FAILED)
			err(1, "ECAM of bus %02x", bus);
		close(fd);
		ecam_bus[bus] = map;
	}
	return ecam_bus[bus] + ((bdf & 0xff) << 12) + offset;
}

static uint32_t ecam_read(uint16_t bdf, int offset, int size)
{
	volatile uint8_t *p = ecam(bdf, offset);

	return size == 1 ? *p : size == 2 ? *(volatile uint16_t *)p : *(volatile uint32_t *)p;
}

static void ecam_write(uint16_t bdf, int offset, int size, uint32_t value)
{
	volatile uint8_t *p = ecam(bdf, offset);

	if (size == 1)
		*p = value;
	else if (size == 2)
		*(volatile uint16_t *)p = value;
	else
		*(volatile uint32_t *)p = value;
}

/* the config file of a function in sysfs; it stays when the function goes */
static int config_file(uint16_t bdf)
{
	static int files[65536];
	char path[64];

	if (!files[bdf]) {
		snprintf(path, sizeof(path), "/sys/bus/pci/devices/0000:%02x:%02x.%x/config",
			 bdf >> 8, bdf >> 3 & 31, bdf & 7);
		files[bdf] = open(path, O_RDWR | O_CLOEXEC);
		if (files[bdf] < 0)
			err(1, "%s", path);
	}
	return files[bdf];
}

static void write_config(uint16_t bdf, int offset, int size, uint32_t value)
{
	writes++;
	if (rnd(2))
		ecam_write(bdf, offset, size, value);
	else if (pwrite(config_file(bdf), &value, size, offset) != size)
		err(1, "config write");
}

static void compare(uint16_t bdf, int offset, int size, const char *when)
{
	uint32_t before, after, value = 0;

	reads++;
	before = ecam_read(bdf, offset, size);
	if (pread(config_file(bdf), &value, size, offset) != size)
		err(1, "config read");
	after = ecam_read(bdf, offset, size);
	if (value == before || value == after)
		return;
	if (!mismatches++)
		snprintf(first, sizeof(first),
			 "%02x:%02x.%x+%#x size %d %s: %#x by port, %#x and %#x by ECAM",
			 bdf >> 8, bdf >> 3 & 31, bdf & 7, offset, size, when,
			 value, before, after);
}

static void compare_function(uint16_t bdf, const char *when)
{
	int offset;

	for (offset = 0; offset < 256; offset += 4)
		compare(bdf, offset, 4, when);
}

static int find_cap(uint16_t bdf, uint8_t id)
{
	int at = ecam_read(bdf, 0x34, 1) & 0xfc, left = 48;

	if (!(ecam_read(bdf, 6, 2) & 0x10))
		return 0;
	for (; at >= 0x40 && left--; at = ecam_read(bdf, at + 1, 1) & 0xfc)
		if (ecam_read(bdf, at, 1) == id)
			return at;
	return 0;
}

static void size_bar(uint16_t bdf)
{
	uint32_t command = ecam_read(bdf, 4, 2), old;
	int bar = 0x10 + 4 * rnd(6);

	write_config(bdf, 4, 2, command & ~3);
	old = ecam_read(bdf, bar, 4);
	compare(bdf, bar, 4, "before sizing");
	write_config(bdf, bar, 4, ~0u);
	compare(bdf, bar, 4, "while sizing");
	write_config(bdf, bar, 4, old);
	compare(bdf, bar, 4, "after sizing");
	write_config(bdf, 4, 2, command);
	compare(bdf, 4, 4, "after sizing");
}

static void reset(uint16_t bdf)
{
	uint32_t saved[16], command;
	int at = find_cap(bdf, 0x10), i;

	if (!at || !(ecam_read(bdf, at + 4, 4) & 1u << 28))
		return;
	command = ecam_read(bdf, 4, 2);
	for (i = 4; i < 16; i++)
		saved[i] = ecam_read(bdf, 4 * i, 4);
	write_config(bdf, at + 8, 2, ecam_read(bdf, at + 8, 2) | 1u << 15);
	usleep(100000);
	compare_function(bdf, "after FLR");
	for (i = 4; i < 16; i++)
		ecam_write(bdf, 4 * i, 4, saved[i]);
	ecam_write(bdf, 4, 2, command);
	compare_function(bdf, "after FLR and restore");
	resets++;
}

static void renumber(void)
{
	uint32_t old = ecam_read(port, 0x18, 4);
	uint16_t here = (old >> 8 & 0xff) << 8;

	compare(here, 0, 4, "before renumbering");
	write_config(port, 0x18, 4, (old & 0xff0000ff) | NEW_BUS << 16 | NEW_BUS << 8);
	compare_function(port, "renumbered");
	compare_function(here, "renumbered");
	write_config(port, 0x18, 4, old);
	compare_function(here, "numbered back");
	renumberings++;
}

/* Interrupt Status is bit 3 of Status; edu raises at 0x60, acknowledges at 0x64 */
static void interrupt(void)
{
	int on;

	for (on = 1; on >= 0; on--) {
		compare(intx, 4, 4, "before INTx changes");
		intx_regs[(on ? 0x60 : 0x64) / 4] = 1;
		if (!!(ecam_read(intx, 6, 2) & 8) != on)
			errx(1, "INTx of the edu device does not follow");
		compare(intx, 4, 4, "INTx changed");
		compare(intx, 6, 2, "INTx changed");
	}
	interrupts++;
}

static void operate(void)
{
	static const int sizes[] = { 1, 2, 4 };
	uint16_t bdf = functions[rnd(nr_functions)];
	int what = rnd(100), size = sizes[rnd(3)];

	if (what < 70 || !nr_writable) {
		compare(bdf, rnd(256 / size) * size, size, "read");
		return;
	}
	if (what < 72 && port >= 0) {
		renumber();
		return;
	}
	if (what < 76 && intx >= 0) {
		interrupt();
		return;
	}
	bdf = writable[rnd(nr_writable)];
	if (what < 77)
		reset(bdf);
	else if (what < 84)
		size_bar(bdf);
	else if (what < 89)
		write_config(bdf, 0x3c, 1, rnd(256));
	else if (what < 94)
		write_config(bdf, 0x0c, 2, rnd(65536));
	else
		write_config(bdf, 4, 2, ecam_read(bdf, 4, 2) ^ 1u << 10);
	compare_function(bdf, "after a write");
}

static uint16_t address(const char *text)
{
	unsigned int domain, bus, device, function;

	if (sscanf(text, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4 &&
	    sscanf(text, "%x:%x.%x", &bus, &device, &function) != 3)
		errx(2, "'%s' is no PCI address", text);
	return bus << 8 | device << 3 | function;
}

static void find_functions(void)
{
	DIR *dir = opendir("/sys/bus/pci/devices");
	struct dirent *entry;

	if (!dir)
		err(1, "/sys/bus/pci/devices");
	while ((entry = readdir(dir)) && nr_functions < MAX_FUNCTIONS)
		if (entry->d_name[0] != '.')
			functions[nr_functions++] = address(entry->d_name);
	closedir(dir);
}

static volatile sig_atomic_t stop;

static void end(int signal)
{
	stop = signal;
}

int main(int argc, char **argv)
{
	unsigned long operations, i;
	int option, fd;

	while ((option = getopt(argc, argv, "w:b:i:")) != -1) {
		if (option == 'w' && nr_writable < MAX_FUNCTIONS)
			writable[nr_writable++] = address(optarg);
		else if (option == 'b')
			port = address(optarg);
		else if (option == 'i')
			intx = address(optarg);
		else
			return 2;
	}
	if (argc - optind != 3)
		errx(2, "usage: nm-fuzz [-w BDF]... [-b BDF] [-i BDF] SEED OPERATIONS ECAM-BASE");
	seed = number(argv[optind]) * 2 + 1;
	operations = number(argv[optind + 1]);
	ecam_base = number(argv[optind + 2]);
	find_functions();
	if (intx >= 0) {
		fd = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
		intx_regs = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
				 ecam_read(intx, 0x10, 4) & ~0xfu);
		if (fd < 0 || intx_regs == MAP_FAILED)
			err(1, "BAR 0 of the edu device");
		ecam_write(intx, 4, 2, (ecam_read(intx, 4, 2) | 2) & ~(1u << 10));
	}
	signal(SIGTERM, end);
	for (i = 0; i < operations && !stop; i++) {
		operate();
		if (i % 1000 == 999)
			for (fd = 0; fd < nr_functions; fd++)
				compare_function(functions[fd], "all");
	}
	printf("{\"operations\": %lu, \"reads\": %lu, \"writes\": %lu, \"resets\": %lu, "
	       "\"renumberings\": %lu, \"interrupts\": %lu, "
	       "\"mismatches\": %lu, \"first\": \"%s\"}\n", i, reads, writes, resets,
	       renumberings, interrupts, mismatches, first);
	return 0;
}
