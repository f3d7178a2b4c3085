// SPDX-License-Identifier: Apache-2.0
// What the parts of the test guest's init share.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// --- report.c: one line per result, `brume-guest: STEP ok key=value ...` ----

// A step says exactly one of these last. Each returns what the step returns.
bool step_ok(const char *step, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool step_failed(const char *step, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Something to know before a step's result: `brume-guest: STEP note ...`.
void step_note(const char *step, const char *format, ...) __attribute__((format(printf, 2, 3)));
// The same as step_failed(), with errno's text after the reason.
bool step_failed_errno(const char *step, const char *what);
// Until all that was said has left the serial port.
void console_flush(void);

// --- files.c ----------------------------------------------------------------

// Reads a small file as a string, without the newline at its end. False if it cannot be opened.
bool read_text(const char *path, char *text, size_t size);
// An unsigned decimal number from a file; `otherwise` where there is none.
uint64_t read_number(const char *path, uint64_t otherwise);
bool write_text(const char *path, const char *text);
// FNV-1a, 64 bits: begin with FNV_START and feed pieces in order.
#define FNV_START 0xcbf29ce484222325ULL
uint64_t fnv1a(uint64_t hash, const void *bytes, size_t length);

// --- cmdline.c --------------------------------------------------------------

// The value of `name=` on the kernel's command line, or NULL. The last one counts.
const char *cmdline_value(const char *name);

// --- steps.c ----------------------------------------------------------------

// A step gets what stands after `=` in its name, or NULL. True if it went well.
struct step {
	const char *name;
	bool (*run)(const char *argument);
	const char *help;
};
extern const struct step steps[];
// Runs one step given as `NAME` or `NAME=ARGUMENT`.
bool run_step(const char *text);
// Runs the steps of a list with commas between.
void run_steps(const char *list);

// --- machine.c, memory.c, disk.c, net.c, mmds.c, console.c, power.c,
//     witness.c: the steps -------

bool step_hello(const char *argument);
bool step_cpus(const char *argument);
bool step_memtouch(const char *argument);
bool step_ram(const char *argument);
bool step_disk(const char *argument);
bool step_diskro(const char *argument);
bool step_blkid(const char *argument);
bool step_net(const char *argument);
bool step_ping(const char *argument);
bool step_pinged(const char *argument);
bool step_mmds(const char *argument);
bool step_witness(const char *argument);
bool step_serve(const char *argument);
bool step_echo(const char *argument);
bool step_rng(const char *argument);
bool step_panic(const char *argument);
bool step_poweroff(const char *argument);
bool step_reboot(const char *argument);
bool step_halt(const char *argument);

// Asks the metadata service for a value with the token that is there, if any, then with a new one,
// which is left in its place; the statuses of both answers, 0 where there was none.
void mmds_session(const char *address, const char *path, char *token, size_t size, int *before, int *after);

// --- shell.c ----------------------------------------------------------------

// A prompt on the console, until `exit` or the end of input.
void shell(void);
