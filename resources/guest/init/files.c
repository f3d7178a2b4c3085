// SPDX-License-Identifier: Apache-2.0
// Small files, as /proc and /sys have them.

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

bool read_text(const char *path, char *text, size_t size)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length;

	if (file < 0)
		return false;
	length = read(file, text, size - 1);
	close(file);
	if (length < 0)
		length = 0;
	if (length > 0 && text[length - 1] == '\n')
		length--;
	text[length] = 0;
	return true;
}

uint64_t read_number(const char *path, uint64_t otherwise)
{
	char text[64], *end;
	uint64_t number;

	if (!read_text(path, text, sizeof(text)))
		return otherwise;
	number = strtoull(text, &end, 0);
	return end == text ? otherwise : number;
}

bool write_text(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);
	size_t length = strlen(text);
	bool written;

	if (file < 0)
		return false;
	written = write(file, text, length) == (ssize_t)length;
	close(file);
	return written;
}

uint64_t fnv1a(uint64_t hash, const void *bytes, size_t length)
{
	const uint8_t *byte = bytes;

	for (size_t i = 0; i < length; i++)
		hash = (hash ^ byte[i]) * 0x100000001b3ULL;
	return hash;
}
