// SPDX-License-Identifier: Apache-2.0
// The shell's own commands: what one looks at first in a new machine.

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "guest.h"
#include "commands.h"

struct command {
	const char *name;
	void (*run)(char **words, int count);
	const char *help;
};
static const struct command commands[];

static void help(char **words, int count)
{
	(void)words, (void)count;
	printf("Commands (`> FILE` and `>> FILE` work):\n");
	printf("  %-9s %s\n", "cd", "DIRECTORY");
	for (const struct command *command = commands; command->name; command++)
		printf("  %-9s %s\n", command->name, command->help);
	printf("  %-9s %s\n", "exit", "power off");
	printf("Test steps, as in brume.do= on the kernel's command line:\n");
	for (const struct step *step = steps; step->name; step++)
		printf("  %-9s %s\n", step->name, step->help);
}

static void list_entry(const char *directory, const char *name, bool at_length)
{
	char path[512], target[256] = "";
	struct stat entry;
	ssize_t length;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	if (lstat(path, &entry))
		return;
	char kind = S_ISDIR(entry.st_mode) ? '/' : S_ISLNK(entry.st_mode) ? '@' : 0;
	if (!at_length) {
		printf("%s%.1s  ", name, &kind);
		return;
	}
	length = S_ISLNK(entry.st_mode) ? readlink(path, target, sizeof(target) - 1) : 0;
	target[length > 0 ? length : 0] = 0;
	printf("%06o %4u %4u %10lld %s%s%s\n", entry.st_mode, entry.st_uid, entry.st_gid,
	       (long long)entry.st_size, name, *target ? " -> " : "", target);
}

static int no_dots(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

static void ls(char **words, int count)
{
	bool at_length = count > 1 && !strcmp(words[1], "-l");
	const char *directory = count > 1 + at_length ? words[1 + at_length] : ".";
	struct dirent **entries;
	int found = scandir(directory, &entries, no_dots, alphasort);

	if (found < 0) {
		perror(directory);
		return;
	}
	for (int i = 0; i < found; i++)
		list_entry(directory, entries[i]->d_name, at_length);
	if (found && !at_length)
		printf("\n");
}

static void cat_file(const char *path)
{
	char piece[4096];
	int file = open(path, O_RDONLY);
	ssize_t length;

	if (file < 0) {
		perror(path);
		return;
	}
	while ((length = read(file, piece, sizeof(piece))) > 0)
		fwrite(piece, 1, length, stdout);
	if (length < 0)
		perror(path);
	close(file);
}

static void cat(char **words, int count)
{
	for (int i = 1; i < count; i++)
		cat_file(words[i]);
}

static void echo(char **words, int count)
{
	for (int i = 1; i < count; i++)
		printf("%s%s", i > 1 ? " " : "", words[i]);
	printf("\n");
}

static void print_directory(char **words, int count)
{
	char here[256];

	(void)words, (void)count;
	printf("%s\n", getcwd(here, sizeof(here)) ? here : "?");
}

static void make_directory(char **words, int count)
{
	for (int i = 1; i < count; i++)
		if (mkdir(words[i], 0755))
			perror(words[i]);
}

static void delete(char **words, int count)
{
	for (int i = 1; i < count; i++)
		if (remove(words[i]))
			perror(words[i]);
}

static void mount_device(char **words, int count)
{
	if (count == 1)
		cat_file("/proc/mounts");
	else if (count < 3)
		printf("mount DEVICE DIRECTORY [TYPE]\n");
	else if (mount(words[1], words[2], count > 3 ? words[3] : "ext4", 0, NULL))
		perror(words[1]);
}

static void unmount(char **words, int count)
{
	if (count > 1 && umount(words[1]))
		perror(words[1]);
}

static void print_system(char **words, int count)
{
	struct utsname name;

	(void)words, (void)count;
	if (!uname(&name))
		printf("%s %s %s %s\n", name.sysname, name.release, name.version, name.machine);
}

static void print_memory(char **words, int count)
{
	struct sysinfo memory;

	(void)words, (void)count;
	if (sysinfo(&memory))
		return;
	printf("total %lu KiB, free %lu KiB, buffers %lu KiB\n", memory.totalram * memory.mem_unit / 1024,
	       memory.freeram * memory.mem_unit / 1024, memory.bufferram * memory.mem_unit / 1024);
}

static void print_uptime(char **words, int count)
{
	(void)words, (void)count;
	cat_file("/proc/uptime");
}

static void print_log(char **words, int count)
{
	static char log[128 * 1024];
	int length = klogctl(3, log, sizeof(log) - 1); // SYSLOG_ACTION_READ_ALL

	(void)words, (void)count;
	// Each line begins with its level, as in `<6>`.
	for (char *rest = log, *line; length > 0 && (line = strsep(&rest, "\n"));)
		printf("%s\n", *line == '<' ? line + 3 : line);
}

static void list_nics(char **words, int count)
{
	(void)words, (void)count;
	cat_file("/proc/net/dev");
	cat_file("/proc/net/route");
}

static void list_processes(char **words, int count)
{
	struct dirent **entries;
	char path[64], name[64];
	int found = scandir("/proc", &entries, no_dots, alphasort);

	(void)words, (void)count;
	for (int i = 0; i < found; i++) {
		if (atoi(entries[i]->d_name) <= 0)
			continue;
		snprintf(path, sizeof(path), "/proc/%.16s/comm", entries[i]->d_name);
		if (read_text(path, name, sizeof(name)))
			printf("%5s %s\n", entries[i]->d_name, name);
	}
}

static const struct command commands[] = {
	{ "help", help, "" },
	{ "ls", ls, "[-l] [DIRECTORY]" },
	{ "cat", cat, "FILE ..." },
	{ "echo", echo, "WORD ..." },
	{ "pwd", print_directory, "" },
	{ "mkdir", make_directory, "DIRECTORY ..." },
	{ "rm", delete, "FILE ..." },
	{ "mount", mount_device, "[DEVICE DIRECTORY [TYPE]]" },
	{ "umount", unmount, "DIRECTORY" },
	{ "uname", print_system, "" },
	{ "free", print_memory, "" },
	{ "uptime", print_uptime, "" },
	{ "ps", list_processes, "" },
	{ "nics", list_nics, "traffic and routes" },
	{ "dmesg", print_log, "" },
	{ NULL, NULL, NULL },
};

bool run_command(char **words, int count)
{
	for (const struct command *command = commands; command->name; command++)
		if (!strcmp(command->name, words[0])) {
			command->run(words, count);
			return true;
		}
	return false;
}
