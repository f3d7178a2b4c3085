// SPDX-License-Identifier: Apache-2.0
// What machine this is, and whether all of its CPUs work.

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define CPUS_MAX 64
#define EXT_MAGIC 0xef53

static uint64_t milliseconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000ULL + now.tv_nsec / 1000000;
}

bool step_hello(const char *argument)
{
	struct utsname name;
	struct sysinfo memory;
	struct statfs root;
	char clock[32] = "none";

	(void)argument;
	if (uname(&name) || sysinfo(&memory) || statfs("/", &root))
		return step_failed_errno("hello", "asking the kernel");
	read_text("/sys/devices/system/clocksource/clocksource0/current_clocksource", clock, sizeof(clock));
	return step_ok("hello", "kernel=%s cpus=%ld mem_kib=%llu acpi=%s root=%s clock=%s uptime_ms=%llu",
		       name.release, sysconf(_SC_NPROCESSORS_ONLN),
		       (unsigned long long)memory.totalram * memory.mem_unit / 1024,
		       access("/sys/firmware/acpi/tables", F_OK) ? "off" : "on",
		       root.f_type == EXT_MAGIC ? "disk" : "initramfs", clock,
		       (unsigned long long)milliseconds(CLOCK_BOOTTIME));
}

struct counter {
	pthread_t thread;
	int cpu;	   // where it is told to run
	int ran_on;	   // where the kernel says it ran, or -1
	uint64_t count;
};

// All CPUs count during the same stretch of time, so that they are seen to run side by side.
#define COUNT_MS 50

static void *count(void *argument)
{
	struct counter *counter = argument;
	unsigned cpu;
	cpu_set_t only;

	CPU_ZERO(&only);
	CPU_SET(counter->cpu, &only);
	counter->ran_on = -1;
	if (sched_setaffinity(0, sizeof(only), &only))
		return NULL;
	for (uint64_t end = milliseconds(CLOCK_MONOTONIC) + COUNT_MS; milliseconds(CLOCK_MONOTONIC) < end;)
		counter->count++;
	// Not sched_getcpu(): the vDSO reads a segment's limit, which not every KVM keeps for the guest.
	if (!syscall(SYS_getcpu, &cpu, NULL, NULL))
		counter->ran_on = cpu;
	return NULL;
}

static int start_counters(struct counter *counters, const cpu_set_t *online)
{
	int started = 0;

	for (int cpu = 0; cpu < CPUS_MAX; cpu++) {
		if (!CPU_ISSET(cpu, online))
			continue;
		counters[started].cpu = cpu;
		if (pthread_create(&counters[started].thread, NULL, count, &counters[started]))
			break;
		started++;
	}
	return started;
}

bool step_cpus(const char *argument)
{
	static struct counter counters[CPUS_MAX];
	char text[CPUS_MAX * 24] = "";
	cpu_set_t online;
	int started, broken = -1;
	size_t used = 0;

	(void)argument;
	memset(counters, 0, sizeof(counters));
	if (sched_getaffinity(0, sizeof(online), &online))
		return step_failed_errno("cpus", "sched_getaffinity");
	started = start_counters(counters, &online);
	for (int i = 0; i < started; i++) {
		pthread_join(counters[i].thread, NULL);
		if (counters[i].ran_on != counters[i].cpu || !counters[i].count)
			broken = counters[i].cpu;
		used += snprintf(text + used, sizeof(text) - used, " cpu%d=%llu", counters[i].cpu,
				 (unsigned long long)counters[i].count);
	}
	if (started != CPU_COUNT(&online))
		return step_failed("cpus", "threads on %d of %d CPUs", started, CPU_COUNT(&online));
	if (broken >= 0)
		return step_failed("cpus", "CPU %d did not count there:%s", broken, text);
	return step_ok("cpus", "online=%d%s", started, text);
}
