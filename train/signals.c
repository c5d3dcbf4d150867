/* See signals.h. A second signal changes nothing: what is being saved is saved. */
#include "train/signals.h"

#include <signal.h>
#include <stddef.h>

volatile int stop_requested;

static void on_signal(int number) { stop_requested = number; }

void signals_install(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
}
