// SPDX-License-Identifier: Apache-2.0
// Lines on the console for whoever watches it. A line is written at once, so
// that the kernel's own messages never come to stand inside it.

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "guest.h"

#define LINE 2048

static void say(const char *step, const char *verdict, const char *format, va_list values)
{
	char line[LINE];
	size_t used = snprintf(line, LINE, "brume-guest: %s %s", step, verdict);

	if (used < LINE)
		used += vsnprintf(line + used, LINE - used, format, values);
	if (used > LINE - 2)
		used = LINE - 2;
	line[used++] = '\n';
	for (size_t sent = 0; sent < used;) {
		ssize_t now = write(STDOUT_FILENO, line + sent, used - sent);
		if (now <= 0)
			return;
		sent += now;
	}
}

bool step_ok(const char *step, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	say(step, *format ? "ok " : "ok", format, values);
	va_end(values);
	return true;
}

bool step_failed(const char *step, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	say(step, "failed: ", format, values);
	va_end(values);
	return false;
}

bool step_failed_errno(const char *step, const char *what)
{
	return step_failed(step, "%s: %s", what, strerror(errno));
}

void step_note(const char *step, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	say(step, "note ", format, values);
	va_end(values);
}

void console_flush(void)
{
	tcdrain(STDOUT_FILENO);
}
