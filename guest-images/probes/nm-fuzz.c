// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-fuzz [-p] [-a] [-q] [-w BB:DD.F]... [-b BB:DD.F] [-r] [-v BB:DD.F] [-i BB:DD.F]
 *	   SEED OPERATIONS ECAM-BASE
 *
 * A seeded random program of config accesses to the functions that sysfs shows.
 * Each read through sysfs, which takes ports 0xcf8 and 0xcfc below offset 256, is
 * held against reads of the same bytes through the memory-mapped window (ECAM)
 * before and after it, which no cache serves: equal to neither is a mismatch.
 *
 * -p  every other read is done at the ports without Linux (CONFIG_X86_IOPL_IOPERM):
 *     1, 2 and 4 bytes at each offset in a dword, and strings (REP INS)
 * -a  before that, with -p: the IDs of all functions that an address can name
 * -q  what reads are held against is read by 8 bytes, which QEMU serves where KVM
 *     serves narrower ones (series pci-config-live); these are held against it, too,
 *     at all offsets
 * -w  functions that nobody uses: their writable registers are changed, their
 *     BARs sized, and they are reset (FLR) if they can
 * -b  a root port: the bus behind it is given another number, and its own again
 * -r  nobody uses what is behind that port: it gets hot resets (Secondary Bus
 *     Reset), and its slot is switched off and on
 * -v  a physical function (SR-IOV) whose virtual functions sysfs shows: they are
 *     disabled and enabled behind the kernel's back, other numbers of them
 * -i  an edu device (QEMU, docs/specs/edu.rst): its INTx is raised and lowered,
 *     which changes Interrupt Status with no config write at all
 *
 * SIGTERM ends it behind the operation that it is at.
 *
 * Prints {"operations", "reads", "port_reads", "strings", "writes", "resets", "hot_resets", "power_offs",
 * "renumberings", "vf_changes", "interrupts", "mismatches", "first"}.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>

#include "mark.h"

#define MAX_FUNCTIONS 64
#define NEW_BUS 0x60
#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define MAX_STRING 40

static uint64_t seed;
static uint64_t ecam_base;
static volatile uint8_t *ecam_bus[256];
static uint16_t functions[MAX_FUNCTIONS], writable[MAX_FUNCTIONS];
static int nr_functions, nr_writable;
static int port = -1, intx = -1, pf = -1, port_is_unused, by_ports, scans, wide;
static volatile uint32_t *intx_regs;
static unsigned long reads, port_reads, strings, writes, resets, hot_resets, power_offs, renumberings;
static unsigned long vf_changes, interrupts, mismatches;
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

/* what the function's registers are, whoever serves other reads; within 8 bytes */
static uint32_t truth(uint16_t bdf, int offset, int size)
{
	uint64_t value;

	if (!wide)
		return ecam_read(bdf, offset, size);
	value = *(volatile uint64_t *)ecam(bdf, offset & ~7) >> (offset & 7) * 8;
	return size == 4 ? value : value & ((1u << size * 8) - 1);
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

static void mismatch(uint16_t bdf, int offset, int size, const char *when,
		     uint32_t value, uint32_t before, uint32_t after)
{
	if (!mismatches++)
		snprintf(first, sizeof(first),
			 "%02x:%02x.%x+%#x size %d %s: %#x by port, %#x and %#x by ECAM",
			 bdf >> 8, bdf >> 3 & 31, bdf & 7, offset, size, when,
			 value, before, after);
}

static void ins(uint16_t at, int size, void *buffer, unsigned long count)
{
	if (size == 1)
		insb(at, buffer, count);
	else if (size == 2)
		insw(at, buffer, count);
	else
		insl(at, buffer, count);
}

/*
 * @count reads of the same bytes by one instruction. Linux uses the ports too: what
 * was read while it moved the address is read again.
 */
static void port_read(uint16_t bdf, int offset, int size, void *buffer, int count)
{
	uint32_t address = 1u << 31 | bdf << 8 | (offset & 0xfc);

	do {
		outl(address, CONFIG_ADDRESS);
		ins(CONFIG_DATA + (offset & 3), size, buffer, count);
	} while (inl(CONFIG_ADDRESS) != address);
	port_reads++;
	strings += count > 1;
}

/* ECAM of the dword that @size bytes are in */
static uint32_t ecam_part(uint16_t bdf, int offset, int size)
{
	uint32_t dword = truth(bdf, offset & ~3, 4) >> (offset & 3) * 8;

	return size == 4 ? dword : dword & ((1u << size * 8) - 1);
}

/* all bytes lie in one dword */
static void compare_ports(uint16_t bdf, int offset, int size, int count, const char *when)
{
	uint32_t before, after, value;
	uint8_t buffer[4 * MAX_STRING];
	int i;

	before = ecam_part(bdf, offset, size);
	port_read(bdf, offset, size, buffer, count);
	after = ecam_part(bdf, offset, size);
	for (i = 0; i < count; i++) {
		value = 0;
		memcpy(&value, buffer + i * size, size);
		if (value != before && value != after) {
			mismatch(bdf, offset, size, when, value, before, after);
			return;
		}
	}
}

static void compare(uint16_t bdf, int offset, int size, const char *when)
{
	uint32_t before, after, value = 0;

	reads++;
	if (by_ports && rnd(2)) {
		compare_ports(bdf, offset, size, 1, when);
		return;
	}
	before = truth(bdf, offset, size);
	if (wide && rnd(2))
		value = ecam_read(bdf, offset, size);
	else if (pread(config_file(bdf), &value, size, offset) != size)
		err(1, "config read");
	after = truth(bdf, offset, size);
	if (value != before && value != after)
		mismatch(bdf, offset, size, when, value, before, after);
}

/* as above, for registers that only ECAM has */
static void compare_extended(uint16_t bdf, int offset, int size, const char *when)
{
	uint32_t before, after, value;

	reads++;
	before = truth(bdf, offset, size);
	value = ecam_read(bdf, offset, size);
	after = truth(bdf, offset, size);
	if (value != before && value != after)
		mismatch(bdf, offset, size, when, value, before, after);
}

static void compare_function(uint16_t bdf, const char *when)
{
	int offset;

	for (offset = 0; offset < 256; offset += 4)
		compare(bdf, offset, 4, when);
	if (wide)
		compare_extended(bdf, 0x100 + rnd(960) * 4, 4, when);
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

/* what a reset takes away and a driver would bring back: BARs, Command */
struct saved {
	uint32_t bars[16];
	uint16_t command;
};

static void save(uint16_t bdf, struct saved *saved)
{
	int i;

	saved->command = ecam_read(bdf, 4, 2);
	for (i = 4; i < 16; i++)
		saved->bars[i] = ecam_read(bdf, 4 * i, 4);
}

static void restore(uint16_t bdf, const struct saved *saved, const char *when)
{
	int i;

	for (i = 4; i < 16; i++)
		ecam_write(bdf, 4 * i, 4, saved->bars[i]);
	ecam_write(bdf, 4, 2, saved->command);
	compare_function(bdf, when);
}

static void reset(uint16_t bdf)
{
	struct saved saved;
	int at = find_cap(bdf, 0x10);

	if (!at || !(ecam_read(bdf, at + 4, 4) & 1u << 28))
		return;
	save(bdf, &saved);
	write_config(bdf, at + 8, 2, ecam_read(bdf, at + 8, 2) | 1u << 15);
	usleep(100000);
	compare_function(bdf, "after FLR");
	restore(bdf, &saved, "after FLR and restore");
	resets++;
}

static uint16_t behind_port(void)
{
	return ecam_read(port, 0x19, 1) << 8;
}

/* by ECAM; a function that isn't there reads as all ones, a VF only in its IDs */
static void expect(uint16_t bdf, int present, const char *when)
{
	if (((ecam_read(bdf, 8, 4) != ~0u) != present ||
	     (truth(bdf, 8, 4) != ~0u) != present) && !mismatches++)
		snprintf(first, sizeof(first), "%02x:%02x.%x is %s %s", bdf >> 8,
			 bdf >> 3 & 31, bdf & 7, present ? "absent" : "present", when);
}

/* Secondary Bus Reset is bit 6 of Bridge Control; QEMU shows a bus that is in reset */
static void hot_reset(void)
{
	uint16_t control = ecam_read(port, 0x3e, 2), here = behind_port();
	struct saved saved;

	save(here, &saved);
	compare_function(here, "before a hot reset");
	write_config(port, 0x3e, 2, control | 1u << 6);
	compare_function(here, "in hot reset");
	write_config(port, 0x3e, 2, control);
	compare_function(here, "after a hot reset");
	restore(here, &saved, "after a hot reset and restore");
	hot_resets++;
}

/* Slot Control: bit 10 switches the slot off */
static void power_off(void)
{
	int at = find_cap(port, 0x10);
	uint16_t control = ecam_read(port, at + 0x18, 2), here = behind_port();
	struct saved saved;

	save(here, &saved);
	compare_function(here, "before the slot is switched off");
	write_config(port, at + 0x18, 2, control | 1u << 10);
	expect(here, 0, "while its slot is off");
	compare_function(here, "in a slot that is off");
	write_config(port, at + 0x18, 2, control);
	expect(here, 1, "when its slot is on again");
	compare_function(here, "in a slot that is on again");
	restore(here, &saved, "switched on and restored");
	power_offs++;
}

static int find_extended(uint16_t bdf, uint16_t id)
{
	int at = 0x100, left = 64;
	uint32_t head;

	for (; at >= 0x100 && left--; at = head >> 20) {
		head = ecam_read(bdf, at, 4);
		if ((head & 0xffff) == id)
			return at;
	}
	errx(1, "no extended capability %#x", id);
}

static void compare_vfs(int at, int enabled, const char *when)
{
	int total = ecam_read(pf, at + 0x0e, 2), offset = ecam_read(pf, at + 0x14, 2);
	int stride = ecam_read(pf, at + 0x16, 2), i;

	for (i = 0; i < total; i++) {
		expect(pf + offset + i * stride, i < enabled, when);
		compare_function(pf + offset + i * stride, when);
	}
}

/* PCIe r6.2, 9.3.3: bit 0 of SR-IOV Control is VF Enable */
static void change_vfs(void)
{
	int at = find_extended(pf, 0x10), enabled;
	uint16_t control = ecam_read(pf, at + 8, 2);

	enabled = control & 1 ? ecam_read(pf, at + 0x10, 2) : 0;
	compare_vfs(at, enabled, "before VFs change");
	if (enabled) {
		write_config(pf, at + 8, 2, control & ~1u);
		enabled = 0;
	} else {
		enabled = 1 + rnd(ecam_read(pf, at + 0x0e, 2));
		write_config(pf, at + 0x10, 2, enabled);
		compare_vfs(at, 0, "after NumVFs was written");
		write_config(pf, at + 8, 2, control | 1u);
	}
	compare_vfs(at, enabled, "after VFs changed");
	compare_function(pf, "after VFs changed");
	vf_changes++;
}

static void renumber(void)
{
	uint32_t old = ecam_read(port, 0x18, 4);
	uint16_t here = behind_port();

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
	compare_function(intx, "INTx changed");
	interrupts++;
}

static void operate(void)
{
	static const int sizes[] = { 1, 2, 4 };
	uint16_t bdf = functions[rnd(nr_functions)];
	int what = rnd(100), size = sizes[rnd(3)];

	if (what < 70 || !nr_writable) {
		if (wide && what < 15) {
			compare_extended(bdf, rnd(4096 / size) * size, size, "read by ECAM");
		} else if (by_ports && what < 35) {
			reads++;
			compare_ports(bdf, rnd(64) * 4 + rnd(5 - size), size,
				      what < 15 ? 2 + rnd(MAX_STRING - 1) : 1, "read");
		} else {
			compare(bdf, rnd(256 / size) * size, size, "read");
		}
		return;
	}
	if (what < 72 && port >= 0) {
		if (!port_is_unused)
			renumber();
		else
			(void (*[])(void)){ renumber, hot_reset, power_off }[rnd(3)]();
		return;
	}
	if (what < 74 && pf >= 0) {
		change_vfs();
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

	while ((option = getopt(argc, argv, "paqw:b:rv:i:")) != -1) {
		if (option == 'w' && nr_writable < MAX_FUNCTIONS)
			writable[nr_writable++] = address(optarg);
		else if (option == 'b')
			port = address(optarg);
		else if (option == 'p')
			by_ports = 1;
		else if (option == 'a')
			scans = 1;
		else if (option == 'q')
			wide = 1;
		else if (option == 'r')
			port_is_unused = 1;
		else if (option == 'v')
			pf = address(optarg);
		else if (option == 'i')
			intx = address(optarg);
		else
			return 2;
	}
	if (argc - optind != 3)
		errx(2, "usage: nm-fuzz [-p] [-a] [-q] [-w BDF]... [-b BDF] [-r] [-v BDF] [-i BDF] "
			"SEED OPERATIONS ECAM-BASE");
	seed = number(argv[optind]) * 2 + 1;
	operations = number(argv[optind + 1]);
	ecam_base = number(argv[optind + 2]);
	if (by_ports && ioperm(CONFIG_ADDRESS, 8, 1))
		err(1, "ioperm (CONFIG_X86_IOPL_IOPERM, root)");
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
	for (fd = 0; scans && fd < 65536; fd++)
		compare_ports(fd, 0, 4, 1, "scan");
	for (i = 0; i < operations && !stop; i++) {
		operate();
		if (i % 1000 == 999)
			for (fd = 0; fd < nr_functions; fd++)
				compare_function(functions[fd], "all");
	}
	printf("{\"operations\": %lu, \"reads\": %lu, \"port_reads\": %lu, \"strings\": %lu, "
	       "\"writes\": %lu, \"resets\": %lu, "
	       "\"hot_resets\": %lu, \"power_offs\": %lu, \"renumberings\": %lu, "
	       "\"vf_changes\": %lu, \"interrupts\": %lu, "
	       "\"mismatches\": %lu, \"first\": \"%s\"}\n", i, reads, port_reads, strings,
	       writes, resets, hot_resets, power_offs, renumberings, vf_changes, interrupts,
	       mismatches, first);
	return 0;
}
