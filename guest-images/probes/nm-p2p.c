// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-p2p DISK ALLOCATE BYTES BLOCK SEED [FIRST-LAST...]: moves BYTES between the
 * NVMe disk DISK (destroyed) and the peer's memory that ALLOCATE gives (the
 * p2pmem/allocate file of another NVMe, its controller memory buffer), BLOCK
 * bytes a request, O_DIRECT; the same with ordinary memory beside it. Every byte
 * is compared after every transfer, in both directions, since a peer-to-peer
 * transfer that went nowhere is reported as a success.
 *
 * Prints a JSON line for each of: read and write, memory "ram" and "peer":
 * {"direction", "memory", "bytes", "ns", "corrupt"}.
 *
 * With ranges of physical addresses the disk also writes and reads pages of
 * ordinary memory in each of them, while it moves the peer's bytes, and a line for
 * each range follows: {"memory": "beside", "first", "last", "bytes", "corrupt"}.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "mark.h"

#define PAGE 4096
#define PAGES 64	/* of each range */
#define RANGES 4

struct range {
	uint64_t first, last;
	int pages;
	struct iovec page[PAGES];
};

/* what parent and child tell each other */
struct shared {
	volatile int ready, stop;
	volatile uint64_t bytes[RANGES], corrupt[RANGES];
};

static struct range range[RANGES];
static int ranges, pagemap;
static struct shared *shared;

static size_t total, block;

static uint64_t pattern(uint64_t seed, size_t i)
{
	uint64_t x = seed + 0x9e3779b97f4a7c15u * (i + 1);

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* volatile: the peer's memory is a BAR, touched 8 bytes at a time */
static void fill(volatile uint64_t *at, uint64_t seed)
{
	for (size_t i = 0; i < total / 8; i++)
		at[i] = pattern(seed, i);
}

static size_t corrupt(volatile const uint64_t *at, uint64_t seed)
{
	size_t wrong = 0;

	for (size_t i = 0; i < total / 8; i++) {
		uint64_t differ = at[i] ^ pattern(seed, i);

		for (; differ; differ >>= 8)
			wrong += !!(differ & 0xff);
	}
	return wrong;
}

static uint64_t transfer(int disk, char *memory, int to_disk)
{
	uint64_t start = now_ns();

	for (size_t at = 0; at < total; at += block) {
		ssize_t n = to_disk ? pwrite(disk, memory + at, block, at) :
				      pread(disk, memory + at, block, at);

		if (n != (ssize_t)block)
			err(1, "%s of %zu bytes at %zu", to_disk ? "write" : "read", block, at);
	}
	return now_ns() - start;
}

static void say(const char *direction, const char *memory, uint64_t ns, size_t wrong)
{
	printf("{\"direction\": \"%s\", \"memory\": \"%s\", \"bytes\": %zu, \"ns\": %llu, \"corrupt\": %zu}\n",
	       direction, memory, total, (unsigned long long)ns, wrong);
	fflush(stdout);
}

/* the disk takes memory's bytes; ordinary memory reads them back */
static void test_write(int disk, char *memory, char *ram, const char *name, uint64_t seed)
{
	uint64_t ns;

	fill((uint64_t *)memory, seed);
	ns = transfer(disk, memory, 1);
	memset(ram, 0x5a, total);
	transfer(disk, ram, 0);
	say("write", name, ns, corrupt((uint64_t *)ram, seed));
}

/* ordinary memory writes the disk; memory takes its bytes */
static void test_read(int disk, char *memory, char *ram, const char *name, uint64_t seed)
{
	uint64_t ns;

	fill((uint64_t *)ram, seed);
	transfer(disk, ram, 1);
	fill((uint64_t *)memory, ~seed);
	ns = transfer(disk, memory, 0);
	say("read", name, ns, corrupt((uint64_t *)memory, seed));
}

static uint64_t physical(const char *page)
{
	uint64_t entry;

	/* Documentation/admin-guide/mm/pagemap.rst */
	if (pread(pagemap, &entry, 8, (uintptr_t)page / PAGE * 8) != 8)
		err(1, "/proc/self/pagemap");
	return (entry & ((1ull << 55) - 1)) * PAGE;
}

/* whether the page was what a range lacks */
static int take(char *page)
{
	uint64_t at;

	*(volatile char *)page = 1;
	at = physical(page);
	for (int i = 0; i < ranges; i++) {
		struct range *r = &range[i];

		if (at >= r->first && at <= r->last && r->pages < PAGES) {
			r->page[r->pages].iov_base = page;
			r->page[r->pages++].iov_len = PAGE;
			return 1;
		}
	}
	return 0;
}

/* Memory comes from anywhere: take pages until all ranges have enough of them. */
static void find_pages(void)
{
	struct sysinfo info;
	size_t most, at = 0;
	char *memory;
	int lacking = ranges * PAGES;

	pagemap = open("/proc/self/pagemap", O_RDONLY);
	if (pagemap < 0 || sysinfo(&info))
		err(1, "/proc/self/pagemap");
	most = (uint64_t)info.freeram * info.mem_unit / 100 * 85 / PAGE * PAGE;
	memory = mmap(NULL, most, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		err(1, "memory");
	for (; lacking && at < most; at += PAGE)
		lacking -= take(memory + at);
	if (lacking)
		errx(1, "of %zu bytes of memory too few are in the ranges", most);
}

static void beside(int disk, struct range *r, int i, uint64_t seed)
{
	off_t at = total + i * PAGES * PAGE;

	for (int n = 0; n < PAGES; n++)
		for (size_t w = 0; w < PAGE / 8; w++)
			((uint64_t *)r->page[n].iov_base)[w] = pattern(seed, n * PAGE + w);
	if (pwritev(disk, r->page, PAGES, at) != PAGES * PAGE)
		err(1, "write beside");
	for (int n = 0; n < PAGES; n++)
		memset(r->page[n].iov_base, 0x5a, PAGE);
	if (preadv(disk, r->page, PAGES, at) != PAGES * PAGE)
		err(1, "read beside");
	for (int n = 0; n < PAGES; n++) {
		const char *page = r->page[n].iov_base;

		if (physical(page) < r->first || physical(page) > r->last)
			errx(1, "a page has moved");
		for (size_t w = 0; w < PAGE / 8; w++)
			if (((const uint64_t *)page)[w] != pattern(seed, n * PAGE + w))
				shared->corrupt[i] += 8;
	}
	shared->bytes[i] += 2 * PAGES * PAGE;
}

static pid_t start_beside(int disk, uint64_t seed)
{
	pid_t child;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	if (shared == MAP_FAILED)
		err(1, "shared memory");
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (child) {
		while (!shared->ready) {
			if (waitpid(child, NULL, WNOHANG))
				errx(1, "the transfers beside did not start");
			usleep(10000);
		}
		return child;
	}
	find_pages();
	shared->ready = 1;
	do {
		for (int i = 0; i < ranges; i++)
			beside(disk, &range[i], i, ++seed);
	} while (!shared->stop);
	exit(0);
}

static void end_beside(pid_t child)
{
	int status;

	shared->stop = 1;
	if (waitpid(child, &status, 0) != child || status)
		errx(1, "the transfers beside failed");
	for (int i = 0; i < ranges; i++)
		printf("{\"memory\": \"beside\", \"first\": %" PRIu64 ", \"last\": %" PRIu64
		       ", \"bytes\": %" PRIu64 ", \"corrupt\": %" PRIu64 "}\n",
		       range[i].first, range[i].last, shared->bytes[i], shared->corrupt[i]);
}

static void read_range(const char *text)
{
	char *end;

	if (ranges == RANGES)
		errx(2, "at most %d ranges", RANGES);
	range[ranges].first = strtoull(text, &end, 0);
	if (*end != '-')
		errx(2, "a range is FIRST-LAST, not %s", text);
	range[ranges++].last = number(end + 1);
}

int main(int argc, char **argv)
{
	pid_t child = 0;

	char *ram, *peer;
	int disk, allocate;
	uint64_t seed;

	if (argc < 6)
		errx(2, "usage: nm-p2p DISK ALLOCATE BYTES BLOCK SEED [FIRST-LAST...]");
	total = number(argv[3]);
	block = number(argv[4]);
	seed = number(argv[5]);
	if (!block || block % 4096 || total % block)
		errx(2, "BLOCK must be a multiple of 4096, BYTES one of BLOCK");
	for (int i = 6; i < argc; i++)
		read_range(argv[i]);
	disk = open(argv[1], O_RDWR | O_DIRECT | O_EXCL);
	if (disk < 0)
		err(1, "%s", argv[1]);
	allocate = open(argv[2], O_RDWR);
	if (allocate < 0)
		err(1, "%s", argv[2]);
	ram = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "memory");
	peer = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, allocate, 0);
	if (peer == MAP_FAILED)
		err(1, "peer memory %s", argv[2]);

	test_write(disk, ram, ram, "ram", seed + 1);
	test_read(disk, ram, ram, "ram", seed + 2);
	if (ranges)
		child = start_beside(disk, seed << 32);
	test_write(disk, peer, ram, "peer", seed + 3);
	test_read(disk, peer, ram, "peer", seed + 4);
	if (ranges)
		end_beside(child);
	return 0;
}
