/* Scales of fp8 tensors, from bytes and scales written by hand: every kind, blocks that are not whole, every range of elements, and what is refused. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "data/safetensors.h"

static char dir[200];

static void make_dir(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/tensor-scale-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
}

static void remove_dir(void) { dir_remove_tree(dir); }
TestSuite(tensor_scale, .init = make_dir, .fini = remove_dir);

/* The definition, and nothing of base/fp8.h: S.EEEE.MMM with bias 7 */
static double e4m3(int q)
{
    int exponent = q >> 3 & 15, mantissa = q & 7;
    double magnitude = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    if ((q & 0x7f) == 0x7f) magnitude = NAN;
    return q & 0x80 ? -magnitude : magnitude;
}

enum { MOST = 8 };
struct file { struct tensor_spec spec[MOST]; const void *data[MOST]; int n; };

static void put(struct file *f, const char *name, enum dtype dtype, int n_dims, int64_t rows, int64_t cols, const void *data)
{
    cr_assert(f->n < MOST);
    f->data[f->n] = data;
    f->spec[f->n] = (struct tensor_spec){.name = name, .dtype = dtype, .n_dims = n_dims, .shape = {rows, cols}, .user = &f->data[f->n]};
    f->n++;
}

static int fill(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    (void)context;
    memcpy(out, (const char *)*(const void **)spec->user + offset, bytes);
    return OK;
}

static struct tensor_set *open_file(const struct file *f)
{
    struct tensor_set *s;
    char *path = path_join(dir, "model.safetensors");
    unlink(path);
    cr_assert_eq(safetensors_write(path, f->spec, f->n, NULL, fill, NULL), OK, "%s", fail_message());
    cr_assert_eq(tensor_set_open(&s, path), OK, "%s", fail_message());
    free(path);
    return s;
}

enum { ROWS = 11, COLS = 26 };
static unsigned char bytes[ROWS * COLS];
static void fill_bytes(void) { for (int i = 0; i < ROWS * COLS; i++) bytes[i] = (unsigned char)(i * 7 + i / 256); }     /* 7 is odd: every byte */

static const struct quantization per_tensor = {SCALE_TENSOR, 0, 0, "fp8"}, per_row = {SCALE_ROW, 0, 0, "fbgemm_fp8"}, per_block = {SCALE_BLOCK, 4, 8, "fp8"};

static float scale_value(int i) { return bf16_to_float(bf16_from_float(0.0123f * (float)(i + 1))); }

static void expect_scaled(const struct tensor_view *v, float (*scale)(int row, int col))
{
    float out[ROWS * COLS + 1];
    for (int first = 0; first < ROWS * COLS; first += first < 2 * COLS ? 1 : 17)
        for (int count = 0; count <= ROWS * COLS - first; count += count < 2 * COLS ? 1 : 23) {
            out[count] = 7;
            cr_assert_eq(tensor_to_float(v, first, count, out), OK, "%s", fail_message());
            cr_assert_eq(out[count], 7);
            for (int i = 0; i < count; i++) {
                int at = first + i;
                float want = (float)(e4m3(bytes[at]) * (double)scale(at / COLS, at % COLS));      /* exact in double, then rounded once */
                cr_assert(isnan(want) ? isnan(out[i]) : out[i] == want && !signbit(out[i]) == !signbit(want), "[%d] from %d: %g, not %g", at, first, (double)out[i], (double)want);
            }
        }
}

static float of_tensor(int row, int col) { (void)row; (void)col; return scale_value(0); }
static float of_row(int row, int col) { (void)col; return scale_value(row); }
static float of_block(int row, int col) { return scale_value(row / 4 * 4 + col / 8); }           /* 26 columns are four blocks of 8, the last of 2 */

Test(tensor_scale, number_times_scale_for_every_kind_and_range)
{
    static const struct { const struct quantization *q; const char *name; int n_dims; int64_t rows, cols; float (*scale)(int, int); } cases[] = {
        {&per_tensor, "a.weight_scale", 0, 1, 1, of_tensor}, {&per_tensor, "a.weight_scale", 1, 1, 1, of_tensor}, {&per_tensor, "a.weight_scale_inv", 2, 1, 1, of_tensor},
        {&per_row, "a.weight_scale", 2, ROWS, 1, of_row}, {&per_row, "a.weight_scale", 1, ROWS, 1, of_row},
        {&per_block, "a.weight_scale_inv", 2, 3, 4, of_block}, {&per_block, "a.weight_scale", 2, 3, 4, of_block}};
    float f32[16];
    uint16_t bf16[16], f16[16];
    fill_bytes();
    for (int i = 0; i < 16; i++) { f32[i] = scale_value(i); bf16[i] = bf16_from_float(f32[i]); f16[i] = f16_from_float(f32[i]); }
    const struct { enum dtype dtype; const void *data; } types[] = {{DTYPE_F32, f32}, {DTYPE_BF16, bf16}, {DTYPE_F16, f16}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int d = 0; d < 3; d++) {
            struct file f = {.n = 0};
            put(&f, "a.weight", DTYPE_F8_E4M3, 2, ROWS, COLS, bytes);
            put(&f, cases[i].name, types[d].dtype, cases[i].n_dims, cases[i].rows, cases[i].cols, types[d].data);
            put(&f, "a.bias", DTYPE_F32, 1, 3, 0, f32);
            put(&f, "a.input_scale", DTYPE_F32, 1, 1, 0, f32);
            put(&f, "k_proj.k_scale", DTYPE_F32, 0, 0, 0, f32);
            struct tensor_set *s = open_file(&f);
            float one;
            cr_expect_eq(tensor_to_float(tensor_set_find(s, "a.weight"), 0, 1, &one), ERR_INPUT);
            cr_expect(strstr(fail_message(), "a.weight: dtype F8_E4M3 without a scale"), "%s", fail_message());
            cr_assert_eq(tensor_set_bind_scales(s, cases[i].q, "here"), OK, "%s", fail_message());
            const struct tensor_view *v = tensor_set_find(s, "a.weight");
            cr_assert(v->scale && v->scale->kind == cases[i].q->scales && !v->is_scale);
            cr_expect(tensor_set_find(s, cases[i].name)->is_scale && tensor_set_find(s, "a.input_scale")->is_scale && tensor_set_find(s, "k_proj.k_scale")->is_scale);
            cr_expect(!tensor_set_find(s, "a.bias")->is_scale && !tensor_set_find(s, "a.bias")->scale);
            expect_scaled(v, cases[i].scale);
            if (v->scale->kind != SCALE_BLOCK) {
                float rows[ROWS];
                tensor_row_scales(v, 0, ROWS, rows);
                for (int r = 0; r < ROWS; r++) cr_expect_eq(rows[r], cases[i].scale(r, 0));
                tensor_row_scales(v, 9, 2, rows);
                cr_expect(rows[0] == cases[i].scale(9, 0) && rows[1] == cases[i].scale(10, 0));
            }
            tensor_set_close(s);
        }
}

/* Several threads, and rows longer than a thread's share */
Test(tensor_scale, a_large_tensor_is_the_sum_of_its_parts)
{
    enum { WIDE = 1 << 19, HIGH = 3, BLOCK = 1000 };
    const struct quantization q = {SCALE_BLOCK, 2, BLOCK, "fp8"};
    int64_t across = (WIDE + BLOCK - 1) / BLOCK;
    unsigned char *in = malloc(WIDE * HIGH);
    float *scale = malloc((size_t)(2 * across) * sizeof *scale), *out = malloc((size_t)WIDE * HIGH * sizeof *out);
    for (int64_t i = 0; i < WIDE * HIGH; i++) in[i] = (unsigned char)((i * 2654435761u >> 13) % 127);
    for (int64_t i = 0; i < 2 * across; i++) scale[i] = 1 + (float)i / 512;
    struct file f = {.n = 0};
    put(&f, "w", DTYPE_F8_E4M3, 2, HIGH, WIDE, in);
    put(&f, "w_scale_inv", DTYPE_F32, 2, 2, across, scale);
    struct tensor_set *s = open_file(&f);
    cr_assert_eq(tensor_set_bind_scales(s, &q, "here"), OK, "%s", fail_message());
    cr_assert_eq(tensor_to_float(tensor_set_find(s, "w"), 5, WIDE * HIGH - 5, out), OK);
    for (int64_t i = 5; i < WIDE * HIGH; i++)
        cr_assert_eq(out[i - 5], (float)(e4m3(in[i]) * (double)scale[i / WIDE / 2 * across + i % WIDE / BLOCK]), "[%lld]", (long long)i);
    tensor_set_close(s);
    free(in);
    free(scale);
    free(out);
}

Test(tensor_scale, unquantised_sets_are_left_alone)
{
    const struct quantization none = {SCALE_NONE, 0, 0, NULL};
    float one = 1;
    fill_bytes();
    struct file f = {.n = 0};
    put(&f, "a.weight", DTYPE_F8_E4M3, 2, ROWS, COLS, bytes);
    put(&f, "a.weight_scale", DTYPE_F32, 0, 0, 0, &one);
    struct tensor_set *s = open_file(&f);
    cr_assert_eq(tensor_set_bind_scales(s, &none, "here"), OK);
    cr_expect(!tensor_set_find(s, "a.weight")->scale && !tensor_set_find(s, "a.weight_scale")->is_scale);
    tensor_set_close(s);
}

Test(tensor_scale, same_means_bytes_and_scales)
{
    float one[] = {1, 1}, two[] = {2, 1};
    static const char *const names[] = {"b.weight", "c.weight", "d.weight"};
    fill_bytes();
    struct file f = {.n = 0};
    put(&f, "a.weight", DTYPE_F8_E4M3, 2, 2, 8, bytes);
    put(&f, "a.weight_scale", DTYPE_F32, 1, 2, 0, one);
    put(&f, names[0], DTYPE_F8_E4M3, 2, 2, 8, bytes);
    put(&f, "b.weight_scale", DTYPE_F32, 2, 2, 1, one);
    put(&f, names[1], DTYPE_F8_E4M3, 2, 2, 8, bytes);
    put(&f, "c.weight_scale", DTYPE_F32, 1, 2, 0, two);
    put(&f, names[2], DTYPE_F8_E4M3, 2, 2, 8, bytes);
    struct tensor_set *s = open_file(&f);
    cr_assert_eq(tensor_set_bind_scales(s, &per_row, "here"), OK, "%s", fail_message());
    for (int i = 0; i < 3; i++) cr_expect_eq(tensor_same(tensor_set_find(s, "a.weight"), tensor_set_find(s, names[i])), i == 0, "%s", names[i]);
    tensor_set_close(s);
}

Test(tensor_scale, faults_are_refused_by_name)
{
    static const float good[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, zero[16] = {1, 0}, negative[16] = {1, -1}, nan_[16] = {1, NAN}, inf_[16] = {1, INFINITY};
    static const struct { const struct quantization *q; enum dtype weight; int weight_dims; const char *scale; enum dtype dtype; int n_dims; int64_t rows, cols; const float *data; const char *words[2]; } cases[] = {
        {&per_block, DTYPE_F8_E4M3, 2, "a.weight_scale_inv", DTYPE_F32, 2, 2, 4, good, {"a.weight_scale_inv has shape [2, 4]", "one scale per block of 4 x 8: [3, 4] for the [11, 26] of a.weight"}},
        {&per_block, DTYPE_F8_E4M3, 2, "a.weight_scale_inv", DTYPE_F32, 2, 4, 3, good, {"[4, 3]", "[3, 4]"}}, {&per_block, DTYPE_F8_E4M3, 2, "a.weight_scale_inv", DTYPE_F32, 1, 12, 0, good, {"[12]", "[3, 4]"}},
        {&per_block, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 0, 0, 0, good, {"shape []", "[3, 4]"}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 2, 1, 11, good, {"[1, 11]", "[11, 1]"}},
        {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 10, 0, good, {"[10]", "one scale per row"}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 1, 0, good, {"[1]", "[11, 1]"}},
        {&per_tensor, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 2, 11, 1, good, {"[11, 1]", "one scale per tensor"}}, {&per_tensor, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 2, 0, good, {"[2]", "[1, 1]"}},
        {&per_tensor, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 0, 0, 0, zero + 1, {"a.weight_scale: element 0 is 0", "above 0"}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 11, 0, zero, {"element 1 is 0", ""}},
        {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 11, 0, negative, {"element 1 is -1", ""}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_F32, 1, 11, 0, nan_, {"element 1 is nan", ""}},
        {&per_block, DTYPE_F8_E4M3, 2, "a.weight_scale_inv", DTYPE_F32, 2, 3, 4, inf_, {"element 1 is inf", ""}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_scale", DTYPE_I32, 1, 11, 0, good, {"a.weight_scale has type I32", ""}},
        {&per_row, DTYPE_U8, 2, "a.weight_scale", DTYPE_F32, 1, 11, 0, good, {"a.weight_scale scales a.weight", "type U8"}}, {&per_row, DTYPE_F8_E5M2, 2, "a.weight_scale", DTYPE_F32, 1, 11, 0, good, {"a.weight", "F8_E5M2"}},
        {&per_row, DTYPE_F8_E4M3, 1, "a.weight_scale", DTYPE_F32, 1, 11, 0, good, {"a.weight is no matrix", "one scale per row"}}, {&per_row, DTYPE_F8_E4M3, 2, "a.weight_zero_point", DTYPE_F32, 1, 11, 0, good, {"a.weight_zero_point", "zero points"}}};
    fill_bytes();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct file f = {.n = 0};
        put(&f, "a.weight", cases[i].weight, cases[i].weight_dims, ROWS, COLS, bytes);
        put(&f, cases[i].scale, cases[i].dtype, cases[i].n_dims, cases[i].rows, cases[i].cols, cases[i].data);
        struct tensor_set *s = open_file(&f);
        cr_expect_eq(tensor_set_bind_scales(s, cases[i].q, "some/model"), ERR_INPUT, "case %zu", i);
        cr_expect(strstr(fail_message(), "some/model: ") && strstr(fail_message(), cases[i].words[0]) && strstr(fail_message(), cases[i].words[1]), "case %zu: %s", i, fail_message());
        tensor_set_close(s);
    }
    struct file f = {.n = 0};
    put(&f, "a.weight", DTYPE_F8_E4M3, 2, ROWS, COLS, bytes);
    put(&f, "a.weight_scale", DTYPE_F32, 0, 0, 0, good);
    put(&f, "a.weight_scale_inv", DTYPE_F32, 0, 0, 0, good);
    struct tensor_set *s = open_file(&f);
    cr_expect_eq(tensor_set_bind_scales(s, &per_tensor, "some/model"), ERR_INPUT);
    cr_expect(strstr(fail_message(), "a.weight has two scales"), "%s", fail_message());
    tensor_set_close(s);
}
