// SPDX-License-Identifier: Apache-2.0
// Process 1 of the test guest, from an initramfs (/init) or a disk (/sbin/init).
// `brume.do=` on the kernel's command line says what to do; without it there
// is a shell on the console.

#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

static void mount_kernel_files(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	// On a disk's root the kernel has mounted it: then this fails, and nothing is lost.
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
}

// The kernel gives process 1 its console, unless the root lacks /dev/console.
static void open_console(void)
{
	if (fcntl(STDOUT_FILENO, F_GETFD) >= 0)
		return;
	int console = open("/dev/console", O_RDWR);
	for (int file = STDIN_FILENO; console >= 0 && file <= STDERR_FILENO; file++)
		dup2(console, file);
}

// The shell is a process of its own: process 1 can neither have a controlling terminal that
// kills it with ^C, nor end.
static void run_shell(void)
{
	pid_t child = fork();

	if (child == 0) {
		shell();
		_exit(0);
	}
	while (wait(NULL) != child)
		;
}

int main(void)
{
	mount_kernel_files();
	open_console();
	const char *list = cmdline_value("brume.do");
	if (list)
		run_steps(list);
	else
		run_shell();
	// The end of the list, and of the shell, is the end of the machine.
	step_poweroff(NULL);
	for (;;)
		pause();
}
