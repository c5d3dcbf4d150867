/* See failpoint.h. The table is small and read under a lock: a program that has one armed is a test. */
#include "base/failpoint.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { MAX_POINTS = 16 };
enum { ACTION_KILL = 0, ACTION_TERM = -1 };              /* or an errno */
struct point { char name[64]; int action; int64_t from, to, passed; };

atomic_int failpoint_armed = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct point points[MAX_POINTS];
static int n_points;

static int parse_point(const char *text, struct point *p)
{
    char action[16], extra;
    long long n = 0;
    *p = (struct point){.from = 1, .to = INT64_MAX};
    const char *at = strchr(text, '@');
    if (at) {
        char plus = 0;
        int fields = sscanf(at + 1, "%18lld%c%c", &n, &plus, &extra);
        if (fields < 1 || fields > 2 || n < 1 || (fields == 2 && plus != '+')) return -1;
        p->from = n;
        if (fields == 1) p->to = n;
    }
    char *head = at ? xstrndup(text, (size_t)(at - text)) : xstrdup(text);
    int fields = sscanf(head, "%63[^:]:%15s%c", p->name, action, &extra);
    free(head);
    if (fields != 2) return -1;
    if (!strcmp(action, "kill")) p->action = ACTION_KILL;
    else if (!strcmp(action, "term")) p->action = ACTION_TERM;
    else if (!strcmp(action, "error")) p->action = EIO;
    else if (!strcmp(action, "enospc")) p->action = ENOSPC;
    else return -1;
    return 0;
}

static int set_locked(const char *spec)
{
    int rc = OK;
    char *copy = xstrdup(spec ? spec : ""), *rest = copy;
    n_points = 0;
    for (char *text; (text = strsep(&rest, ","));) {
        if (!*text) continue;
        if (n_points == MAX_POINTS || parse_point(text, &points[n_points])) {
            rc = fail(ERR_USAGE, "DISTILL_FAIL: \"%s\" is not point:action[@n[+]] with action kill, term, error or enospc, at most %d of them", text, MAX_POINTS);
            n_points = 0;
            break;
        }
        n_points++;
    }
    atomic_store(&failpoint_armed, n_points > 0);
    free(copy);
    return rc;
}

int failpoint_set(const char *spec)
{
    pthread_mutex_lock(&lock);
    int rc = set_locked(spec);
    pthread_mutex_unlock(&lock);
    return rc;
}

bool failpoint_fires(const char *name)
{
    int action = 0;
    bool fires = false;
    pthread_mutex_lock(&lock);
    if (atomic_load(&failpoint_armed) < 0 && set_locked(getenv("DISTILL_FAIL")) != OK) {
        fprintf(stderr, "distill: %s\n", fail_message());   /* a fault test that tests nothing must not pass */
        _exit(ERR_USAGE);
    }
    for (int i = 0; i < n_points; i++) {
        struct point *p = &points[i];
        if (strcmp(p->name, name)) continue;
        p->passed++;
        if (p->passed >= p->from && p->passed <= p->to) { fires = true; action = p->action; break; }
    }
    pthread_mutex_unlock(&lock);
    if (!fires) return false;
    if (action == ACTION_TERM) { kill(getpid(), SIGTERM); return false; }
    if (action == ACTION_KILL)
        for (;;) { kill(getpid(), SIGKILL); pause(); }
    errno = action;
    return true;
}
