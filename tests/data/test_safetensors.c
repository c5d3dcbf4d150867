/* Safetensors: what the reference writes is read, what it refuses is refused, indexes and links cannot lead out of a
 * directory, and what is written is byte for byte what the reference library writes. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "data/safetensors.h"

static char dir[200];

static void make_dir(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/safetensors-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
}

static void remove_dir(void) { dir_remove_tree(dir); }
TestSuite(safetensors, .init = make_dir, .fini = remove_dir);

/* dir/name, good until four more calls */
static const char *in_dir(const char *name)
{
    static char path[4][512];
    static int turn;
    snprintf(path[turn &= 3], sizeof path[0], "%s/%s", dir, name);
    return path[turn++];
}

static void put(const char *name, const void *data, size_t n)
{
    FILE *f = fopen(in_dir(name), "wb");
    cr_assert(f && fwrite(data, 1, n, f) == n);
    fclose(f);
}

static void put_text(const char *name, const char *text) { put(name, text, strlen(text)); }

/* A file with this header and `bytes` bytes of data, byte i being i */
static void put_tensors(const char *name, const char *header, size_t bytes)
{
    uint64_t n = strlen(header);
    char *all = malloc(8 + n + bytes);
    memcpy(all, &n, 8);
    memcpy(all + 8, header, n);
    for (size_t i = 0; i < bytes; i++) all[8 + n + i] = (char)i;
    put(name, all, 8 + n + bytes);
    free(all);
}

static void expect_failure(const char *path, int status, const char *part)
{
    struct tensor_set *s = NULL;
    int rc = tensor_set_open(&s, path);
    cr_expect_eq(rc, status, "%s: status %d, message %s", part, rc, rc ? fail_message() : "none");
    if (rc != OK) cr_expect(strstr(fail_message(), part), "\"%s\" is not in \"%s\"", part, fail_message());
    if (rc == OK) tensor_set_close(s);
}

Test(safetensors, reads_what_is_legal)
{
    static const struct { const char *header; size_t bytes; int count; } cases[] = {
        {"{}", 0, 0},
        {" \n\t{ \"a\" : {\"dtype\":\"F32\", \"shape\":[1] ,\"data_offsets\":[0,4]} } \r\n", 4, 1},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 1},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]},\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, 2},
        {"{\"z\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[4,7]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 7, 2},
        {"{\"__metadata__\":null,\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, 1},
        {"{\"__metadata__\":{},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, 1},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"__metadata__\":{\"format\":\"pt\",\"}{\\\"\":\"]\\\\\"}}", 1, 1},
        {"{\"a\\\"}\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":[{\"x\":\"}\"}]},\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 2, 2},
        {"{\"\\u00e9\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tensor_set *s = NULL;
        put_tensors("t.safetensors", cases[i].header, cases[i].bytes);
        cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK, "%s: %s", cases[i].header, fail_message());
        cr_expect_eq(tensor_set_count(s), cases[i].count);
        for (int k = 1; k < tensor_set_count(s); k++) cr_expect(strcmp(tensor_set_at(s, k - 1)->name, tensor_set_at(s, k)->name) < 0);
        for (int k = 0; k < tensor_set_count(s); k++) cr_expect_eq(tensor_set_find(s, tensor_set_at(s, k)->name), tensor_set_at(s, k));
        cr_expect_null(tensor_set_find(s, "absent"));
        tensor_set_close(s);
    }
    tensor_set_close(NULL);
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}"

Test(safetensors, refuses_broken_headers)
{
    static const struct { const char *header; size_t bytes; const char *part; } cases[] = {
        {"", 0, "an object was expected"},
        {"[]", 0, "an object was expected"},
        {"\xef\xbb\xbf{}", 0, "an object was expected"},
        {"{", 0, "a key was expected"},
        {"{}x", 0, "text after the object"},
        {"{" A ",}", 4, "a key was expected"},
        {"{" A " " A "}", 4, "',' or '}' was expected"},
        {"{" A, 4, "',' or '}' was expected"},
        {"{\"a\" 1}", 0, "':' was expected"},
        {"{\"a", 0, "a string does not end"},
        {"{\"a\\", 0, "a string does not end"},
        {"{\"a\\\"", 0, "a string does not end"},
        {"{\"a\":", 0, "not valid JSON"},
        {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unable to decode byte 0xff"},
        {"{\"\\ud800\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{\"a\nb\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{" A "," A "}", 4, "tensor a: begins at byte 0"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "tensor a appears twice"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{\"a\":3}", 0, "tensor a: the header does not give it"},
        {"{\"a\":[\"F32\",[1],[0,4]]}", 4, "tensor a: the header does not give it"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor a: the header does not give it"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,4]}}", 4, "tensor a: the header does not give it"},
        {"{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor a: dtype F99 is not supported"},
        {"{\"a\":{\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype f32 is not supported"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4, "dimension 0 of its shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,-1],\"data_offsets\":[0,4]}}", 4, "dimension 1 of its shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-0],\"data_offsets\":[0,0]}}", 0, "negative size"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[\"1\"],\"data_offsets\":[0,4]}}", 4, "dimension 0 of its shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[18446744073709551615],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1e999999],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4,0],\"data_offsets\":[0,0]}}", 0, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "overflows"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, "9 dimensions"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,-4]}}", 4, "not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "do not hold the 4 bytes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,3]}}", 3, "do not hold the 4 bytes"},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "do not hold the 2 bytes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "hole or an overlap"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}", 6, "tensor b: begins at byte 2 of the data where 4"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12, "tensor b: begins at byte 8 of the data where 4"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[2,2]}}", 4, "tensor b: begins at byte 2"},
        {"{" A "}", 5, "holds 5 bytes of data, its header describes 4"},
        {"{" A "}", 3, "tensor a: ends at byte 4 of the data, the file holds 3"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[9223372036854775807],\"data_offsets\":[0,9223372036854775807]}}", 4, "the file holds 4"},
        {"{\"__metadata__\":3}", 0, "__metadata__ in the header is not an object"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "the value of \"a\" is not a string"},
        {"{\"__metadata__\":{\"a\":{}}}", 0, "the value of \"a\" is not a string"},
        {"{\"__metadata__\":{\"a\":\"x\",\"\\u0061\":\"y\"}}", 0, "has the key \"a\" twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ twice"},
        {"{\"a\":{\"x\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, "nested too deeply"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_tensors("t.safetensors", cases[i].header, cases[i].bytes);
        expect_failure(in_dir("t.safetensors"), ERR_INPUT, cases[i].part);
    }
}

Test(safetensors, refuses_broken_lengths)
{
    static const struct { uint64_t length; size_t after; const char *part; } cases[] = {
        {0, 0, "an object was expected"}, {1, 0, "is only 8 long"}, {100000000, 10, "is only 18 long"}, {100000001, 10, "more than the 100000000 allowed"},
        {(uint64_t)1 << 63, 10, "more than the 100000000 allowed"}, {UINT64_MAX, 10, "more than the 100000000 allowed"}, {UINT64_MAX - 7, 10, "more than"},
    };
    char bytes[64] = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(bytes, &cases[i].length, 8);
        put("t.safetensors", bytes, 8 + cases[i].after);
        expect_failure(in_dir("t.safetensors"), ERR_INPUT, cases[i].part);
    }
    put("t.safetensors", bytes, 7);
    expect_failure(in_dir("t.safetensors"), ERR_INPUT, "7 bytes long");
    put("t.safetensors", bytes, 0);
    expect_failure(in_dir("t.safetensors"), ERR_INPUT, "0 bytes long");
    memcpy(bytes, "\x0c\0\0\0\0\0\0\0{\"a\":1\0}    ", 20);   /* NUL behind a number */
    put("t.safetensors", bytes, 20);
    expect_failure(in_dir("t.safetensors"), ERR_INPUT, "a NUL byte");
    expect_failure(in_dir("absent"), ERR_IO, "cannot open");
    expect_failure(dir, ERR_INPUT, "holds neither model.safetensors nor");
    cr_assert_eq(mkfifo(in_dir("pipe"), 0600), 0);
    expect_failure(in_dir("pipe"), ERR_INPUT, "not a regular file");
}

Test(safetensors, long_or_hostile_names_in_messages)
{
    char header[3000], name[2001];
    memset(name, 'n', 2000);
    name[2000] = 0;
    snprintf(header, sizeof header, "{\"\\u001b[31m\xc2\x9b%s\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
    put_tensors("t.safetensors", header, 1);
    expect_failure(in_dir("t.safetensors"), ERR_INPUT, "tensor ?[31m");
    cr_expect_null(strchr(fail_message(), 0x1b));
    cr_expect_null(strstr(fail_message(), "\xc2\x9b"));
    cr_expect_lt(strlen(fail_message()), 600);
    struct tensor_set *s;   /* long is no fault by itself */
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
    put_tensors("t.safetensors", header, 1);
    cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK);
    cr_expect_not_null(tensor_set_find(s, name));
    tensor_set_close(s);
}

/* Two files of one model: a and c in the first, b in the second */
#define ONE "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}"
#define TWO "{\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}"
static const char *const INDEX = "model.safetensors.index.json";

static void put_model(void)
{
    put_tensors("one.safetensors", ONE, 3);
    put_tensors("two.safetensors", TWO, 3);
    put_text(INDEX, "{\"metadata\":{\"total_size\":6},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}");
}

Test(safetensors, sharded)
{
    struct tensor_set *s, *single;
    char hex[65], hex_single[65];
    put_model();
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    cr_assert_eq(tensor_set_count(s), 3);
    cr_expect_eq(tensor_set_files(s), 2);
    cr_expect_str_eq(tensor_set_at(s, 1)->name, "b");
    cr_expect(strstr(tensor_set_file_path(s, tensor_set_at(s, 1)->file), "/two.safetensors"));
    cr_expect_eq(((const unsigned char *)tensor_set_find(s, "c")->data)[0], 2);
    cr_assert_eq(tensor_set_hash(s, hex), OK);
    /* the same tensors in one file have the same identity; model.safetensors is preferred to the index, as transformers does */
    put_tensors("model.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]},"
                "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[3,6]}}", 6);
    cr_assert_eq(tensor_set_open(&single, dir), OK);
    cr_expect_eq(tensor_set_files(single), 1);
    cr_assert_eq(tensor_set_hash(single, hex_single), OK);
    cr_expect_str_neq(hex, hex_single);                                         /* b is 3 4 5 here and 0 1 2 there */
    tensor_set_close(single);
    put("model.safetensors", "", 0);
    FILE *f = fopen(in_dir("model.safetensors"), "wb");
    const char *header = "{\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[5,6]},\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[3,5]}}";
    uint64_t n = strlen(header);
    fwrite(&n, 8, 1, f);
    fputs(header, f);
    fwrite("\0\1\2\0\1\2", 6, 1, f);
    fclose(f);
    cr_assert_eq(tensor_set_open(&single, dir), OK);
    cr_assert_eq(tensor_set_hash(single, hex_single), OK);
    cr_expect_str_eq(hex, hex_single);
    tensor_set_close(single);
    tensor_set_close(s);
}

Test(safetensors, refuses_broken_indexes)
{
    static const struct { const char *index, *part; } cases[] = {
        {"", "not valid JSON"}, {"[]", "has no weight_map"}, {"{}", "has no weight_map"}, {"{\"weight_map\":{}}", "has no weight_map"},
        {"{\"weight_map\":{\"a\":3}}", "not a plain name"},
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "\"../one.safetensors\" is not a plain name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a plain name"}, {"{\"weight_map\":{\"a\":\"/tmp/x.safetensors\"}}", "not a plain name"},
        {"{\"weight_map\":{\"a\":\"sub/one.safetensors\"}}", "not a plain name"}, {"{\"weight_map\":{\"a\":\"one.safetensors\\u0000\"}}", "not valid JSON"},
        {"{\"weight_map\":{\"a\":\"one.bin\"}}", "not a plain name"}, {"{\"weight_map\":{\"a\":\".safetensors\"}}", "not a plain name"},
        {"{\"weight_map\":{\"a\":\"one\\\\two.safetensors\"}}", "not a plain name"}, {"{\"weight_map\":{\"a\":\"one.safetensors\\n\"}}", "not a plain name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "not a plain name"},
        {"{\"weight_map\":{\"a\":\"three.safetensors\"}}", "three.safetensors: does not exist, but the index names it"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"one.safetensors\"}}", "duplicate"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", "tensor c of one.safetensors is not in the index"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"}}", "tensor c is in one.safetensors, the index says two"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\",\"d\":\"two.safetensors\"}}", "tensor d is not in two.safetensors"},
        {"{\"metadata\":{\"total_size\":7},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}", "total_size is not the 6 bytes"},
        {"{\"metadata\":{\"total_size\":\"6\"},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}", "total_size is not the 6 bytes"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\",\"e\":\"extra.safetensors\"}}", "tensor a is in extra.safetensors, the index says one"},
    };
    put_model();
    put_tensors("extra.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"e\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}", 3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_text(INDEX, cases[i].index);
        expect_failure(dir, ERR_INPUT, cases[i].part);
    }
    struct tensor_set *s;   /* conversions exist that write no metadata, or a total as a float */
    put_text(INDEX, "{\"metadata\":{},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}");
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    tensor_set_close(s);
    put_text(INDEX, "{\"metadata\":{\"total_size\":6.0},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}");
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    tensor_set_close(s);
}

Test(safetensors, links)
{
    struct tensor_set *s;
    char target[600];
    /* a Hugging Face cache: links from snapshots/REVISION to blobs */
    cr_assert_eq(dir_make(in_dir("models--x/snapshots/abc")), OK);
    cr_assert_eq(dir_make(in_dir("models--x/blobs")), OK);
    cr_assert_eq(dir_make(in_dir("models--x/other")), OK);
    put_tensors("models--x/blobs/0001", TWO, 3);
    cr_assert_eq(symlink("../../blobs/0001", in_dir("models--x/snapshots/abc/model.safetensors")), 0);
    cr_assert_eq(tensor_set_open(&s, in_dir("models--x/snapshots/abc")), OK, "%s", fail_message());
    tensor_set_close(s);
    cr_assert_eq(symlink("models--x/snapshots/abc", in_dir("by-link")), 0);     /* the directory itself is the user's to name */
    cr_assert_eq(tensor_set_open(&s, in_dir("by-link")), OK, "%s", fail_message());
    tensor_set_close(s);
    cr_assert_eq(tensor_set_open(&s, in_dir("models--x/snapshots/abc/model.safetensors")), OK);
    tensor_set_close(s);

    cr_assert_eq(symlink("../blobs/0001", in_dir("models--x/other/model.safetensors")), 0);   /* not a snapshot */
    expect_failure(in_dir("models--x/other"), ERR_INPUT, "outside the model directory");
    unlink(in_dir("models--x/snapshots/abc/model.safetensors"));
    cr_assert_eq(symlink("../../other/weights", in_dir("models--x/snapshots/abc/model.safetensors")), 0);
    put_tensors("models--x/other/weights", TWO, 3);
    expect_failure(in_dir("models--x/snapshots/abc"), ERR_INPUT, "outside the model directory");
    unlink(in_dir("models--x/snapshots/abc/model.safetensors"));
    cr_assert_eq(symlink("../../blobs/../other/weights", in_dir("models--x/snapshots/abc/model.safetensors")), 0);
    expect_failure(in_dir("models--x/snapshots/abc"), ERR_INPUT, "outside the model directory");
    unlink(in_dir("models--x/snapshots/abc/model.safetensors"));
    cr_assert_eq(symlink("nowhere", in_dir("models--x/snapshots/abc/model.safetensors")), 0);
    expect_failure(in_dir("models--x/snapshots/abc"), ERR_INPUT, "leads nowhere");

    put_model();
    snprintf(target, sizeof target, "%s/real.safetensors", dir);
    rename(in_dir("two.safetensors"), in_dir("real.safetensors"));
    cr_assert_eq(symlink("real.safetensors", in_dir("two.safetensors")), 0);    /* within the directory */
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    tensor_set_close(s);
    rename(in_dir("real.safetensors"), in_dir("models--x/other/real"));
    unlink(in_dir("two.safetensors"));
    cr_assert_eq(symlink("models--x/../models--x/other/real", in_dir("two.safetensors")), 0);   /* below it */
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    tensor_set_close(s);
    unlink(in_dir("two.safetensors"));
    cr_assert_eq(symlink("/dev/zero", in_dir("two.safetensors")), 0);
    expect_failure(dir, ERR_INPUT, "two.safetensors: is a link to /dev/zero, outside");
    unlink(in_dir("two.safetensors"));
    cr_assert_eq(mkfifo(in_dir("two.safetensors"), 0600), 0);
    expect_failure(dir, ERR_INPUT, "not a regular file");
}

Test(safetensors, converts_exactly_and_unaligned)
{
    /* every f16 and bf16 value, behind one byte so that nothing is aligned */
    enum { N = 65536 };
    char header[400];
    int n = snprintf(header, sizeof header, "{\"skip\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"h\":{\"dtype\":\"F16\",\"shape\":[%d],\"data_offsets\":[1,%d]},"
                     "\"b\":{\"dtype\":\"BF16\",\"shape\":[256,256],\"data_offsets\":[%d,%d]},\"f\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[%d,%d]}}",
                     N, 1 + 2 * N, 1 + 2 * N, 1 + 4 * N, 1 + 4 * N, 13 + 4 * N);
    uint64_t length = (uint64_t)n;
    uint16_t *all = malloc(2 * N);
    for (int i = 0; i < N; i++) all[i] = (uint16_t)i;
    float floats[3] = {1.5f, -0.0f, 1e-45f};
    FILE *f = fopen(in_dir("t.safetensors"), "wb");
    fwrite(&length, 8, 1, f);
    fputs(header, f);
    fputc(0, f);
    fwrite(all, 2, N, f);
    fwrite(all, 2, N, f);
    fwrite(floats, 4, 3, f);
    fclose(f);
    struct tensor_set *s;
    cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK, "%s", fail_message());
    float *out = malloc((N + 1) * sizeof *out);
    out[N] = 7;
    cr_assert_eq(tensor_to_float(tensor_set_find(s, "h"), 0, N, out), OK);
    for (int i = 0; i < N; i++) {
        int exponent = i >> 10 & 31, mantissa = i & 1023;
        double want = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
        if (exponent == 31) want = mantissa ? NAN : INFINITY;
        if (i & 0x8000) want = -want;
        cr_assert(isnan(want) ? isnan(out[i]) : (double)out[i] == want && !signbit(out[i]) == !signbit(want), "f16 %04x gives %g", i, out[i]);
    }
    cr_assert_eq(tensor_to_float(tensor_set_find(s, "b"), 0, N, out), OK);
    for (int i = 0; i < N; i++) {
        uint32_t bits;
        memcpy(&bits, &out[i], 4);
        cr_assert_eq(bits, (uint32_t)i << 16);
    }
    cr_assert_eq(out[N], 7);
    for (int first = 0; first < 40; first++)          /* every remainder of a vector loop */
        for (int count = 0; count < 20; count++) {
            float part[21];
            part[count] = 7;
            cr_assert_eq(tensor_to_float(tensor_set_find(s, "h"), 0x3c00 + first, count, part), OK);
            for (int i = 0; i < count; i++) cr_assert_float_eq(part[i], 1 + (first + i) / 1024.0f, 0);
            cr_assert_eq(part[count], 7);
        }
    cr_assert_eq(tensor_to_float(tensor_set_find(s, "f"), 0, 3, out), OK);
    cr_expect(!memcmp(out, floats, sizeof floats));
    cr_expect_eq(tensor_to_float(tensor_set_find(s, "skip"), 0, 1, out), ERR_INPUT);
    cr_expect(strstr(fail_message(), "tensor skip: dtype U8"));
    tensor_set_close(s);
    free(out);
    free(all);
}

Test(safetensors, beyond_four_gigabytes)
{
    /* sparse: 2^31 + 5 bf16 elements, all zero but the last two */
    const int64_t count = ((int64_t)1 << 31) + 5;
    char header[200];
    uint64_t length = (uint64_t)snprintf(header, sizeof header, "{\"big\":{\"dtype\":\"BF16\",\"shape\":[%lld],\"data_offsets\":[0,%lld]}}", (long long)count, (long long)(2 * count));
    int fd = open(in_dir("big.safetensors"), O_WRONLY | O_CREAT, 0600);
    uint16_t last[2] = {0x3f80, 0xc000};
    cr_assert(write(fd, &length, 8) == 8 && write(fd, header, length) == (ssize_t)length);
    if (pwrite(fd, last, 4, 8 + (off_t)length + 2 * count - 4) != 4) {
        close(fd);
        cr_skip_test("SKIPPED: this file system takes no sparse file of 4 GiB");
    }
    close(fd);
    struct tensor_set *s;
    float out[3];
    cr_assert_eq(tensor_set_open(&s, in_dir("big.safetensors")), OK, "%s", fail_message());
    cr_expect_eq(tensor_set_at(s, 0)->count, count);
    cr_assert_eq(tensor_to_float(tensor_set_at(s, 0), count - 3, 3, out), OK);
    cr_expect(out[0] == 0 && out[1] == 1 && out[2] == -2);
    tensor_set_close(s);
}

Test(safetensors, many_tensors)
{
    enum { N = 50000 };
    char *header = malloc((size_t)N * 100 + 10), *p = header;
    *p++ = '{';
    for (int i = 0; i < N; i++) {
        int k = (int)((long long)i * 7919 % N);   /* in no order */
        p += sprintf(p, "%s\"model.layers.%d.weight\":{\"dtype\":\"U8\",\"shape\":[1,1],\"data_offsets\":[%d,%d]}", i ? "," : "", k, k, k + 1);
    }
    strcpy(p, "}");
    put_tensors("t.safetensors", header, N);
    struct tensor_set *s;
    cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK, "%s", fail_message());
    cr_expect_eq(tensor_set_count(s), N);
    const struct tensor_view *v = tensor_set_find(s, "model.layers.12345.weight");
    cr_expect(v && *(const unsigned char *)v->data == (unsigned char)12345);
    tensor_set_close(s);
    free(header);
}

/* ---- writing ---- */

/* Byte j of a tensor is 16 * (first letter of its name) + j; context counts the calls and fails the one asked for */
struct filler { int calls, fail_at, die_at; size_t largest; };

static int fill(void *context, const struct tensor_spec *t, size_t offset, size_t bytes, void *out)
{
    struct filler *f = context;
    if (++f->calls == f->fail_at) return fail(ERR_IO, "the source of %s is gone", t->name);
    if (f->calls == f->die_at) _exit(9);
    if (bytes > f->largest) f->largest = bytes;
    for (size_t i = 0; i < bytes; i++) ((unsigned char *)out)[i] = (unsigned char)(16 * t->name[0] + offset + i);
    return OK;
}

static const struct tensor_spec specs[] = {
    {"w.b", DTYPE_BF16, 2, {2, 3}, NULL}, {"a", DTYPE_U8, 1, {3}, NULL}, {"w.a", DTYPE_BF16, 1, {0}, NULL},
    {"s", DTYPE_F32, 0, {0}, NULL}, {"h", DTYPE_F16, 1, {1}, NULL}, {"i", DTYPE_I64, 1, {1}, NULL},
};

Test(safetensors, writes_the_bytes_of_the_reference)
{
    /* safetensors.torch.save_file of these tensors gives this header */
    const char *want = "{\"__metadata__\":{\"format\":\"pt\"},\"i\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]},"
        "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[8,12]},\"w.a\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[12,12]},"
        "\"w.b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[12,24]},\"h\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[24,26]},"
        "\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[26,29]}}";
    static const char *const metadata[] = {"format", "pt", NULL};
    struct filler f = {0};
    char *bytes;
    size_t n;
    uint64_t length;
    cr_assert_eq(safetensors_write(in_dir("t.safetensors"), specs, 6, metadata, fill, &f), OK, "%s", fail_message());
    cr_assert_eq(file_read(in_dir("t.safetensors"), 1 << 20, &bytes, &n), OK);
    memcpy(&length, bytes, 8);
    cr_expect_eq(length, (strlen(want) + 7) / 8 * 8);
    cr_expect(!memcmp(bytes + 8, want, strlen(want)), "%.*s", (int)length, bytes + 8);
    for (size_t i = strlen(want); i < length; i++) cr_expect_eq(bytes[8 + i], ' ');
    cr_expect_eq(n, 8 + length + 29);
    free(bytes);

    struct tensor_set *s;
    cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK, "%s", fail_message());
    for (int i = 0; i < 6; i++) {
        const struct tensor_view *v = tensor_set_find(s, specs[i].name);
        cr_assert(v && v->dtype == specs[i].dtype && v->n_dims == specs[i].n_dims && !memcmp(v->shape, specs[i].shape, (size_t)v->n_dims * 8));
        for (size_t k = 0; k < v->bytes; k++) cr_expect_eq(((const unsigned char *)v->data)[k], (unsigned char)(16 * v->name[0] + k));
    }
    tensor_set_close(s);
    cr_assert_eq(safetensors_write(in_dir("none.safetensors"), NULL, 0, NULL, fill, &f), OK);   /* "{}" and six spaces */
    cr_expect_eq(path_size(in_dir("none.safetensors")), 16);
    cr_assert_eq(tensor_set_open(&s, in_dir("none.safetensors")), OK);
    tensor_set_close(s);
}

static int names_in_dir(void)
{
    char **names;
    int n;
    cr_assert_eq(dir_list(dir, &names, &n), OK);
    names_free(names, n);
    return n;
}

Test(safetensors, streams_large_tensors)
{
    struct tensor_spec big = {"w", DTYPE_F32, 1, {5 << 20}, NULL};
    struct filler f = {0};
    struct tensor_set *s;
    cr_assert_eq(safetensors_write(in_dir("t.safetensors"), &big, 1, NULL, fill, &f), OK);
    cr_expect_eq(f.calls, 3);
    cr_expect_leq(f.largest, 8 << 20);
    cr_assert_eq(tensor_set_open(&s, in_dir("t.safetensors")), OK);
    const unsigned char *p = tensor_set_at(s, 0)->data;
    for (size_t i = 0; i < tensor_set_at(s, 0)->bytes; i++) cr_assert_eq(p[i], (unsigned char)(16 * 'w' + i));
    float read[1000];
    cr_assert_eq(tensor_read(s, tensor_set_at(s, 0), 3 << 20, 1000, read), OK);
    cr_expect_arr_eq(read, (const char *)p + ((size_t)3 << 22), sizeof read);
    tensor_set_close(s);
}

Test(safetensors, splits_as_transformers_does)
{
    /* 6 + 6 + 2 + 9 (its own) + 2 + 2 against 8: [6] [9] [6 2] [2 2], numbered as they close, the large one when it is met */
    static const struct tensor_spec list[] = {
        {"z", DTYPE_U8, 1, {6}, NULL}, {"y", DTYPE_U8, 1, {6}, NULL}, {"x", DTYPE_U8, 1, {2}, NULL},
        {"v", DTYPE_U8, 1, {9}, NULL}, {"u", DTYPE_U8, 1, {2}, NULL}, {"t", DTYPE_U8, 1, {2}, NULL},
    };
    static const struct { const char *name; const char *file; } want[] = {
        {"z", "model-00001-of-00004.safetensors"}, {"y", "model-00003-of-00004.safetensors"}, {"x", "model-00003-of-00004.safetensors"},
        {"v", "model-00002-of-00004.safetensors"}, {"u", "model-00004-of-00004.safetensors"}, {"t", "model-00004-of-00004.safetensors"},
    };
    struct filler f = {0};
    struct tensor_set *s;
    cr_assert_eq(safetensors_write_dir(dir, list, 6, 8, fill, &f), OK, "%s", fail_message());
    cr_expect_eq(names_in_dir(), 5);
    cr_assert_eq(tensor_set_open(&s, dir), OK, "%s", fail_message());
    for (int i = 0; i < 6; i++) {
        const char *path = tensor_set_file_path(s, tensor_set_find(s, want[i].name)->file);
        cr_expect_str_eq(strrchr(path, '/') + 1, want[i].file, "%s is in %s", want[i].name, path);
    }
    tensor_set_close(s);
    char *text;
    size_t n;
    cr_assert_eq(file_read(in_dir(INDEX), 1 << 20, &text, &n), OK);
    const char *head = "{\n  \"metadata\": {\n    \"total_parameters\": 27,\n    \"total_size\": 27\n  },\n  \"weight_map\": {\n    \"t\": \"model-00004-of-00004.safetensors\",\n";
    cr_expect(!strncmp(text, head, strlen(head)) && text[n - 1] == '\n', "%s", text);
    free(text);
    cr_expect_eq(safetensors_write_dir(dir, list, 6, 0, fill, &f), ERR_USAGE);   /* would be read instead of the files there */
    cr_expect(strstr(fail_message(), "already holds a model"));
}

Test(safetensors, one_file_when_it_fits)
{
    struct filler f = {0};
    cr_assert_eq(safetensors_write_dir(dir, specs, 6, 29, fill, &f), OK);
    cr_expect(path_exists(in_dir("model.safetensors")));
    cr_expect_eq(names_in_dir(), 1);
}

Test(safetensors, a_failed_or_killed_write_leaves_nothing_under_final_names)
{
    static const struct tensor_spec list[] = {{"a", DTYPE_U8, 1, {6}, NULL}, {"b", DTYPE_U8, 1, {6}, NULL}, {"c", DTYPE_U8, 1, {6}, NULL}};
    for (int at = 1; at <= 3; at++) {
        struct filler f = {.fail_at = at};
        cr_expect_eq(safetensors_write_dir(dir, list, 3, 8, fill, &f), ERR_IO);
        cr_expect(strstr(fail_message(), "the source of"));
        cr_expect_eq(names_in_dir(), 0);
        f = (struct filler){.fail_at = at};
        cr_expect_eq(safetensors_write(in_dir("x.safetensors"), list, 3, NULL, fill, &f), ERR_IO);
        cr_expect_eq(names_in_dir(), 0);
    }
    for (int at = 1; at <= 3; at++) {
        struct filler f = {.die_at = at};
        pid_t pid = fork();
        if (!pid) _exit(safetensors_write_dir(dir, list, 3, 8, fill, &f));
        int status;
        cr_assert(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 9);
        char **names;
        int n;
        cr_assert_eq(dir_list(dir, &names, &n), OK);
        for (int i = 0; i < n; i++) cr_expect(strstr(names[i], ".tmp-"), "%s", names[i]);
        names_free(names, n);
    }
    struct filler f = {0};   /* leftovers are in nobody's way */
    cr_expect_eq(safetensors_write_dir(dir, list, 3, 8, fill, &f), OK, "%s", fail_message());
    struct tensor_set *s;
    cr_expect_eq(tensor_set_open(&s, dir), OK);
    tensor_set_close(s);
    cr_expect_eq(safetensors_write(in_dir("absent/x.safetensors"), list, 3, NULL, fill, &f), ERR_IO);
    cr_expect(strstr(fail_message(), "cannot create"));
}

Test(safetensors, golden_model)
{
    struct tensor_set *s;
    char path[600];
    snprintf(path, sizeof path, "%s/../shared/golden/qwen2_tiny/student", SOURCE_ROOT);
    if (!path_is_dir(path)) cr_skip_test("SKIPPED: ../shared/golden is not here");
    cr_assert_eq(tensor_set_open(&s, path), OK, "%s", fail_message());
    const struct tensor_view *v = tensor_set_find(s, "model.embed_tokens.weight");
    cr_assert(v && v->n_dims == 2 && v->shape[0] == 512 && v->shape[1] == 64);
    tensor_set_close(s);
}
