// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A TCG plugin for the emulator of the testbed: it counts the instructions
 * that each CPU of the emulated host executes, those of guests in it apart,
 * and writes the counts to a log whenever a mark is executed.
 *
 *   -plugin nm-insns.so,log=FILE[,always=on]
 *
 * Lines are added to the log's end. With always=on the counting begins with the
 * machine and isn't ended by marks: an emulator without any is the faster one.
 *
 * A mark is a long NOP that no compiler or assembler writes (probes/insns.h),
 *
 *   0f 1f 84 00 ss aa 4d 4e     nopl 0x4e4daass(%rax,%rax,1)
 *
 * with an action aa and a number ss that is the program's own. It needs no
 * privilege and does not leave the guest, so it costs nothing and may stand
 * anywhere, also in user mode of a guest's guest.
 *
 *   aa = 1   from now on instructions are counted (some microseconds later:
 *            all that is translated is translated again)
 *   aa = 2   they no longer are, and cost no more than without the plugin
 *   aa = 3   write a line to the log, unless nothing is counted
 *
 * A line of the log is
 *
 *   ss cpu host guest entries
 *
 * that CPU's instructions outside and inside of guests and its entries into
 * guests (VMRUN) since the emulator was started, as decimal numbers. Marks
 * themselves are not counted.
 *
 * An instruction is counted when its execution begins. One that faults and is
 * then started again counts twice, one that KVM emulates after an exit counts
 * once, REP with its iterations counts about once.
 *
 * A CPU is inside of a guest from behind VMRUN until it comes to the
 * instruction that follows it.
 */
#include <glib.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

enum {
	MARK_COUNT = 1,
	MARK_REST = 2,
	MARK_WRITE = 3,
};

#define MARK_SIZE 8

struct cpu {
	uint64_t insns;		/* all, while they are counted */
	uint64_t guest;		/* of these in guests that have been left */
	uint64_t entered;	/* insns when the guest was entered */
	uint64_t entries;
	uint64_t inside;	/* whether a guest runs */
};

/* KVM has one VMRUN; there is room for a few copies of it. */
#define MAX_RETURNS 16

static struct qemu_plugin_scoreboard *cpus;
static qemu_plugin_u64 insns;
static qemu_plugin_id_t self;
static FILE *output;
static bool always;
static bool counting;
static GMutex lock;
static uint64_t returns[MAX_RETURNS];
static int n_returns;

static void on_translation(struct qemu_plugin_tb *tb, void *data);

static void on_reset(void *data)
{
	(void)data;
	qemu_plugin_register_vcpu_tb_trans_cb(self, on_translation, NULL);
}

static void set_counting(bool wanted)
{
	bool changes;

	g_mutex_lock(&lock);
	changes = !always && counting != wanted;
	if (changes)
		counting = wanted;
	g_mutex_unlock(&lock);
	/* drops all translations, and lets on_reset() begin anew */
	if (changes)
		qemu_plugin_reset(self, on_reset, NULL);
}

static void on_mark(unsigned int index, void *data)
{
	struct cpu *cpu = qemu_plugin_scoreboard_find(cpus, index);
	unsigned int mark = GPOINTER_TO_UINT(data);
	uint64_t guest;

	switch (mark >> 8) {
	case MARK_COUNT:
		set_counting(true);
		break;
	case MARK_REST:
		set_counting(false);
		break;
	case MARK_WRITE:
		guest = cpu->guest;
		if (cpu->inside)
			guest += cpu->insns - cpu->entered;
		g_mutex_lock(&lock);
		if (counting)
			fprintf(output, "%u %u %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
				mark & 0xff, index, cpu->insns - guest, guest,
				cpu->entries);
		g_mutex_unlock(&lock);
		break;
	}
}

static void on_vmrun(unsigned int index, void *data)
{
	struct cpu *cpu = qemu_plugin_scoreboard_find(cpus, index);

	(void)data;
	cpu->entries++;
	cpu->entered = cpu->insns;
	cpu->inside = 1;
}

static void on_return(unsigned int index, void *data)
{
	struct cpu *cpu = qemu_plugin_scoreboard_find(cpus, index);

	(void)data;
	if (cpu->inside)
		cpu->guest += cpu->insns - cpu->entered;
	cpu->inside = 0;
}

static bool is_return(uint64_t address)
{
	bool found = false;

	g_mutex_lock(&lock);
	for (int i = 0; i < n_returns && !found; i++)
		found = returns[i] == address;
	g_mutex_unlock(&lock);
	return found;
}

static void remember_return(uint64_t address)
{
	if (is_return(address))
		return;
	g_mutex_lock(&lock);
	if (n_returns < MAX_RETURNS)
		returns[n_returns++] = address;
	else
		fprintf(stderr, "nm-insns: too many places with VMRUN\n");
	g_mutex_unlock(&lock);
}

/* The action and the number of a mark, or 0. */
static unsigned int mark_of(const uint8_t *code, size_t size)
{
	static const uint8_t nop[4] = { 0x0f, 0x1f, 0x84, 0x00 };

	if (size != MARK_SIZE || memcmp(code, nop, sizeof(nop)) ||
	    code[6] != 0x4d || code[7] != 0x4e)
		return 0;
	return code[5] << 8 | code[4];
}

static void on_translation(struct qemu_plugin_tb *tb, void *data)
{
	static const uint8_t vmrun[3] = { 0x0f, 0x01, 0xd8 };
	size_t n = qemu_plugin_tb_n_insns(tb);
	uint8_t code[MARK_SIZE];
	unsigned int mark;

	(void)data;
	for (size_t i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		size_t size = qemu_plugin_insn_size(insn);

		/* #VMEXIT goes on where a block begins */
		if (i == 0 && is_return(qemu_plugin_insn_vaddr(insn)))
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, on_return, QEMU_PLUGIN_CB_NO_REGS, NULL);

		mark = 0;
		if (size == MARK_SIZE &&
		    qemu_plugin_insn_data(insn, code, size) == size)
			mark = mark_of(code, size);
		if (mark) {
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, on_mark, QEMU_PLUGIN_CB_NO_REGS,
				GUINT_TO_POINTER(mark));
			continue;
		}

		if (counting)
			qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
				insn, QEMU_PLUGIN_INLINE_ADD_U64, insns, 1);

		/* it ends its block: the count above comes before this one */
		if (size == sizeof(vmrun) &&
		    qemu_plugin_insn_data(insn, code, size) == size &&
		    !memcmp(code, vmrun, size)) {
			remember_return(qemu_plugin_insn_vaddr(insn) + size);
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, on_vmrun, QEMU_PLUGIN_CB_NO_REGS, NULL);
		}
	}
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info,
					   int argc, char **argv)
{
	const char *log = NULL;

	if (!info->system_emulation || strcmp(info->target_name, "x86_64")) {
		fprintf(stderr, "nm-insns: only for whole x86-64 machines\n");
		return -1;
	}
	for (int i = 0; i < argc; i++) {
		if (g_str_has_prefix(argv[i], "log=")) {
			log = argv[i] + strlen("log=");
		} else if (g_str_has_prefix(argv[i], "always=")) {
			if (!qemu_plugin_bool_parse("always", argv[i] + strlen("always="),
						    &always)) {
				fprintf(stderr, "nm-insns: always=on or always=off\n");
				return -1;
			}
		} else {
			fprintf(stderr, "nm-insns: unknown option %s\n", argv[i]);
			return -1;
		}
	}
	if (!log) {
		fprintf(stderr, "nm-insns: log=FILE is missing\n");
		return -1;
	}
	output = fopen(log, "ae");
	if (!output) {
		fprintf(stderr, "nm-insns: %s: %s\n", log, g_strerror(errno));
		return -1;
	}
	/* a reader sees whole lines, also if the emulator is killed */
	setvbuf(output, NULL, _IOLBF, 0);

	self = id;
	counting = always;
	cpus = qemu_plugin_scoreboard_new(sizeof(struct cpu));
	insns = qemu_plugin_scoreboard_u64_in_struct(cpus, struct cpu, insns);
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
	return 0;
}
