/* The commands. Each takes its own arguments (argv[0] is the command's name) and returns a status, which is the exit code; main prints
 * fail_message() once. `--help` prints to stdout and returns OK. */
#ifndef TRAIN_COMMAND_H
#define TRAIN_COMMAND_H

#include "train/config.h"

int command_teacher_dump(int argc, char **argv);
int command_import_logits(int argc, char **argv);
int command_train(int argc, char **argv);
int command_eval(int argc, char **argv);
int command_generate(int argc, char **argv);
int command_export(int argc, char **argv);
int command_inspect(int argc, char **argv);
int command_check(int argc, char **argv);
int command_tokenize(int argc, char **argv);
int command_tokenizer_train(int argc, char **argv);
int command_bench(int argc, char **argv);

/* For commands of the form "CONFIG.yaml [--set key=value ...] [flags]": reads the file and the settings in order. Flags of the command's
 * own are offered to `flag` (may be NULL), which returns 1 when it took argv[*i] (and advanced *i over a value), 0 when it does not know it.
 * *help is set when --help was asked for (and printed). ERR_USAGE otherwise, by name. */
int command_config(int argc, char **argv, enum command_id id, const char *summary, const char *example,
                   int (*flag)(void *context, int argc, char **argv, int *i), void *context, const char *flag_help,
                   struct config **config, int *help);

#endif
