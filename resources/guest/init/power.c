// SPDX-License-Identifier: Apache-2.0
// The ends of a machine. Each says its line first and sees it out of the
// serial port: nothing can be said afterwards.

#include <string.h>
#include <sys/klog.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "guest.h"

#define SYSLOG_ACTION_READ_ALL 3

// A kernel that cannot power off halts instead, and a halted machine never ends. What ACPI
// can do stands in the kernel's log alone: "ACPI: PM: (supports S0 S5)".
static bool can_power_off(void)
{
	static char log[64 * 1024];
	int length = klogctl(SYSLOG_ACTION_READ_ALL, log, sizeof(log) - 1);
	const char *supports;

	if (length <= 0)
		return false;
	log[length] = 0;
	supports = strstr(log, "(supports S0");
	if (!supports)
		return false;
	const char *deep = strstr(supports, " S5");
	return deep && deep < strchrnul(supports, '\n');
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
