/* distill: the command line. Prints what failed once and turns the status into the exit code. */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "kernels/cpu/open.h"
#include "train/command.h"

#ifndef DISTILL_VERSION
#error "the build passes DISTILL_VERSION"
#endif

static const struct { const char *name; int (*run)(int, char **); const char *summary; } commands[] = {
    {"tokenizer-train", command_tokenizer_train, "learn a byte-level BPE tokenizer from a corpus"},
    {"tokenize", command_tokenize, "text in, ids out"},
    {"teacher-dump", command_teacher_dump, "run the teacher once over the corpus and write logit shards"},
    {"import-logits", command_import_logits, "make shards from log-probabilities that another program captured (JSONL)"},
    {"train", command_train, "train a student on shards (or a model on plain text)"},
    {"eval", command_eval, "compare student and teacher on held-out text"},
    {"generate", command_generate, "continue a prompt"},
    {"export", command_export, "write a model for an inference engine: safetensors or GGUF"},
    {"inspect", command_inspect, "look into a model directory, a dataset of shards or one shard"},
    {"check", command_check, "compare this build with a reference made by transformers and PyTorch"},
    {"bench", command_bench, "measure this machine: train, teacher, kernels, io"},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void usage(FILE *f)
{
    fprintf(f, "distill %s: make a small language model out of a large one, offline\n\nusage: distill <command> ...\n\n", DISTILL_VERSION);
    for (int i = 0; i < N_COMMANDS; i++) fprintf(f, "  %-16s %s\n", commands[i].name, commands[i].summary);
    fprintf(f, "\ndistill <command> --help shows a command's keys, defaults and an example.\n"
               "Exit codes: 0 done, 2 usage or configuration, 3 broken input, 4 I/O, 5 numeric, 6 inputs that do not belong together, 75 stopped and resumable.\n");
}

/* Has everything on standard output arrived? A full disk behind a redirection is found here. */
static int printed(const char *what)
{
    if (!fflush(stdout) && !ferror(stdout)) return OK;
    fprintf(stderr, "distill %s: standard output: cannot be written\n", what);
    return ERR_IO;
}

int main(int argc, char **argv)
{
    cpu_prepare_process(argv);
    signal(SIGXFSZ, SIG_IGN);      /* a limit on file sizes (ulimit -f) is an error of the write that meets it, with a message, and no death */
    if (argc < 2) { usage(stderr); return ERR_USAGE; }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) { usage(stdout); return printed("--help"); }
    if (!strcmp(argv[1], "--version")) { printf("distill %s\n", DISTILL_VERSION); return printed("--version"); }
    if (!strcmp(argv[1], "--config-reference")) { config_print_markdown(stdout); return printed("--config-reference"); }   /* the README's table is made of this */
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name)) continue;
        int rc = commands[i].run(argc - 1, argv + 1);
        if (rc != OK && fail_message()[0]) fprintf(stderr, "distill %s: %s\n", commands[i].name, fail_message());
        return rc == OK ? printed(commands[i].name) : rc;
    }
    fprintf(stderr, "distill: unknown command %s; see distill --help\n", argv[1]);
    return ERR_USAGE;
}
