// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-p2p DISK ALLOCATE BYTES BLOCK SEED: moves BYTES between the NVMe disk
 * DISK (destroyed) and the peer's memory that ALLOCATE gives (the p2pmem/
 * allocate file of another NVMe, its controller memory buffer), BLOCK bytes
 * a request, O_DIRECT; the same with ordinary memory beside it. Every byte is
 * compared after every transfer, in both directions, since a peer-to-peer
 * transfer that went nowhere is reported as a success.
 *
 * Prints a JSON line for each of: read and write, memory "ram" and "peer":
 * {"direction", "memory", "bytes", "ns", "corrupt"}.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "mark.h"

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

int main(int argc, char **argv)
{
	char *ram, *peer;
	int disk, allocate;
	uint64_t seed;

	if (argc != 6)
		errx(2, "usage: nm-p2p DISK ALLOCATE BYTES BLOCK SEED");
	total = number(argv[3]);
	block = number(argv[4]);
	seed = number(argv[5]);
	if (!block || block % 4096 || total % block)
		errx(2, "BLOCK must be a multiple of 4096, BYTES one of BLOCK");
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
	test_write(disk, peer, ram, "peer", seed + 3);
	test_read(disk, peer, ram, "peer", seed + 4);
	return 0;
}
