// SPDX-License-Identifier: Apache-2.0
// The shell's own commands.
#pragma once

#include <stdbool.h>

// Runs the command that words[0] names. False if it is none of the shell's own.
bool run_command(char **words, int count);
