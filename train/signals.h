/* SIGINT, SIGTERM and SIGUSR1 ask a long command to finish what it is doing, save, and exit with 75. */
#ifndef TRAIN_SIGNALS_H
#define TRAIN_SIGNALS_H

void signals_install(void);
extern volatile int stop_requested;      /* the signal's number, or 0 */

#endif
