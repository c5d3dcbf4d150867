/* libFuzzer target: GGUF files. The first byte picks what the rest is:
 *     0   a whole file          1   what follows magic and version          2   as 1, with room for tensors behind
 * Whatever opens is read to the end: every value and element must lie in the mapping. Then it is taken for a model. */
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"
#include "train/export.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile char touched;

static void read_value(const struct gguf_value *v)
{
    const char *bytes;
    size_t at = 0, n, strings = 0;
    if (v->type != GGUF_ARRAY) return;
    if (v->item == GGUF_STRING) {
        while (gguf_next_string(v, &at, &bytes, &n)) {
            strings++;
            if (n) touched = bytes[n - 1];                   /* a sanitizer sees where it lies */
        }
        CHECK(strings == v->count, "key %s has %zu strings", v->key, strings);
    } else for (uint64_t i = 0; i < v->count; i++) (void)gguf_item(v, i);
}

static void read_all(const char *path)
{
    struct gguf_file *f;
    struct model_config *c = NULL;
    float values[97];
    int64_t i;
    double d;
    bool present;
    if (gguf_open(&f, path) != OK) return;
    for (int k = 0; k < gguf_key_count(f); k++) {
        const struct gguf_value *v = gguf_key_at(f, k);
        CHECK(gguf_find_key(f, v->key) == v, "key %s is not found", v->key);
        (void)gguf_get_int(f, v->key, &i, &present);
        (void)gguf_get_double(f, v->key, &d, &present);
        read_value(v);
    }
    for (int t = 0; t < gguf_tensor_count(f); t++) {
        const struct gguf_tensor *v = gguf_tensor_at(f, t);
        CHECK(v->count > 0 && gguf_dtype_bytes(v->dtype, v->count) == v->bytes, "tensor %s has a wrong size", v->name);
        CHECK(gguf_find_tensor(f, v->name) == v, "tensor %s is not found", v->name);
        gguf_to_float(v, v->count - 1, 1, values);
        gguf_to_float(v, 0, v->count < 97 ? v->count : 97, values);
    }
    if (gguf_model_config(f, &c) == OK) model_config_free(c);
    gguf_close(f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    static char path[64];
    static const char start[] = "GGUF\3\0\0", behind[4096];
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (!size) return 0;
    int mode = *data++ % 3;
    size--;
    CHECK(!ftruncate(fd, 0) && lseek(fd, 0, SEEK_SET) == 0, "memfd");
    if (mode) CHECK(write(fd, start, 8) == 8, "memfd");
    CHECK(write(fd, data, size) == (ssize_t)size, "memfd");
    if (mode == 2) CHECK(write(fd, behind, 32 * (size % 128)) == (ssize_t)(32 * (size % 128)), "memfd");
    read_all(path);
    return 0;
}
