/* metrics.jsonl and TensorBoard files, read back by this test's own readers. That TensorBoard itself reads them was checked with
 * its EventAccumulator; the bytes below hold what it needs: framing, checksums, field numbers, zero as a value. */
#include <criterion/criterion.h>
#include <glob.h>
#include <jansson.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "train/metrics.h"

static char dir[64], *path;

static void setup(void)
{
    strcpy(dir, "/tmp/test_metrics_XXXXXX");
    cr_assert(mkdtemp(dir));
    path = path_join(dir, "metrics.jsonl");
}

static void teardown(void)
{
    free(path);
    dir_remove_tree(dir);
}

TestSuite(metrics, .init = setup, .fini = teardown);

static void write_steps(int64_t resumed, int64_t from, int64_t to)
{
    struct metrics *m;
    cr_assert_eq(metrics_open(&m, dir, resumed), OK, "%s", fail_message());
    for (int64_t s = from; s <= to; s++)
        cr_assert_eq(metrics_write(m, s, (struct metric[]){{"train/loss", 10.0 / (double)s}, {"train/zero", 0}, {"bad", s % 2 ? NAN : 1}}, 3), OK, "%s", fail_message());
    metrics_close(m);
}

static void expect_lines(const char *expected)
{
    char *text, got[1024] = "";
    size_t bytes;
    cr_assert_eq(file_read(path, 1 << 20, &text, &bytes), OK);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        json_t *o = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
        cr_assert(o, "%s", line);
        sprintf(got + strlen(got), "%s%lld", *got ? " " : "", (long long)json_integer_value(json_object_get(o, "step")));
        json_decref(o);
    }
    cr_expect_str_eq(got, expected);
    free(text);
}

static void append(const char *text)
{
    FILE *f = fopen(path, "a");
    fputs(text, f);
    fclose(f);
}

Test(metrics, one_object_per_line)
{
    char *text;
    size_t bytes;
    write_steps(0, 1, 3);
    cr_assert_eq(file_read(path, 1 << 20, &text, &bytes), OK);
    cr_expect_str_eq(text, "{\"step\": 1, \"train/loss\": 10.0, \"train/zero\": 0.0, \"bad\": null}\n"
                           "{\"step\": 2, \"train/loss\": 5.0, \"train/zero\": 0.0, \"bad\": 1.0}\n"
                           "{\"step\": 3, \"train/loss\": 3.33333333, \"train/zero\": 0.0, \"bad\": null}\n");
    free(text);
    metrics_close(NULL);
}

Test(metrics, resume_takes_back_later_steps)
{
    write_steps(0, 1, 6);
    write_steps(4, 5, 7);
    expect_lines("1 2 3 4 5 6 7");
    append("{\"step\": 8, \"train/lo");                        /* killed in the middle of a line */
    write_steps(7, 8, 9);
    expect_lines("1 2 3 4 5 6 7 8 9");
    append("not JSON\n[1]\n{\"step\": \"x\"}\n{\"step\": 10}\n");
    write_steps(9, 10, 10);
    expect_lines("1 2 3 4 5 6 7 8 9 10");
    write_steps(0, 1, 2);                                      /* a new run in the same directory */
    expect_lines("1 2");
    glob_t g;
    char *pattern = path_join(dir, "events.out.tfevents.*");
    cr_assert_eq(glob(pattern, 0, NULL, &g), 0);
    cr_expect_eq(g.gl_pathc, 5, "%zu files of five sessions", g.gl_pathc);
    globfree(&g);
    free(pattern);
    cr_expect_eq(metrics_open(&(struct metrics *){NULL}, "/dev/null/run", 0), ERR_IO);
}

/* CRC-32C bit by bit, not the library's */
static uint32_t slow_masked_crc(const uint8_t *p, size_t n)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int b = 0; b < 8; b++) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    crc = ~crc;
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

Test(metrics, event_records)
{
    write_steps(2, 3, 3);
    glob_t g;
    char *pattern = path_join(dir, "events.out.tfevents.*"), *data;
    size_t bytes, at = 0;
    cr_assert_eq(glob(pattern, 0, NULL, &g), 0);
    cr_assert_eq(g.gl_pathc, 1);
    cr_assert_eq(file_read(g.gl_pathv[0], 1 << 20, &data, &bytes), OK);
    const uint8_t *record[3];
    uint64_t length[3];
    for (int i = 0; i < 3; i++) {
        uint32_t crc;
        cr_assert_leq(at + 12, bytes);
        memcpy(&length[i], data + at, 8);
        memcpy(&crc, data + at + 8, 4);
        cr_expect_eq(crc, slow_masked_crc((uint8_t *)data + at, 8));
        record[i] = (uint8_t *)data + at + 12;
        cr_assert_leq(at + 16 + length[i], bytes);
        memcpy(&crc, record[i] + length[i], 4);
        cr_expect_eq(crc, slow_masked_crc(record[i], length[i]));
        cr_expect_eq(record[i][0], 0x09);                      /* field 1, double: wall_time */
        at += 16 + length[i];
    }
    cr_expect_eq(at, bytes);
    cr_expect(!memcmp(record[0] + 9, "\x1a\x0d" "brain.Event:2", 15));
    cr_expect(!memcmp(record[1] + 9, "\x10\x03" "\x3a\x02\x08\x01", 6), "step 3 begins the session");
    static const uint8_t summary[] = "\x10\x03"                /* step 3 */
        "\x2a\x26"                                             /* summary */
        "\x0a\x11" "\x0a\x0a" "train/loss" "\x15\x55\x55\x55\x40"
        "\x0a\x11" "\x0a\x0a" "train/zero" "\x15\0\0\0\0";     /* zero is written; NaN is left out */
    cr_assert_eq(length[2], 9 + sizeof summary - 1);
    cr_expect(!memcmp(record[2] + 9, summary, sizeof summary - 1));
    free(data);
    free(pattern);
    globfree(&g);
}
