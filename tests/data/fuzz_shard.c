/* libFuzzer: bytes as the files of a dataset. The first byte chooses, by its remainder of 5, which file, and by the quotient's of 3 the kind: topk, hybrid, sampled.
 *     0  a shard file, under a journal line that fits it       2  manifest.json
 *     1  journal.jsonl                                         3  the rows of a well-formed shard, their CRCs made right
 *     4  changes to a well-formed shard outside its rows (offset u16, value u8, and so on), HDF5's own checksums made right
 * Whatever the bytes, the reader returns a status of an untrusted file: no crash, no leak, no wrong row.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -I. tests/data/fuzz_shard.c base/{error,file,hash,json,failpoint}.c \
 *         data/{manifest,journal,shard,shard_check,shard_write}.c $(pkg-config --cflags --libs hdf5 jansson libcrypto) -lm -lpthread -o fuzz_shard
 *     FUZZ_SEEDS=corpus ./fuzz_shard -runs=0; ./fuzz_shard -max_total_time=60 corpus
 * FUZZ_SEEDS names a directory to which one good input of each mode and kind is written.
 */
#include <fcntl.h>
#include <sys/stat.h>

#include "base/failpoint.h"
#include "data/shard_internal.h"
#include "tests/data/shard_fixture.h"

enum { MODES = 5, KINDS = 3 };
static struct world {                                      /* a dataset of one kind */
    char *dir, *names[MODES], id[SHA256_HEX];
    struct shard_manifest manifest;
    struct { char *data; size_t bytes; } good[3];          /* shard 0, journal, manifest */
    struct shard_entry entry;                              /* of shard 0 */
} worlds[KINDS];

static void put(const char *path, const void *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(fd >= 0 && file_write_all(fd, data, bytes, path) == OK, "%s", fail_message());
    close(fd);
}

static void clean(void) { for (int k = 0; k < KINDS; k++) dir_remove_tree(worlds[k].dir); }

static void world_make(struct world *w, enum shard_kind kind, int number)
{
    w->manifest = fixture_manifest(kind, 3, 2, 6, 40, 3);
    w->dir = fixture_dir();
    CHECK(fixture_dump(w->dir, &w->manifest) == OK && manifest_read(w->dir, &w->manifest, w->id) == OK, "%s", fail_message());
    w->names[0] = w->names[3] = w->names[4] = shard_path(w->dir, 0);
    w->names[1] = path_join(w->dir, "journal.jsonl");
    w->names[2] = path_join(w->dir, "manifest.json");
    for (int i = 0; i < 3; i++) CHECK(file_read(w->names[i], 1 << 20, &w->good[i].data, &w->good[i].bytes) == OK, "%s", fail_message());
    struct shard_dataset *d;
    const struct shard_entry *entries;
    CHECK(shard_dataset_open(&d, w->dir) == OK && shard_dataset_entries(d, &entries) == 2, "%s", fail_message());
    w->entry = entries[0];
    shard_dataset_close(d);
    const char *seeds = getenv("FUZZ_SEEDS");
    for (int mode = 0; seeds && mode < MODES; mode++) {
        size_t bytes = mode == 4 ? 3 : w->good[mode % 3].bytes;
        char *path = xasprintf("%s/seed-%d-%s", seeds, mode, shard_kind_name(kind)), *data = xmalloc(bytes + 1);
        data[0] = (char)(mode + MODES * number);
        memcpy(data + 1, w->good[mode % 3].data, bytes);
        CHECK(dir_make(seeds) == OK, "%s", fail_message());
        put(path, data, bytes + 1);
        free(data);
        free(path);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    failpoint_set(NULL);
    static const enum shard_kind kinds[KINDS] = {SHARD_TOPK, SHARD_HYBRID, SHARD_SAMPLED};
    for (int k = 0; k < KINDS; k++) world_make(&worlds[k], kinds[k], k);
    atexit(clean);
    return 0;
}

static void read_dataset(const char *dir)
{
    struct shard_dataset *d = NULL;
    struct shard_row row;
    int64_t sealed;
    int rc = shard_dataset_open(&d, dir);
    CHECK(rc == OK || rc == ERR_INPUT || rc == ERR_MISMATCH, "%d: %s", rc, fail_message());
    if (rc != OK) return;
    const struct shard_manifest *m = shard_dataset_manifest(d);
    if (m->row_length * (m->kind == SHARD_FULL ? m->valid_vocab : m->k + m->draws + 16) < 1 << 22) {
        shard_row_alloc(&row, m);
        for (int64_t r = 0; r < m->rows && r < 8; r++) {
            rc = shard_dataset_read(d, r, &row);
            CHECK(rc == OK || rc == ERR_INPUT || rc == ERR_MISMATCH, "%d: %s", rc, fail_message());
        }
        shard_row_free(&row);
        shard_dataset_verify(d);
        shard_dataset_check_files(d);
        shard_dataset_refresh(d, &sealed);
    }
    shard_dataset_close(d);
}

/* The input over the rows' data, field by field, with row CRCs to match. */
static void forge_rows(const struct world *w, const uint8_t *data, size_t bytes)
{
    struct shard_layout layout[SHARD_FIELDS];
    struct shard_file f;
    shard_layout(&w->manifest, layout);
    CHECK(shard_file_open(&f, w->names[3], &w->manifest, w->id, 0, -1) == OK, "%s", fail_message());
    int fd = open(w->names[3], O_RDWR);
    for (int i = 0; i < SHARD_ROW_CRC && bytes; i++) {
        if (!layout[i].name) continue;
        size_t n = (size_t)(layout[i].ragged ? f.entries / layout[i].ragged * shard_type_bytes(layout[i].type) : layout[i].row_bytes * w->entry.rows);
        n = n < bytes ? n : bytes;
        CHECK(pwrite(fd, data, n, f.offset[i]) == (ssize_t)n, "pwrite");
        data += n;
        bytes -= n;
    }
    for (int64_t r = 0; r < w->entry.rows; r++) {
        uint32_t crc = fixture_row_crc(&f, &w->manifest, fd, r);
        CHECK(pwrite(fd, &crc, 4, f.offset[SHARD_ROW_CRC] + 4 * r) == 4, "pwrite");
    }
    close(fd);
    shard_file_close(&f);
}

uint32_t H5_checksum_lookup3(const void *key, size_t length, uint32_t initval);   /* libhdf5's, for metadata */

/* The checksum behind a superblock (at 44 of 48 bytes), an object header or a continuation of one that begins here. */
static void checksum_mend(uint8_t *file, size_t at, size_t bytes, const uint8_t *p)
{
    size_t n = 0;
    if (!memcmp(p, "\x89HDF", 4)) n = 44;
    else if (!memcmp(p, "OHDR", 4)) {
        size_t head = 6 + (p[5] & 0x20 ? 16 : 0) + (p[5] & 0x10 ? 4 : 0), width = (size_t)1 << (p[5] & 3);
        uint64_t chunk = 0;
        if (at + head + width > bytes) return;
        memcpy(&chunk, p + head, width);
        if (chunk > bytes) return;
        n = head + width + chunk;
    }
    if (!n || at + n + 4 > bytes) return;
    uint32_t sum = H5_checksum_lookup3(file + at, n, 0);
    memcpy(file + at + n, &sum, 4);
}

static void forge_metadata(const struct world *w, const uint8_t *data, size_t changes)
{
    size_t bytes = w->good[0].bytes;
    uint8_t *file = xmalloc(bytes);
    memcpy(file, w->good[0].data, bytes);
    for (size_t i = 0; i + 3 <= changes; i += 3) file[(data[i] | data[i + 1] << 8) % bytes] = data[i + 2];
    for (size_t at = 0; at + 48 <= bytes; at++) checksum_mend(file, at, bytes, file + at);
    put(w->names[4], file, bytes);
    free(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 1 || bytes > 1 << 20) return 0;
    int mode = data[0] % MODES;
    struct world *w = &worlds[data[0] / MODES % KINDS];
    data++;
    bytes--;
    for (int i = 0; i < 3; i++) put(w->names[i], w->good[i].data, w->good[i].bytes);
    if (mode == 3) forge_rows(w, data, bytes);
    else if (mode == 4) forge_metadata(w, data, bytes);
    else put(w->names[mode], data, bytes);
    if (mode == 0) {                                       /* the journal of whoever made the file fits it */
        struct journal j;
        struct shard_entry e = w->entry;
        e.bytes = (int64_t)bytes;
        sha256_of(data, bytes, e.sha256);
        journal_init(&j, w->dir, &w->manifest, w->id);
        int fd = open(w->names[1], O_WRONLY | O_TRUNC | O_APPEND);
        CHECK(fd >= 0 && journal_append(&j, fd, &e) == OK, "%s", fail_message());
        close(fd);
        journal_free(&j);
    }
    read_dataset(w->dir);
    return 0;
}
