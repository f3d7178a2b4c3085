// SPDX-License-Identifier: Apache-2.0
// The ends of a machine. Each says its line first and sees it out of the
// serial port: nothing can be said afterwards.

#include <fcntl.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "guest.h"

// A kernel that cannot power off halts instead, and a halted machine never ends. It can if ACPI
// is on and its tables describe the sleep state S5, by an object of that name.
static bool can_power_off(void)
{
	static char table[64 * 1024];
	int file = open("/sys/firmware/acpi/tables/DSDT", O_RDONLY | O_CLOEXEC);
	ssize_t length = file < 0 ? 0 : read(file, table, sizeof(table));

	if (file >= 0)
		close(file);
	return length > 0 && memmem(table, length, "_S5_", 4);
}

static bool end(const char *step, const char *how, int command)
{
	sync();
	step_ok(step, "by=%s", how);
	console_flush();
	reboot(command);
	return step_failed_errno(step, "reboot");
}

bool step_poweroff(const char *argument)
{
	(void)argument;
	return can_power_off() ? end("poweroff", "acpi", RB_POWER_OFF) : end("poweroff", "reset", RB_AUTOBOOT);
}

bool step_reboot(const char *argument)
{
	(void)argument;
	return end("reboot", "reset", RB_AUTOBOOT);
}

bool step_halt(const char *argument)
{
	(void)argument;
	return end("halt", "halt", RB_HALT_SYSTEM);
}

bool step_panic(const char *argument)
{
	(void)argument;
	step_note("panic", "now");
	console_flush();
	write_text("/proc/sysrq-trigger", "c");
	return step_failed("panic", "the kernel lives on");
}
