/* What safetensors.c and tensor_scale.c share: the set as it lies in memory. */
#ifndef DATA_SAFETENSORS_INTERNAL_H
#define DATA_SAFETENSORS_INTERNAL_H

#include "data/safetensors.h"

struct entry { struct tensor_view view; uint64_t begin, end; };
struct mapped_file { char *path; int fd; void *map; size_t bytes; };
struct tensor_set {
    struct entry *entries;
    int n, room;
    struct mapped_file *files;
    int n_files;
    struct tensor_scale *scales;                  /* allocated at once: views point into it */
    int n_scales;
};

/* Text from a file, fit for a message on a terminal. Two may be in use at once. */
const char *tensor_name_shown(const char *name);
/* Elements [first, first + n) of an F8_E4M3 tensor that has scales. */
void tensor_scaled_block(const struct tensor_view *t, int64_t first, int64_t n, float *out);

#endif
