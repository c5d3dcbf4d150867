/* libFuzzer: bytes as the files of a dataset. The first byte chooses which:
 *     0  a shard file, under a journal line that fits it       2  manifest.json
 *     1  journal.jsonl                                         3  the rows of a well-formed shard, their CRCs made right
 *     4  changes to a well-formed shard outside its rows (offset u16, value u8, and so on), HDF5's own checksums made right
 * Whatever the bytes, the reader returns a status of an untrusted file: no crash, no leak, no wrong row.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -I. tests/data/fuzz_shard.c base/{error,file,hash,json,failpoint}.c \
 *         data/{manifest,journal,shard,shard_write}.c $(pkg-config --cflags --libs hdf5 jansson libcrypto) -lm -lpthread -o fuzz_shard
 *     FUZZ_SEEDS=corpus ./fuzz_shard -runs=0; ./fuzz_shard -max_total_time=60 corpus
 * FUZZ_SEEDS names a directory to which one good input of each mode is written.
 */
#include <fcntl.h>
#include <sys/stat.h>

#include "base/failpoint.h"
#include "data/shard_internal.h"
#include "tests/data/shard_fixture.h"

enum { MODES = 5 };
static char *dir, *names[MODES], id[SHA256_HEX];
static struct shard_manifest manifest;
static struct { char *data; size_t bytes; } good[3];       /* shard 0, journal, manifest */
static struct shard_entry entry;                           /* of shard 0 */

static void put(const char *path, const void *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(fd >= 0 && file_write_all(fd, data, bytes, path) == OK, "%s", fail_message());
    close(fd);
}

static void clean(void) { dir_remove_tree(dir); }

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    failpoint_set(NULL);
    manifest = fixture_manifest(SHARD_TOPK, 3, 2, 6, 40, 3);
    dir = fixture_dir();
    atexit(clean);
    CHECK(fixture_dump(dir, &manifest) == OK && manifest_read(dir, &manifest, id) == OK, "%s", fail_message());
    names[0] = names[3] = names[4] = shard_path(dir, 0);
    names[1] = path_join(dir, "journal.jsonl");
    names[2] = path_join(dir, "manifest.json");
    for (int i = 0; i < 3; i++) CHECK(file_read(names[i], 1 << 20, &good[i].data, &good[i].bytes) == OK, "%s", fail_message());
    struct shard_dataset *d;
    const struct shard_entry *entries;
    CHECK(shard_dataset_open(&d, dir) == OK && shard_dataset_entries(d, &entries) == 2, "%s", fail_message());
    entry = entries[0];
    shard_dataset_close(d);
    const char *seeds = getenv("FUZZ_SEEDS");
    for (int mode = 0; seeds && mode < MODES; mode++) {
        size_t bytes = mode == 4 ? 3 : good[mode % 3].bytes;
        char *path = xasprintf("%s/seed-%d", seeds, mode), *data = xmalloc(bytes + 1);
        data[0] = (char)mode;
        memcpy(data + 1, good[mode % 3].data, bytes);
        CHECK(dir_make(seeds) == OK, "%s", fail_message());
        put(path, data, bytes + 1);
        free(data);
        free(path);
    }
    return 0;
}

static void read_dataset(void)
{
    struct shard_dataset *d = NULL;
    struct shard_row row;
    int64_t sealed;
    int rc = shard_dataset_open(&d, dir);
    CHECK(rc == OK || rc == ERR_INPUT || rc == ERR_MISMATCH, "%d: %s", rc, fail_message());
    if (rc != OK) return;
    const struct shard_manifest *m = shard_dataset_manifest(d);
    if (m->row_length * (m->kind == SHARD_FULL ? m->valid_vocab : m->k + 16) < 1 << 22) {
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
static void forge_rows(const uint8_t *data, size_t bytes)
{
    struct shard_layout layout[SHARD_FIELDS];
    struct shard_file f;
    shard_layout(&manifest, layout);
    CHECK(shard_file_open(&f, names[3], &manifest, id, 0, -1) == OK, "%s", fail_message());
    int fd = open(names[3], O_RDWR);
    for (int i = 0; i < SHARD_ROW_CRC && bytes; i++) {
        size_t n = (size_t)(layout[i].row_bytes * entry.rows) < bytes ? (size_t)(layout[i].row_bytes * entry.rows) : bytes;
        CHECK(pwrite(fd, data, n, f.offset[i]) == (ssize_t)n, "pwrite");
        data += n;
        bytes -= n;
    }
    for (int64_t r = 0; r < entry.rows; r++) {
        uint32_t crc = shard_row_crc_start(r);
        uint8_t row[4096];
        for (int i = 0; i < SHARD_ROW_CRC; i++) {
            CHECK(pread(fd, row, (size_t)layout[i].row_bytes, f.offset[i] + r * layout[i].row_bytes) == layout[i].row_bytes, "pread");
            crc = crc32c(crc, row, (size_t)layout[i].row_bytes);
        }
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

static void forge_metadata(const uint8_t *data, size_t changes)
{
    size_t bytes = good[0].bytes;
    uint8_t *file = xmalloc(bytes);
    memcpy(file, good[0].data, bytes);
    for (size_t i = 0; i + 3 <= changes; i += 3) file[(data[i] | data[i + 1] << 8) % bytes] = data[i + 2];
    for (size_t at = 0; at + 48 <= bytes; at++) checksum_mend(file, at, bytes, file + at);
    put(names[4], file, bytes);
    free(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 1 || bytes > 1 << 20) return 0;
    int mode = data[0] % MODES;
    data++;
    bytes--;
    for (int i = 0; i < 3; i++) put(names[i], good[i].data, good[i].bytes);
    if (mode == 3) forge_rows(data, bytes);
    else if (mode == 4) forge_metadata(data, bytes);
    else put(names[mode], data, bytes);
    if (mode == 0) {                                       /* the journal of whoever made the file fits it */
        struct journal j;
        struct shard_entry e = entry;
        e.bytes = (int64_t)bytes;
        sha256_of(data, bytes, e.sha256);
        journal_init(&j, dir, &manifest, id);
        int fd = open(names[1], O_WRONLY | O_TRUNC | O_APPEND);
        CHECK(fd >= 0 && journal_append(&j, fd, &e) == OK, "%s", fail_message());
        close(fd);
        journal_free(&j);
    }
    read_dataset();
    return 0;
}
