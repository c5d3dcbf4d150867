/* What train reports as a dataset's loss, against scripts/read_shards.py, which was written from data/FORMAT.md: every kind, every policy it allows, at every
 * temperature it lists, for a student whose logits are random. Loader, batch and objective on one side; NumPy and h5py on the other. */
#include "data/loader.h"
#include "kernels/backend.h"
#include "tests/data/shard_helpers.h"

TestSuite(read_shards, .init = setup, .fini = teardown, .timeout = 300);

enum { ROWS = 5, EXTRA = 3 };                 /* rows of each dataset; columns of the student that no token has */

/* float32 [rows, length, columns] as numpy.save writes it */
static void save_npy(const char *path, const float *x, int64_t rows, int64_t length, int64_t columns)
{
    size_t bytes = (size_t)(rows * length * columns) * sizeof *x;
    char *file = xcalloc(1, 128 + bytes), *shape = xasprintf("{'descr': '<f4', 'fortran_order': False, 'shape': (%lld, %lld, %lld), }", (long long)rows, (long long)length, (long long)columns);
    memcpy(file, "\x93NUMPY\1\0\x76\0", 10);  /* a header of 118 bytes, which ends at 128 */
    memset(file + 10, ' ', 117);
    memcpy(file + 10, shape, strlen(shape));
    file[127] = '\n';
    memcpy(file + 128, x, bytes);
    spit(path, file, 128 + bytes);
    free(shape);
    free(file);
}

/* The mean of T^2 D over the supervised positions of all rows, as the objective computes it. */
static double loss_of(struct backend *be, struct shard_dataset *d, const float *z, float T, enum tail_policy policy)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    int64_t L = m->row_length, Vv = m->valid_vocab, V = Vv + EXTRA, targets = 0;
    bool full = m->kind == SHARD_FULL;
    struct loader_options o = {.batch_rows = 2, .temperature = T, .samples = policy == TAIL_UNBIASED && !full};
    struct distill_args args = {.divergence = DIV_FORWARD_KL, .tail = policy, .temperature = T, .kd_weight = 1, .gradient_scale = 1};
    struct loader *l;
    struct batch *b;
    double sum = 0;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    for (;;) {
        OK_OR_DIE(loader_next(l, &b));
        if (!b) break;
        float *logits = xmalloc((size_t)(b->n * V) * sizeof *logits), *kd = xmalloc((size_t)b->n * sizeof *kd), *ce = xmalloc((size_t)b->n * sizeof *ce);
        for (int64_t i = 0; i < b->rows; i++) memcpy(logits + i * L * V, z + b->row_index[i] * L * V, (size_t)(L * V) * sizeof *logits);
        struct distill_targets t = {.labels = b->labels, .kind = full ? TARGET_FULL : o.samples ? TARGET_SAMPLES : TARGET_TOPK, .K = b->k, .head_ids = b->head_ids, .head_logprob = b->head_logprob,
                                    .tail_logmass = b->tail_logmass, .weight = b->weight, .full = b->full_logits, .full_dtype = DTYPE_F16, .full_stride = Vv, .full_scale = b->full_scale};
        struct distill_losses out = {.kd = kd, .ce = ce};
        be->ops->distill_loss(be, (act *)logits, &out, &t, &args, b->n, V, Vv);
        for (int64_t n = 0; n < b->n; n++) sum += kd[n];
        targets += b->n_targets;
        free(logits);
        free(kd);
        free(ce);
    }
    loader_close(l);
    return sum / (double)targets;
}

static void compare(const char *python, struct backend *be, const struct shard_manifest *m)
{
    static const struct { const char *name; enum tail_policy policy; } policies[] = {{"unbiased", TAIL_UNBIASED}, {"bucket", TAIL_BUCKET}, {"renormalise", TAIL_RENORMALISE}, {"drop", TAIL_DROP}};
    int64_t L = m->row_length, V = m->valid_vocab + EXTRA;
    static int number;
    char *dir = dataset_new(kept(xasprintf("d%d", number++)), m), *npy = kept_path(base, "student.npy"), *out = kept_path(base, "out"), *text;
    float *z = xmalloc((size_t)(ROWS * L * V) * sizeof *z);
    for (int64_t i = 0; i < ROWS * L * V; i++) {
        struct philox r = philox4x32(3, (uint64_t)m->kind, (uint64_t)i);
        z[i] = i % V < m->valid_vocab ? 3 * normal_float(r.v[0], r.v[1]) : 1e9f;      /* padding columns take no part */
    }
    save_npy(npy, z, ROWS, L, V);
    char *command = xasprintf("%s %s/scripts/read_shards.py %s --student %s > %s", python, SOURCE_ROOT, dir, npy, out);
    cr_assert_eq(system(command), 0, "%s", command);
    size_t bytes;
    OK_OR_DIE(file_read(out, 1 << 20, &text, &bytes));
    struct shard_dataset *d;
    OK_OR_DIE(shard_dataset_open(&d, dir));
    int compared = 0;
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++)
        for (int i = 0; i < m->n_temperatures; i++) {
            char key[64];
            snprintf(key, sizeof key, "kd %s T = %g: ", policies[p].name, m->temperatures[i]);
            char *line = strstr(text, key);
            bool meant = policies[p].policy == TAIL_UNBIASED ? m->kind != SHARD_TOPK : shard_kind_has_head(m->kind);
            cr_assert_eq(line != NULL, meant, "%s: '%s' in %s", shard_kind_name(m->kind), key, text);
            if (!line) continue;
            double want = strtod(line + strlen(key), NULL), got = loss_of(be, d, z, m->temperatures[i], policies[p].policy);
            cr_assert(fabs(got - want) <= 1e-5 * fabs(want), "%s, %s: %.9g, the script says %.9g", shard_kind_name(m->kind), key, got, want);
            compared++;
        }
    cr_assert_eq(compared, m->kind == SHARD_HYBRID ? 12 : m->kind == SHARD_TOPK ? 9 : m->kind == SHARD_FULL ? 3 : 1);
    shard_dataset_close(d);
    free(command);
    free(text);
    free(z);
}

Test(read_shards, losses)
{
    const char *python = python_with_h5py();
    struct backend *be;
    OK_OR_DIE(backend_open(&be, &(struct backend_options){.device = "cpu"}));
    struct op_limits limits = {.N = 64, .C = 8, .F = 8, .V = 4096, .chunk_rows = 64, .max_doc = 64, .Hq = 1, .Hkv = 1, .D = 8, .K = 512};
    be->scratch_bytes = be->ops->scratch_bytes(be, &limits);
    be->scratch = be->ops->alloc(be, be->scratch_bytes);
    struct shard_manifest kinds[] = {fixture_manifest(SHARD_HYBRID, ROWS, 2, 12, 300, 8), fixture_manifest(SHARD_HYBRID, ROWS, 2, 12, 9, 9), fixture_manifest(SHARD_HYBRID, ROWS, 5, 12, 2000, 32),
                                     fixture_manifest(SHARD_TOPK, ROWS, 2, 12, 300, 8), fixture_manifest(SHARD_SAMPLED, ROWS, 2, 12, 300, 50), fixture_manifest(SHARD_FULL, ROWS, 2, 12, 37, 0)};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) compare(python, be, &kinds[i]);
    be->ops->release(be, be->scratch);
    backend_close(be);
}
