/* libFuzzer target: safetensors files, headers and indexes. The first byte picks what the rest is:
 *     0   a whole file          1   the text of a header, with its length in front and data behind          2   an index of two files
 * Whatever opens is read to the end, with the scales that its names ask for: every view must lie in its mapping. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "data/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[] = "/tmp/fuzz-safetensors-XXXXXX";
static void remove_dir(void) { dir_remove_tree(dir); }

static void put(const char *name, const void *data, size_t n)
{
    char *path = path_join(dir, name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, n, f) == n && !fclose(f), "%s cannot be written", path);
    free(path);
}

static void put_tensor(const char *file, const char *tensor)
{
    char bytes[120];
    uint64_t n = (uint64_t)snprintf(bytes + 8, sizeof bytes - 8, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}x", tensor) - 1;
    memcpy(bytes, &n, 8);
    put(file, bytes, 8 + n + 1);
}

static void read_all(const char *path)
{
    struct tensor_set *s;
    char hex[65];
    float values[64];
    if (tensor_set_open(&s, path) != OK) return;
    if (tensor_set_hash(s, hex) != OK) abort();             /* nothing but a disk that fails */
    /* as if config.json had said so: which of the kinds, and blocks of 1 to 16, by what the file holds */
    struct quantization q = {.scales = (enum scale_kind)(hex[0] & 3), .block_rows = 1 + (hex[1] & 15), .block_cols = 1 + (hex[2] & 15), .method = "fuzz"};
    bool bound = tensor_set_bind_scales(s, &q, path) == OK;
    for (int i = 0; i < tensor_set_count(s); i++) {
        const struct tensor_view *v = tensor_set_at(s, i);
        CHECK(v->count >= 0 && (uint64_t)v->count * dtype_bytes(v->dtype) == v->bytes, "tensor %s has a wrong size", v->name);
        CHECK(tensor_set_find(s, v->name) == v, "tensor %s is not found", v->name);
        CHECK(!v->scale || v->dtype == DTYPE_F8_E4M3, "tensor %s is scaled", v->name);
        if (bound && v->scale && q.scales != SCALE_BLOCK) tensor_row_scales(v, v->n_dims == 2 ? v->shape[0] - 1 : 0, 1, values);
        if (v->count) (void)tensor_to_float(v, v->count - 1, 1, values);
        (void)tensor_to_float(v, 0, v->count < 64 ? v->count : 64, values);
    }
    tensor_set_close(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        CHECK(mkdtemp(dir), "no directory under /tmp");
        atexit(remove_dir);
        put_tensor("one.safetensors", "a");
        put_tensor("two.safetensors", "b");
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (!size) return 0;
    int mode = *data++ % 3;
    size--;
    if (mode == 2) {
        put("model.safetensors.index.json", data, size);
        read_all(dir);
        return 0;
    }
    static const char behind[64];
    uint64_t length = size;
    CHECK(!ftruncate(fd, 0) && lseek(fd, 0, SEEK_SET) == 0, "memfd");
    if (mode == 1) CHECK(write(fd, &length, 8) == 8, "memfd");
    CHECK(write(fd, data, size) == (ssize_t)size, "memfd");
    if (mode == 1) CHECK(write(fd, behind, size % 64) == (ssize_t)(size % 64), "memfd");
    read_all(path);
    return 0;
}
