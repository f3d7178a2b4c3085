// SPDX-License-Identifier: Apache-2.0
// Whether memory holds what is put there: the kernel's own (`memtouch`), and
// what `mem=` keeps from the kernel (`ram`), so that a guest with much memory
// need not spend its boot on setting up a description of every page.

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

#define MIB (1024ULL * 1024)
#define PAGE 4096ULL

// A different word at every address, and never zero.
static uint64_t pattern(uint64_t address)
{
	return (address + 1) * 0x9e3779b97f4a7c15ULL | 1;
}

bool step_memtouch(const char *argument)
{
	uint64_t length = argument ? strtoull(argument, NULL, 0) * MIB : 0;
	uint64_t *words;

	if (!length)
		return step_failed("memtouch", "give a size in MiB, as in memtouch=64");
	// Small machines keep huge pages off by themselves; they save a fault for each 4 KiB.
	write_text("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	words = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (words == MAP_FAILED)
		return step_failed_errno("memtouch", "mmap");
	madvise(words, length, MADV_HUGEPAGE);
	for (uint64_t i = 0; i < length / 8; i++)
		words[i] = pattern(i);
	for (uint64_t i = 0; i < length / 8; i++)
		if (words[i] != pattern(i))
			return step_failed("memtouch", "word %llu is %llx", (unsigned long long)i,
					   (unsigned long long)words[i]);
	munmap(words, length);
	return step_ok("memtouch", "mib=%llu", (unsigned long long)(length / MIB));
}

// `mem=` as the kernel reads it: a number with K, M or G after it.
static uint64_t kernel_limit(void)
{
	const char *text = cmdline_value("mem");
	char *unit;
	uint64_t limit;

	if (!text)
		return 0;
	limit = strtoull(text, &unit, 0);
	switch (*unit | 0x20) {
	case 'g':
		return limit << 30;
	case 'm':
		return limit << 20;
	case 'k':
		return limit << 10;
	}
	return limit;
}

// Pages that are looked at: the first and last of each range of RAM, and one each STRIDE between.
#define STRIDE (64 * MIB)
#define PROBES_MAX 4096

struct probe {
	uint64_t address;
	volatile uint64_t *words;
};

static int probe_range(struct probe *probes, int count, uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end && count < PROBES_MAX - 1; at += STRIDE)
		probes[count++].address = at;
	if (count && probes[count - 1].address != end - PAGE)
		probes[count++].address = end - PAGE;
	return count;
}

// The firmware's memory map is kept as it came, whatever `mem=` says.
static int find_probes(struct probe *probes, uint64_t limit)
{
	char path[64], type[64];
	int count = 0;

	for (int entry = 0;; entry++) {
		snprintf(path, sizeof(path), "/sys/firmware/memmap/%d/type", entry);
		if (!read_text(path, type, sizeof(type)))
			return count;
		snprintf(path, sizeof(path), "/sys/firmware/memmap/%d/start", entry);
		uint64_t start = read_number(path, 0);
		snprintf(path, sizeof(path), "/sys/firmware/memmap/%d/end", entry);
		uint64_t end = read_number(path, 0) + 1;
		if (start < limit)
			start = limit;
		start = (start + PAGE - 1) & -PAGE;
		end &= -PAGE;
		if (type[0] == 'S' && start < end) // "System RAM"
			count = probe_range(probes, count, start, end);
	}
}

static bool map_probes(struct probe *probes, int count)
{
	int memory = open("/dev/mem", O_RDWR | O_CLOEXEC);

	for (int i = 0; i < count && memory >= 0; i++) {
		void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, probes[i].address);
		if (page == MAP_FAILED) {
			close(memory);
			return false;
		}
		probes[i].words = page;
	}
	return memory >= 0 && !close(memory);
}

bool step_ram(const char *argument)
{
	static struct probe probes[PROBES_MAX];
	uint64_t limit = kernel_limit();
	int count;

	(void)argument;
	if (!limit)
		return step_failed("ram", "the command line has no mem=");
	count = find_probes(probes, limit);
	if (!count)
		return step_failed("ram", "no RAM above mem=");
	if (!map_probes(probes, count))
		return step_failed_errno("ram", "/dev/mem");
	// All are written before any is read, so that two addresses of one page are found out.
	for (int i = 0; i < count; i++)
		for (uint64_t word = 0; word < PAGE / 8; word++)
			probes[i].words[word] = pattern(probes[i].address + word * 8);
	for (int i = 0; i < count; i++)
		for (uint64_t word = 0; word < PAGE / 8; word++)
			if (probes[i].words[word] != pattern(probes[i].address + word * 8))
				return step_failed("ram", "address %llx holds %llx",
						   (unsigned long long)(probes[i].address + word * 8),
						   (unsigned long long)probes[i].words[word]);
	return step_ok("ram", "pages=%d first=%llx last=%llx", count, (unsigned long long)probes[0].address,
		       (unsigned long long)probes[count - 1].address);
}
