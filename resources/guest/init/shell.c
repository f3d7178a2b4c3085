// SPDX-License-Identifier: Apache-2.0
// A prompt for a person who boots the guest to look around: a few commands of
// its own, the test steps by their names, and programs.

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"
#include "commands.h"

#define WORDS_MAX 32

// ^C is for the program that runs and not for the shell: that needs a terminal of its own.
static void take_terminal(void)
{
	char name[64] = "", path[80];
	int terminal;

	read_text("/sys/class/tty/console/active", name, sizeof(name));
	// The last of them is the one /dev/console stands for.
	const char *last = strrchr(name, ' ');
	snprintf(path, sizeof(path), "/dev/%s", last ? last + 1 : name);
	setsid();
	terminal = open(path, O_RDWR);
	if (terminal < 0)
		return;
	ioctl(terminal, TIOCSCTTY, 0);
	for (int file = STDIN_FILENO; file <= STDERR_FILENO; file++)
		dup2(terminal, file);
	if (terminal > STDERR_FILENO)
		close(terminal);
}

static int split(char *line, char **words)
{
	int count = 0;
	char *word;

	while (count < WORDS_MAX && (word = strsep(&line, " \t\r\n")))
		if (*word)
			words[count++] = word;
	words[count] = NULL;
	return count;
}

// Takes `> FILE` or `>> FILE` off the end of the words. False if the file cannot be opened.
static bool redirect(char **words, int *count)
{
	int append, file;

	if (*count < 3)
		return true;
	append = !strcmp(words[*count - 2], ">>");
	if (!append && strcmp(words[*count - 2], ">"))
		return true;
	file = open(words[*count - 1], O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC), 0644);
	if (file < 0) {
		perror(words[*count - 1]);
		return false;
	}
	dup2(file, STDOUT_FILENO);
	close(file);
	*count -= 2;
	words[*count] = NULL;
	return true;
}

static void run_program(char **words)
{
	char path[256];

	execv(words[0], words);
	if (!strchr(words[0], '/')) {
		snprintf(path, sizeof(path), "/sbin/%s", words[0]);
		execv(path, words);
		snprintf(path, sizeof(path), "/bin/%s", words[0]);
		execv(path, words);
	}
	if (errno == ENOENT)
		fprintf(stderr, "%s: no such command; there is `help`\n", words[0]);
	else
		perror(words[0]);
	_exit(127);
}

static bool run_named_step(const char *text)
{
	size_t length = strcspn(text, "=");

	for (const struct step *step = steps; step->name; step++)
		if (strlen(step->name) == length && !strncmp(step->name, text, length)) {
			run_step(text);
			return true;
		}
	return false;
}

// In a process of its own, so that ^C ends a command and `>` concerns no other.
static void run_apart(char **words, int count)
{
	int status = 0;
	pid_t child = fork();

	if (child < 0) {
		perror("fork");
		return;
	}
	if (child > 0) {
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
		if (WIFSIGNALED(status))
			printf("(%s)\n", strsignal(WTERMSIG(status)));
		return;
	}
	signal(SIGINT, SIG_DFL);
	if (!redirect(words, &count))
		_exit(1);
	if (!run_command(words, count) && !run_named_step(words[0]))
		run_program(words);
	fflush(stdout);
	_exit(0);
}

// True if the shell is to end.
static bool run_line(char *line)
{
	char *words[WORDS_MAX + 1];
	int count = split(line, words);

	if (!count || *words[0] == '#')
		return false;
	if (!strcmp(words[0], "exit"))
		return true;
	if (!strcmp(words[0], "cd")) {
		if (chdir(count > 1 ? words[1] : "/"))
			perror(count > 1 ? words[1] : "/");
		return false;
	}
	run_apart(words, count);
	return false;
}

void shell(void)
{
	char line[512], here[128];

	take_terminal();
	signal(SIGINT, SIG_IGN);
	printf("\nThis is the test guest of brume. `help` lists what there is.\n");
	for (;;) {
		printf("%s # ", getcwd(here, sizeof(here)) ? here : "?");
		fflush(stdout);
		if (!fgets(line, sizeof(line), stdin))
			return;
		if (run_line(line))
			return;
	}
}
