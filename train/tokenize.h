/* The command `distill tokenize`. */
#ifndef TRAIN_TOKENIZE_H
#define TRAIN_TOKENIZE_H

/* argv[0] is "tokenize". Returns the exit code; the message of a failure is in fail_message(). */
int command_tokenize(int argc, char **argv);

#endif
