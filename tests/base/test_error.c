/* error: messages, context added on the way up, failed checks, allocations. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "base/error.h"

Test(error, message_and_context)
{
    cr_assert_eq(fail(ERR_INPUT, "%s: %d rows", "a.h5", 31), ERR_INPUT);
    cr_assert_str_eq(fail_message(), "a.h5: 31 rows");
    cr_assert_eq(fail_in(ERR_INPUT, "row %d", 7), ERR_INPUT);
    cr_assert_str_eq(fail_message(), "row 7: a.h5: 31 rows");
    cr_assert_eq(fail(ERR_IO, "again: %s", fail_message()), ERR_IO);                 /* its own message as an argument */
    cr_assert_str_eq(fail_message(), "again: row 7: a.h5: 31 rows");
    cr_assert_eq(fail_in(ERR_IO, "<%s>", fail_message()), ERR_IO);
    cr_assert_str_eq(fail_message(), "<again: row 7: a.h5: 31 rows>: again: row 7: a.h5: 31 rows");
    errno = ENOENT;
    cr_assert_eq(fail_errno(ERR_IO, "x: cannot open"), ERR_IO);
    cr_assert(strstr(fail_message(), "x: cannot open: ") && strstr(fail_message(), strerror(ENOENT)));
}

Test(error, long_and_hostile_names)
{
    char *name = xmalloc(100001);
    memset(name, 'n', 100000);
    name[100000] = 0;
    fail(ERR_INPUT, "%s: broken", name);
    for (int i = 0; i < 20; i++) fail_in(ERR_INPUT, "%s", name);
    cr_assert(strlen(fail_message()) > 1000 && strlen(fail_message()) < 100000);
    fail(ERR_INPUT, "tensor \"%s\"", "\x1b[2Jgone\nline\x7f");
    cr_assert_str_eq(fail_message(), "tensor \"?[2Jgone?line?\"");
    free(name);
}

static int step(int status) { return status == OK ? OK : fail(status, "step %d", status); }

static int sequence(int first, int second, int *released)
{
    int rc = OK;
    TRY(step(first));
    TRY(step(second));
out:
    ++*released;
    return rc;
}

Test(error, first_error_wins_and_cleanup_runs)
{
    int released = 0;
    cr_assert_eq(sequence(OK, OK, &released), OK);
    cr_assert_eq(sequence(ERR_MISMATCH, ERR_IO, &released), ERR_MISMATCH);
    cr_assert_str_eq(fail_message(), "step 6");
    cr_assert_eq(sequence(OK, ERR_IO, &released), ERR_IO);
    cr_assert_eq(released, 3);
}

Test(error, check_aborts, .signal = SIGABRT) { CHECK(1 + 1 == 3, "arithmetic is %s", "sound"); }

Test(error, allocations)
{
    free(xmalloc(0));
    free(xcalloc(0, 8));
    char *grown = xrealloc(xstrdup("abc"), 100);
    cr_assert_str_eq(grown, "abc");
    free(grown);
    char *part = xstrndup("abcdef", 3), *printed = xasprintf("%s-%05d", part, 42);
    cr_assert_str_eq(part, "abc");
    cr_assert_str_eq(printed, "abc-00042");
    free(part);
    free(printed);
}

Test(error, out_of_memory_is_exit_code_4, .exit_code = 4) { free(xmalloc((size_t)1 << 62)); }
