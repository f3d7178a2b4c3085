// SPDX-License-Identifier: Apache-2.0
// Steps at character devices: the console's other direction, the generator.

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

bool step_echo(const char *argument)
{
	char line[256];
	ssize_t length;

	(void)argument;
	step_note("echo", "ready");
	length = read(STDIN_FILENO, line, sizeof(line) - 1);
	if (length <= 0)
		return step_failed_errno("echo", "reading the console");
	line[length] = 0;
	line[strcspn(line, "\r\n")] = 0;
	return step_ok("echo", "line=%s", line);
}

bool step_rng(const char *argument)
{
	uint8_t bytes[64];
	char name[64] = "none";
	int generator = open("/dev/hwrng", O_RDONLY | O_CLOEXEC);
	ssize_t length = generator < 0 ? -1 : read(generator, bytes, sizeof(bytes));

	(void)argument;
	if (generator >= 0)
		close(generator);
	if (length <= 0)
		return step_failed_errno("rng", "/dev/hwrng");
	read_text("/sys/class/misc/hw_random/rng_current", name, sizeof(name));
	return step_ok("rng", "source=%s bytes=%zd fnv=%016llx", name, length,
		       (unsigned long long)fnv1a(FNV_START, bytes, length));
}
