// SPDX-License-Identifier: Apache-2.0
// The list of steps, and running them by name.

#include <stdio.h>
#include <string.h>

#include "guest.h"

const struct step steps[] = {
	{ "hello", step_hello, "kernel, CPUs, memory, ACPI, uptime" },
	{ "cpus", step_cpus, "a counting thread on every CPU" },
	{ "memtouch", step_memtouch, "=MiB: fill and check that much memory" },
	{ "ram", step_ram, "check RAM that mem= keeps from the kernel" },
	{ "blkid", step_blkid, "the disks" },
	{ "disk", step_disk, "[=DISK]: write a file, read it back" },
	{ "diskro", step_diskro, "[=DISK]: writing must fail" },
	{ "net", step_net, "[=NIC:A.B.C.D/LEN]: bring a NIC up (brume.ip=)" },
	{ "ping", step_ping, "=A.B.C.D: three echo requests" },
	{ "pinged", step_pinged, "=COUNT: wait for that many echo requests" },
	{ "mmds", step_mmds, "=A.B.C.D/PATH: a value of the metadata service" },
	{ "serve", step_serve, "=SECONDS: stay up" },
	{ "witness", step_witness, "count, write and answer until told to quit" },
	{ "rng", step_rng, "bytes from the hardware generator" },
	{ "echo", step_echo, "a line from the console, back to it" },
	{ "panic", step_panic, "crash the kernel" },
	{ "poweroff", step_poweroff, "by ACPI, or else by reset" },
	{ "reboot", step_reboot, "" },
	{ "halt", step_halt, "stop the CPUs, without power off" },
	{ NULL, NULL, NULL },
};

bool run_step(const char *text)
{
	const char *argument = strchr(text, '=');
	size_t length = argument ? (size_t)(argument - text) : strlen(text);

	for (const struct step *step = steps; step->name; step++)
		if (strlen(step->name) == length && !strncmp(step->name, text, length))
			return step->run(argument ? argument + 1 : NULL);
	return step_failed(text, "no such step");
}

void run_steps(const char *list)
{
	char copy[2048], *rest = copy, *text;

	snprintf(copy, sizeof(copy), "%s", list);
	while ((text = strsep(&rest, ",")))
		if (*text)
			run_step(text);
}
