// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-vfio: a user of VFIO that does as it is told, right or wrong: opens
 * functions by their character devices, asks for direct peer-to-peer, and has
 * NVMe controllers read and write whatever bus address it is given. Each line
 * of its input is a command, and is answered by one line of JSON; "errno" is 0
 * or that of the system call that failed. Begins with {"pid": ...}; ends, and
 * closes all, with its input.
 *
 *	open BDF [TOKEN]	bind to this process' iommufd context: "id"; BDF may be the
 *				name of a device on the auxiliary bus; VFs need the
 *				token of their PF (a number, repeated)
 *	token BDF TOKEN		of the PF's user
 *	close BDF
 *	set BDF FLAGS COUNT ARGSZ [ID]...	VFIO_DEVICE_FEATURE_PCI_DIRECT_P2P; an
 *				ARGSZ of 0 is what COUNT demands. With the flag for it an
 *				eventfd of the process is given, see events
 *	set-failing BDF NTH ID	claims; the NTH allocation from there on fails: "failed" is
 *				whether there were so many
 *	get BDF			"flags", "suspends"
 *	events			"count": how often the eventfd was signalled since it was
 *				last asked
 *	config BDF OFFSET BYTES	"value": of its config space
 *	config BDF OFFSET BYTES VALUE	writes it
 *	low-power BDF 0|1	lets it leave D0, or ends that
 *	probe BDF		whether the feature is there, for SET
 *	reset BDF
 *	hot-reset BDF
 *	map BDF BAR ADDRESS	into the I/O address space, by the BAR's dma-buf
 *	nvme BDF		attach to the I/O address space, start the controller
 *	write BDF ADDRESS COUNT	COUNT times 4096 bytes: "bytes" that the
 *				controller says it has written
 *	read BDF ADDRESS	8 bytes, "value": what the controller has read
 *	flood BDF ADDRESS	writes until the process ends; "flooded" is how many times
 *				up to then
 *	flooded
 *	claims BDF ID SECONDS ACS...	claims and gives back
 *	opens BDF SECONDS TIMES ACS...	opens and closes, from a context of its own,
 *				until that succeeded so many times (0: always)
 *	fill FILE OFFSET BYTES SEED	of a BAR by sysfs
 *	differ FILE OFFSET BYTES SEED	"bytes" that are not as filled
 *
 * ACS is CONFIG:OFFSET: ACS Control of a port, in its sysfs file. In "claims"
 * redirection must be off whenever the switch is claimed, in "opens" on whenever
 * the function is open; "wrong" is how often it was not.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/vfio.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/*
 * Linux' interface, of include/uapi/linux/{vfio,iommufd}.h as they are in the
 * tree under test: what the headers of Debian 12 don't have, and the series'.
 */
#define BIND_IOMMUFD	_IO(';', 100 + 18)
#define ATTACH_PT	_IO(';', 100 + 19)
#define IOAS_ALLOC	_IO(';', 0x81)
#define IOAS_MAP	_IO(';', 0x85)
#define IOAS_MAP_FILE	_IO(';', 0x8f)
#define BIND_TOKEN	1
#define FEATURE_VF_TOKEN	0
#define FEATURE_DMA_BUF		11
#define FEATURE_DIRECT_P2P	14
#define FEATURE_LOW_POWER_ENTRY	3
#define FEATURE_LOW_POWER_EXIT	5
#define DIRECT_P2P_EVENTFD	8
#define MAP_FIXED_RW	7

struct bind_iommufd {
	uint32_t argsz, flags;
	int32_t iommufd;
	uint32_t devid;
	uint64_t token;
};

struct attach_pt {
	uint32_t argsz, flags, pt;
};

struct ioas_alloc {
	uint32_t size, flags, id;
};

struct ioas_map {
	uint32_t size, flags, ioas, reserved;
	uint64_t user, length, iova;
};

struct ioas_map_file {
	uint32_t size, flags, ioas;
	int32_t fd;
	uint64_t start, length, iova;
};

struct dma_buf {
	struct vfio_device_feature head;
	uint32_t region, open_flags, flags, nr_ranges;
	uint64_t offset, length;
};

#define MOST_IDS	512

struct direct_p2p {
	struct vfio_device_feature head;
	uint32_t flags, count;
	int32_t eventfd;
	uint32_t suspends, ids[MOST_IDS];
};

/* Of the NVMe specification: registers, commands, and the queues of 16 entries */
#define NVME_CC		0x14
#define NVME_CSTS	0x1c
#define NVME_AQA	0x24
#define NVME_ASQ	0x28
#define NVME_ACQ	0x30
#define NVME_DOORBELLS	0x1000
#define NVME_ENTRIES	16
#define OP_IDENTIFY	0x06
#define OP_SET_FEATURES	0x09
#define OP_GET_FEATURES	0x0a
#define FEATURE_TIMESTAMP	0x0e

struct sqe {
	uint32_t op, nsid;
	uint64_t reserved, metadata, prp1, prp2;
	uint32_t dw10, dw11, dw12, dw13, dw14, dw15;
};

struct cqe {
	uint32_t result, reserved;
	uint16_t sq_head, sq, id, status;
};

#define PAGE	4096ul
#define PAGES	4ul
#define QUEUES	0x10000ul	/* I/O address of a device's pages, times its place */

struct device {
	char bdf[16];
	int fd;
	volatile uint8_t *bar0;
	uint8_t *memory;
	uint64_t iova;
	unsigned int tail, head, phase;
};

static struct device devices[16];
static int iommufd = -1;
static uint32_t ioas;
static int events = -1;
static volatile uint64_t flooded;

static int fail(void)
{
	return errno ? errno : EIO;
}

static int cdev(const char *bdf)
{
	char path[PATH_MAX];
	struct dirent *entry;
	int fd = -1;
	DIR *dir;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/vfio-dev", bdf);
	dir = opendir(path);
	if (!dir) {
		snprintf(path, sizeof(path), "/sys/bus/auxiliary/devices/%s/vfio-dev", bdf);
		dir = opendir(path);
	}
	if (!dir)
		return -1;
	errno = ENODEV;
	while ((entry = readdir(dir))) {
		if (strncmp(entry->d_name, "vfio", 4) &&
		    strncmp(entry->d_name, "noiommu-vfio", 12))
			continue;
		snprintf(path, sizeof(path), "/dev/vfio/devices/%s", entry->d_name);
		fd = open(path, O_RDWR | O_CLOEXEC);
		break;
	}
	if (fd < 0) {
		int saved = errno;

		closedir(dir);
		errno = saved;
		return -1;
	}
	closedir(dir);
	return fd;
}

/*
 * Returns the device's ID in the context, or -1 with errno. A token of 0 is none;
 * else its bytes are all the same.
 */
static int64_t bind_to(int fd, int context, uint8_t token)
{
	struct bind_iommufd args = { .argsz = 16, .iommufd = context };
	uint8_t uuid[16];

	if (token) {
		memset(uuid, token, sizeof(uuid));
		args.argsz = sizeof(args);
		args.flags = BIND_TOKEN;
		args.token = (uintptr_t)uuid;
	}
	return ioctl(fd, BIND_IOMMUFD, &args) ? -1 : (int64_t)args.devid;
}

static int set_token(int fd, uint8_t token)
{
	struct {
		struct vfio_device_feature head;
		uint8_t uuid[16];
	} args = { .head.argsz = sizeof(args) };

	args.head.flags = VFIO_DEVICE_FEATURE_SET | FEATURE_VF_TOKEN;
	memset(args.uuid, token, sizeof(args.uuid));
	return ioctl(fd, VFIO_DEVICE_FEATURE, &args) ? fail() : 0;
}

static struct device *find(const char *bdf)
{
	for (size_t i = 0; i < sizeof(devices) / sizeof(*devices); i++)
		if (devices[i].fd > 0 && !strcmp(devices[i].bdf, bdf))
			return &devices[i];
	return NULL;
}

static int do_open(const char *bdf, uint8_t token, int64_t *id)
{
	struct device *d = devices;

	while (d->fd > 0)
		if (++d == devices + sizeof(devices) / sizeof(*devices))
			return ENFILE;
	memset(d, 0, sizeof(*d));
	if (iommufd < 0)
		iommufd = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	d->fd = cdev(bdf);
	if (d->fd < 0 || (*id = bind_to(d->fd, iommufd, token)) < 0) {
		int saved = fail();

		if (d->fd > 0)
			close(d->fd);
		d->fd = 0;
		return saved;
	}
	snprintf(d->bdf, sizeof(d->bdf), "%s", bdf);
	d->iova = QUEUES * (d - devices + 1);
	return 0;
}

static int do_close(struct device *d)
{
	if (d->bar0)
		munmap((void *)d->bar0, 2 * PAGE);
	if (close(d->fd))
		return fail();
	d->fd = 0;
	return 0;
}

static int set(int fd, uint32_t flags, uint32_t count, uint32_t argsz, const uint32_t *ids)
{
	struct direct_p2p args = { .flags = flags, .count = count };

	if (flags & DIRECT_P2P_EVENTFD) {
		if (events < 0)
			events = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		args.eventfd = events;
	}
	args.head.argsz = argsz ? argsz : offsetof(struct direct_p2p, ids) + 4 * count;
	args.head.flags = VFIO_DEVICE_FEATURE_SET | FEATURE_DIRECT_P2P;
	memcpy(args.ids, ids, sizeof(args.ids));
	return ioctl(fd, VFIO_DEVICE_FEATURE, &args) ? fail() : 0;
}

/* Linux: Documentation/fault-injection/fault-injection.rst, fail-nth */
static int set_failing(int fd, unsigned int nth, const uint32_t *ids, uint64_t *failed)
{
	int file = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	char text[16] = "";
	int ret;

	if (file < 0)
		return fail();
	snprintf(text, sizeof(text), "%u", nth);
	if (write(file, text, strlen(text)) < 0)
		err(1, "fail-nth");
	ret = set(fd, 1, 1, 0, ids);
	/* what is left to count; 0 is after the failure */
	memset(text, 0, sizeof(text));
	if (pread(file, text, sizeof(text) - 1, 0) < 0)
		err(1, "fail-nth");
	*failed = strtoul(text, NULL, 10) == 0;
	if (pwrite(file, "0", 1, 0) != 1)
		err(1, "fail-nth");
	close(file);
	return ret;
}

static int get(int fd, uint32_t *flags, uint32_t *suspends)
{
	struct direct_p2p args = {};

	args.head.argsz = offsetof(struct direct_p2p, ids);
	args.head.flags = VFIO_DEVICE_FEATURE_GET | FEATURE_DIRECT_P2P;
	if (ioctl(fd, VFIO_DEVICE_FEATURE, &args))
		return fail();
	*flags = args.flags;
	*suspends = args.suspends;
	return 0;
}

static int probe(int fd)
{
	struct vfio_device_feature args = { .argsz = sizeof(args) };

	args.flags = VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_SET | FEATURE_DIRECT_P2P;
	return ioctl(fd, VFIO_DEVICE_FEATURE, &args) ? fail() : 0;
}

static int hot_reset(int fd)
{
	struct vfio_pci_hot_reset args = { .argsz = sizeof(args) };

	return ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &args) ? fail() : 0;
}

static int region(int fd, uint32_t index, struct vfio_region_info *info)
{
	*info = (struct vfio_region_info){ .argsz = sizeof(*info), .index = index };
	return ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, info) ? fail() : 0;
}

static int need_ioas(void)
{
	struct ioas_alloc args = { .size = sizeof(args) };

	if (ioas)
		return 0;
	if (ioctl(iommufd, IOAS_ALLOC, &args))
		return fail();
	ioas = args.id;
	return 0;
}

static int map_bar(struct device *d, uint32_t bar, uint64_t iova)
{
	struct dma_buf buf = { .region = bar, .open_flags = O_RDWR | O_CLOEXEC, .nr_ranges = 1 };
	struct ioas_map_file map = { .size = sizeof(map), .flags = MAP_FIXED_RW, .iova = iova };
	struct vfio_region_info info;
	int ret;

	ret = region(d->fd, bar, &info);
	if (!ret)
		ret = need_ioas();
	if (ret)
		return ret;
	buf.head.argsz = sizeof(buf);
	buf.head.flags = VFIO_DEVICE_FEATURE_GET | FEATURE_DMA_BUF;
	buf.length = info.size;
	map.fd = ioctl(d->fd, VFIO_DEVICE_FEATURE, &buf);
	if (map.fd < 0)
		return fail();
	map.ioas = ioas;
	map.length = info.size;
	ret = ioctl(iommufd, IOAS_MAP_FILE, &map) ? fail() : 0;
	close(map.fd);
	return ret;
}

static uint32_t reg(struct device *d, unsigned int at)
{
	return *(volatile uint32_t *)(d->bar0 + at);
}

static void reg_write(struct device *d, unsigned int at, uint32_t value)
{
	*(volatile uint32_t *)(d->bar0 + at) = value;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static int wait_ready(struct device *d, uint32_t ready)
{
	double end = now() + 30;

	while ((reg(d, NVME_CSTS) & 1) != ready) {
		if (now() > end)
			return ETIMEDOUT;
		usleep(1000);
	}
	return 0;
}

static int low_power(int fd, int enter)
{
	struct vfio_device_feature args = { .argsz = sizeof(args) };

	args.flags = VFIO_DEVICE_FEATURE_SET |
		     (enter ? FEATURE_LOW_POWER_ENTRY : FEATURE_LOW_POWER_EXIT);
	return ioctl(fd, VFIO_DEVICE_FEATURE, &args) ? fail() : 0;
}

static int config(int fd, uint64_t at, uint64_t bytes, int write, uint64_t *value)
{
	struct vfio_region_info info;
	int ret = region(fd, VFIO_PCI_CONFIG_REGION_INDEX, &info);
	ssize_t done;

	if (ret)
		return ret;
	if (bytes > sizeof(*value))
		return EINVAL;
	done = write ? pwrite(fd, value, bytes, info.offset + at)
		     : pread(fd, value, bytes, info.offset + at);
	return done == (ssize_t)bytes ? 0 : fail();
}

/* Bus mastering and memory decoding on, as a driver would do it */
static int let_master(int fd)
{
	struct vfio_region_info info;
	uint16_t command;
	int ret = region(fd, VFIO_PCI_CONFIG_REGION_INDEX, &info);

	if (ret)
		return ret;
	if (pread(fd, &command, 2, info.offset + 4) != 2)
		return fail();
	command |= 6;
	return pwrite(fd, &command, 2, info.offset + 4) == 2 ? 0 : fail();
}

static int start_controller(struct device *d)
{
	struct attach_pt attach = { .argsz = sizeof(attach) };
	struct ioas_map map = { .size = sizeof(map), .flags = MAP_FIXED_RW };
	struct vfio_region_info info;
	int ret;

	ret = need_ioas();
	if (ret)
		return ret;
	attach.pt = ioas;
	if (!d->memory) {
		if (ioctl(d->fd, ATTACH_PT, &attach))
			return fail();
		d->memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
				 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (d->memory == MAP_FAILED)
			return fail();
		map.ioas = ioas;
		map.user = (uintptr_t)d->memory;
		map.length = PAGES * PAGE;
		map.iova = d->iova;
		if (ioctl(iommufd, IOAS_MAP, &map))
			return fail();
		ret = region(d->fd, VFIO_PCI_BAR0_REGION_INDEX, &info);
		if (ret)
			return ret;
		d->bar0 = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, d->fd,
			       info.offset);
		if (d->bar0 == MAP_FAILED)
			return fail();
	}
	ret = let_master(d->fd);
	if (ret)
		return ret;
	memset(d->memory, 0, PAGES * PAGE);
	d->tail = d->head = 0;
	d->phase = 1;
	reg_write(d, NVME_CC, 0);
	ret = wait_ready(d, 0);
	if (ret)
		return ret;
	reg_write(d, NVME_AQA, (NVME_ENTRIES - 1) << 16 | (NVME_ENTRIES - 1));
	reg_write(d, NVME_ASQ, d->iova);
	reg_write(d, NVME_ASQ + 4, 0);
	reg_write(d, NVME_ACQ, d->iova + PAGE);
	reg_write(d, NVME_ACQ + 4, 0);
	/* entries of 64 and 16 bytes, pages of 4096, enabled */
	reg_write(d, NVME_CC, 4 << 20 | 6 << 16 | 1);
	return wait_ready(d, 1);
}

/* One admin command; its status (0 is success), or -1 if there is no answer */
static int admin(struct device *d, struct sqe sqe)
{
	struct sqe *queue = (struct sqe *)d->memory;
	volatile struct cqe *answer = (struct cqe *)(d->memory + PAGE) + d->head;
	double end = now() + 30;
	uint16_t status;

	queue[d->tail] = sqe;
	d->tail = (d->tail + 1) % NVME_ENTRIES;
	reg_write(d, NVME_DOORBELLS, d->tail);
	while (((status = answer->status) & 1) != d->phase)
		if (now() > end)
			return -1;
	d->head = (d->head + 1) % NVME_ENTRIES;
	if (!d->head)
		d->phase ^= 1;
	reg_write(d, NVME_DOORBELLS + 4, d->head);
	return status >> 1;
}

static int identify(struct device *d, uint64_t address)
{
	return admin(d, (struct sqe){ .op = OP_IDENTIFY, .prp1 = address, .dw10 = 1 });
}

/*
 * The controller's clock is 6 bytes that it reads from where it is told, and
 * counts on from there
 */
static int read_by_clock(struct device *d, uint64_t address, uint64_t *value)
{
	struct sqe sqe = { .op = OP_SET_FEATURES, .prp1 = address, .dw10 = FEATURE_TIMESTAMP };
	int status = admin(d, sqe);

	if (status)
		return status;
	sqe.op = OP_GET_FEATURES;
	sqe.prp1 = d->iova + 2 * PAGE;
	status = admin(d, sqe);
	memcpy(value, d->memory + 2 * PAGE, sizeof(*value));
	*value &= 0xffffffffffff;
	return status;
}

struct flood {
	struct device *device;
	uint64_t address;
};

static void *flood(void *arg)
{
	struct flood *f = arg;

	while (identify(f->device, f->address) >= 0)
		flooded++;
	return NULL;
}

struct acs {
	int fd;
	off_t at;
};

static int open_acs(char **words, int count, struct acs *ports)
{
	for (int i = 0; i < count; i++) {
		char *colon = strrchr(words[i], ':');

		if (!colon)
			return EINVAL;
		*colon = 0;
		ports[i].at = strtoul(colon + 1, NULL, 0);
		ports[i].fd = open(words[i], O_RDONLY | O_CLOEXEC);
		if (ports[i].fd < 0)
			return fail();
	}
	return 0;
}

/* Ports whose P2P Request or Completion Redirect is not as it should be */
static int wrong_ports(const struct acs *ports, int count, int redirect)
{
	const uint16_t mask = 0xc;
	int wrong = 0;

	for (int i = 0; i < count; i++) {
		uint16_t control = 0xffff;

		if (pread(ports[i].fd, &control, 2, ports[i].at) != 2 || control == 0xffff)
			wrong++;
		else
			wrong += (control & mask) != (redirect ? mask : 0);
	}
	return wrong;
}

static void claims(struct device *d, uint32_t id, double seconds, const struct acs *ports,
		   int count)
{
	const uint32_t ids[MOST_IDS] = { id };
	unsigned int won = 0, refused = 0, again = 0, other = 0, wrong = 0;
	double end = now() + seconds;

	while (now() < end) {
		int ret = set(d->fd, 1, 1, 0, ids);

		if (!ret) {
			won++;
			wrong += wrong_ports(ports, count, 0);
			ret = set(d->fd, 0, 0, 0, ids);
			/* an end that was not asked for is none of these races' */
			other += !!ret;
		} else if (ret == EPERM) {
			refused++;
		} else if (ret == EAGAIN || ret == EBUSY) {
			again++;
		} else {
			other++;
		}
	}
	printf("{\"errno\": 0, \"won\": %u, \"refused\": %u, \"again\": %u, \"other\": %u, "
	       "\"wrong\": %u}\n",
	       won, refused, again, other, wrong);
}

/*
 * After an open that succeeded it pauses for up to as long as that took: the function would
 * be free for a moment only, and whether a claim ever found it so would be a matter of speed
 */
static void opens(const char *bdf, double seconds, unsigned int times, const struct acs *ports,
		  int count)
{
	unsigned int won = 0, refused = 0, other = 0, wrong = 0;
	int context = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	double end = now() + seconds;

	while (now() < end && (!times || won < times)) {
		double begin = now(), took;
		int mine = 0;
		int fd = cdev(bdf);

		if (fd < 0) {
			other++;
			continue;
		}
		if (bind_to(fd, context, 0) >= 0) {
			won++;
			mine = 1;
			for (int i = 0; i < 20; i++)
				wrong += wrong_ports(ports, count, 1);
		} else if (errno == EPERM || errno == EBUSY) {
			refused++;
		} else {
			other++;
		}
		close(fd);
		took = now() - begin;
		if (mine)
			usleep(took * 1e6 * drand48());
	}
	close(context);
	printf("{\"errno\": 0, \"won\": %u, \"refused\": %u, \"other\": %u, \"wrong\": %u}\n",
	       won, refused, other, wrong);
}

static int bar_by_sysfs(const char *file, uint64_t offset, uint64_t bytes, uint64_t seed, int check,
			uint64_t *differ)
{
	volatile uint64_t *at;
	int fd = open(file, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return fail();
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
	close(fd);
	if (at == MAP_FAILED)
		return fail();
	for (uint64_t i = 0; i < bytes / 8; i++) {
		uint64_t wanted = (seed + i) * 0x9e3779b97f4a7c15u;

		if (!check)
			at[i] = wanted;
		else
			for (uint64_t x = at[i] ^ wanted; x; x >>= 8)
				*differ += !!(x & 0xff);
	}
	munmap((void *)at, bytes);
	return 0;
}

static uint64_t word(char **words, int count, int i)
{
	return i < count ? strtoull(words[i], NULL, 0) : 0;
}

static void answer(int code, const char *name, unsigned long long value)
{
	if (name)
		printf("{\"errno\": %d, \"%s\": %llu}\n", code, name, value);
	else
		printf("{\"errno\": %d}\n", code);
}

static void nvme_write(struct device *d, uint64_t address, uint64_t times)
{
	uint64_t bytes = 0;

	while (times--) {
		int status = identify(d, address);

		if (status < 0) {
			answer(ETIMEDOUT, "bytes", bytes);
			return;
		}
		bytes += status ? 0 : PAGE;
	}
	answer(0, "bytes", bytes);
}

/* words: command and arguments */
static void obey(char **words, int count)
{
	const char *command = words[0], *bdf = count > 1 ? words[1] : "";
	struct device *d = find(bdf);
	uint32_t ids[MOST_IDS] = {};
	uint64_t value = 0;
	struct acs ports[8];
	int64_t id = -1;
	int ret;

	if (!strcmp(command, "open")) {
		ret = do_open(bdf, word(words, count, 2), &id);
		answer(ret, "id", ret ? 0 : id);
	} else if (!strcmp(command, "opens") && count > 3 && count < 12) {
		ret = open_acs(words + 4, count - 4, ports);
		if (ret)
			answer(ret, NULL, 0);
		else
			opens(bdf, strtod(words[2], NULL), word(words, count, 3), ports,
			      count - 4);
	} else if (!strcmp(command, "fill") || !strcmp(command, "differ")) {
		ret = bar_by_sysfs(bdf, word(words, count, 2), word(words, count, 3),
				   word(words, count, 4), *command == 'd', &value);
		answer(ret, "bytes", value);
	} else if (!strcmp(command, "events")) {
		if (read(events, &value, sizeof(value)) != sizeof(value))
			value = 0;
		answer(events < 0 ? EBADF : 0, "count", value);
	} else if (!strcmp(command, "flooded")) {
		answer(0, "flooded", flooded);
	} else if (!d) {
		answer(EBADF, NULL, 0);
	} else if (!strcmp(command, "close")) {
		answer(do_close(d), NULL, 0);
	} else if (!strcmp(command, "set") && count >= 5 && count < 5 + MOST_IDS) {
		for (int i = 5; i < count; i++)
			ids[i - 5] = word(words, count, i);
		answer(set(d->fd, word(words, count, 2), word(words, count, 3),
			   word(words, count, 4), ids), NULL, 0);
	} else if (!strcmp(command, "set-failing") && count == 4) {
		ids[0] = word(words, count, 3);
		ret = set_failing(d->fd, word(words, count, 2), ids, &value);
		answer(ret, "failed", value);
	} else if (!strcmp(command, "token")) {
		answer(set_token(d->fd, word(words, count, 2)), NULL, 0);
	} else if (!strcmp(command, "get")) {
		uint32_t flags = 0, suspends = 0;

		ret = get(d->fd, &flags, &suspends);
		printf("{\"errno\": %d, \"flags\": %u, \"suspends\": %u}\n", ret, flags,
		       suspends);
	} else if (!strcmp(command, "config") && (count == 4 || count == 5)) {
		value = word(words, count, 4);
		ret = config(d->fd, word(words, count, 2), word(words, count, 3), count == 5,
			     &value);
		answer(ret, "value", value);
	} else if (!strcmp(command, "low-power")) {
		answer(low_power(d->fd, word(words, count, 2)), NULL, 0);
	} else if (!strcmp(command, "probe")) {
		answer(probe(d->fd), NULL, 0);
	} else if (!strcmp(command, "reset")) {
		answer(ioctl(d->fd, VFIO_DEVICE_RESET) ? fail() : 0, NULL, 0);
	} else if (!strcmp(command, "hot-reset")) {
		answer(hot_reset(d->fd), NULL, 0);
	} else if (!strcmp(command, "map")) {
		answer(map_bar(d, word(words, count, 2), word(words, count, 3)), NULL, 0);
	} else if (!strcmp(command, "nvme")) {
		answer(start_controller(d), NULL, 0);
	} else if (!strcmp(command, "claims") && count > 3 && count < 12) {
		ret = open_acs(words + 4, count - 4, ports);
		if (ret)
			answer(ret, NULL, 0);
		else
			claims(d, word(words, count, 2), strtod(words[3], NULL), ports, count - 4);
	} else if (!d->bar0) {
		answer(ENOTCONN, NULL, 0);
	} else if (!strcmp(command, "write")) {
		nvme_write(d, word(words, count, 2), word(words, count, 3));
	} else if (!strcmp(command, "read")) {
		ret = read_by_clock(d, word(words, count, 2), &value);
		answer(ret < 0 ? ETIMEDOUT : ret ? EIO : 0, "value", value);
	} else if (!strcmp(command, "flood")) {
		struct flood *f = malloc(sizeof(*f));
		pthread_t thread;

		if (!f)
			err(1, "memory");
		*f = (struct flood){ d, word(words, count, 2) };
		answer(pthread_create(&thread, NULL, flood, f), NULL, 0);
	} else {
		answer(ENOSYS, NULL, 0);
	}
}

int main(void)
{
	static char line[16384], *words[MOST_IDS + 8];

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("{\"pid\": %d}\n", getpid());
	while (fgets(line, sizeof(line), stdin)) {
		int count = 0;

		for (char *at = strtok(line, " \n"); at && count < MOST_IDS + 8;
		     at = strtok(NULL, " \n"))
			words[count++] = at;
		if (count)
			obey(words, count);
	}
	return 0;
}
