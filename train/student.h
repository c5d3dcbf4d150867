/* The student a run starts from: a Hugging Face directory, random weights for a config, or the teacher with every n-th layer kept. */
#ifndef TRAIN_STUDENT_H
#define TRAIN_STUDENT_H

#include "train/config.h"
#include "train/load.h"
#include "train/optimizer.h"

struct student {
    struct model_config *config;
    struct model_files *files;      /* weights to read; NULL: random */
    int *layer_of;                  /* layer of `files` for every layer; NULL: the same */
    char *tokenizer_dir;            /* directory with tokenizer.json for checkpoints; NULL: none found */
};

/* By student.init: hf and checkpoint read student.path, scratch reads student.config, teacher keeps layers 0, n, 2n, ... of teacher.path.
 * ERR_USAGE names the key that is missing. */
int  student_open(struct student **out, const struct config *c);
void student_close(struct student *s);                      /* NULL-safe */
/* Into the model's weights. */
int  student_weights(const struct student *s, struct model *m, uint64_t seed);
/* Into the optimizer's master of these weights, where it has one: from the files at their own precision. */
int  student_master(const struct student *s, struct optimizer *o);
void student_describe(const struct student *s, const struct config *c, int64_t parameters);   /* one line to stdout */

/* The directory whose tokenizer a run uses: tokenizer.path, else the first of `candidates` (NULL-terminated) with a tokenizer.json; NULL: none. malloc'd. */
char *find_tokenizer_dir(const struct config *c, const char *const *candidates);

#endif
