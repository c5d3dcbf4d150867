/* libFuzzer target: the bytes are a tokenizer.json. If it opens, every entry point runs over a few texts chosen to hurt: no crash, no
 * leak, no undefined behaviour, every id encode() gives decodes again, and two equal texts give equal ids.
 * The file lives in memory only. Seeds: any small tokenizer.json. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"
#include "data/tokenizer.h"

static const char *const texts[] = {
    "", " ", "Hello, world! It's 12345 o'clock.\r\n\r\n  The end  ",
    "e\xcc\x81\xcc\xa3\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab \xef\xac\x81\xe2\x84\xaa\xc5\xbf",
    "\xe1\xa0\x8e\xe2\x80\x8b\xe3\x80\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa7<s></s><|endoftext|>[MASK] <unk> \xe2\x96\x81\xe2\x96\x81",
    "\xf0\x91\x9c\x9e\xe1\xb2\x89\xf0\x9f\xab\xa8\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf\xf4\x8f\xbf\xbf", "\n\n\n\t\t   \xc2\xa0\xc2\x85 x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
    "\xff\xfe broken", "\xc3", "\xed\xa0\x80",
};

static void run_text(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t n)
{
    const int32_t *ids;
    const char *s;
    size_t n_ids, n_again, bytes;
    if (tokenizer_encode(t, w, text, n, &ids, &n_ids) != OK) return;
    int32_t *copy = xmalloc((n_ids + 1) * sizeof *copy);
    if (n_ids) memcpy(copy, ids, n_ids * sizeof *copy);
    int rc = tokenizer_encode(t, w, text, n, &ids, &n_again);
    CHECK(rc == OK && n_again == n_ids && (!n_ids || !memcmp(ids, copy, n_ids * sizeof *copy)), "the same text, other ids");
    for (int skip = 0; skip < 2; skip++)
        CHECK(tokenizer_decode(t, w, copy, n_ids, skip, &s, &bytes) == OK, "ids that do not decode: %s", fail_message());
    for (size_t i = 0; i < n_ids; i++) CHECK(tokenizer_token_bytes(t, copy[i], &bytes), "id without bytes");
    CHECK(tokenizer_normalize(t, w, text, n, &s, &bytes) == OK, "%s", fail_message());
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *t = NULL;
    char path[64], hex[SHA256_HEX];
    int fd = memfd_create("tokenizer.json", 0);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (tokenizer_open(&t, path) == OK) {
        struct tokenizer_work *w = tokenizer_work_new(t);
        int32_t difference;
        const char *left, *right;
        for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) run_text(t, w, texts[i], strlen(texts[i]));
        run_text(t, w, "a\0b", 3);
        tokenizer_hash(t, hex);
        tokenizer_gguf_pre(t);
        CHECK(tokenizer_same_vocab(t, t, &difference), "not itself at %d", (int)difference);
        for (int64_t i = 0; i < tokenizer_n_merges(t); i++) CHECK(tokenizer_merge(t, i, &left, &right), "no merge %d", (int)i);
        tokenizer_work_free(w);
    }
    tokenizer_close(t);
    close(fd);
    return 0;
}
