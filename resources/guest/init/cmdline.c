// SPDX-License-Identifier: Apache-2.0
// The kernel's command line, from which the guest learns what to do.

#include <string.h>

#include "guest.h"

#define WORDS_MAX 128

static const char *words[WORDS_MAX + 1];

static void split_line(void)
{
	static char line[4096];
	char *rest = line, *word;
	int count = 0;

	if (!read_text("/proc/cmdline", line, sizeof(line)))
		return;
	while (count < WORDS_MAX && (word = strsep(&rest, " ")))
		words[count++] = word;
}

const char *cmdline_value(const char *name)
{
	size_t length = strlen(name);
	const char *value = NULL;

	if (!words[0])
		split_line();
	for (const char **word = words; *word; word++)
		if (!strncmp(*word, name, length) && (*word)[length] == '=')
			value = *word + length + 1;
	return value;
}
