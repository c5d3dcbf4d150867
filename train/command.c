/* Command lines of the form CONFIG.yaml [--set section.key=value ...]. */
#include "train/command.h"

#include <string.h>

#include "base/error.h"

static void print_help(const char *name, enum command_id id, const char *summary, const char *example, const char *flag_help)
{
    printf("distill %s CONFIG.yaml [--set section.key=value ...]%s\n\n%s\n\n", name, flag_help ? " [options]" : "", summary);
    if (flag_help) printf("Options:\n%s\n", flag_help);
    printf("Keys this command reads (CONFIG.yaml or --set):\n");
    config_print_help(stdout, id);
    printf("\nExample:\n    %s\n", example);
}

int command_config(int argc, char **argv, enum command_id id, const char *summary, const char *example,
                   int (*flag)(void *, int, char **, int *), void *context, const char *flag_help, struct config **config, int *help)
{
    int rc = OK;
    struct config *c = config_new();
    const char *path = NULL;
    *help = 0;
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            print_help(argv[0], id, summary, example, flag_help);
            *help = 1;
            goto out;
        }
    for (int i = 1; i < argc; i++) {            /* the file first, whatever the order, so that --set always wins */
        if (!strcmp(argv[i], "--set")) { i++; continue; }
        if (argv[i][0] == '-') { if (flag) flag(context, argc, argv, &i); continue; }
        if (path) { rc = fail(ERR_USAGE, "distill %s takes one configuration file; %s is a second one", argv[0], argv[i]); goto out; }
        path = argv[i];
    }
    if (!path) { rc = fail(ERR_USAGE, "distill %s: no configuration file given; see distill %s --help", argv[0], argv[0]); goto out; }
    TRY(config_read_file(c, path));
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--set")) {
            if (++i == argc) { rc = fail(ERR_USAGE, "--set needs section.key=value behind it"); goto out; }
            TRY(config_set(c, argv[i]));
        } else if (argv[i][0] == '-' && !(flag && flag(context, argc, argv, &i))) {
            rc = fail(ERR_USAGE, "distill %s: unknown option %s; see distill %s --help", argv[0], argv[i], argv[0]);
            goto out;
        }
    }
    *config = c;
    c = NULL;
out:
    config_free(c);
    return rc;
}
