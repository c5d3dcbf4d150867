/* distill bench io: what the disk side of a run costs. Shards are sealed by the writer and read into batches by the loader, a checkpoint is loaded onto the device;
 * beside each, on the same disk and in the same run, a plain program writes and syncs, or reads, the same bytes. A rate per core is over the CPU time of the whole
 * process. "Cold" is after the kernel was asked to forget the files, "warm" the reads after that. */
#include <fcntl.h>
#include <math.h>
#include <omp.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/rng.h"
#include "data/loader.h"
#include "train/bench.h"
#include "train/progress.h"

enum { POSITIONS = 64, PIECE = 8 << 20, TURNS = 3 };     /* a row repeats so many positions of a teacher; plain reads and writes go in such pieces; a checkpoint is loaded so often */
static const size_t MOST_SHARD = (size_t)512 << 20, LINK = (size_t)64 << 20;

struct span { double wall, cpu; };            /* a point in time, or what has passed */

static struct span span_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (struct span){now_seconds(), (double)t.tv_sec + 1e-9 * (double)t.tv_nsec};
}
static void span_add(struct span *sum, struct span from)
{
    struct span to = span_now();
    sum->wall += to.wall - from.wall;
    sum->cpu += to.cpu - from.cpu;
}

/* ---- the same bytes, plainly ---- */

static int plain_write(const char *path, const char *data, size_t bytes, double *seconds)
{
    int rc = OK, fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail_errno(ERR_IO, "%s: cannot create", path);
    double start = now_seconds();
    for (size_t at = 0; at < bytes; at += PIECE) TRY(file_write_all(fd, data + at, bytes - at < PIECE ? bytes - at : PIECE, path));
    if (fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync", path); goto out; }
    *seconds += now_seconds() - start;
out:
    close(fd);
    unlink(path);
    return rc;
}

struct files { char **path; int64_t *bytes; int n; int64_t total; };

static void files_add(struct files *f, char *path)
{
    f->path = xrealloc(f->path, (size_t)(f->n + 1) * sizeof *f->path);
    f->bytes = xrealloc(f->bytes, (size_t)(f->n + 1) * sizeof *f->bytes);
    f->path[f->n] = path;
    f->bytes[f->n] = path_size(path);
    f->total += f->bytes[f->n++];
}

static void files_free(struct files *f)
{
    for (int i = 0; i < f->n; i++) free(f->path[i]);
    free(f->path);
    free(f->bytes);
    *f = (struct files){0};
}

static void forget(const struct files *f)
{
    for (int i = 0; i < f->n; i++) {
        int fd = open(f->path[i], O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        fsync(fd);                            /* only clean pages can be dropped */
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
}

/* How much of the files the page cache holds. */
static double cached_share(const struct files *f)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), held = 0;
    for (int i = 0; i < f->n; i++) {
        size_t bytes = (size_t)f->bytes[i], pages = (bytes + page - 1) / page;
        int fd = open(f->path[i], O_RDONLY | O_CLOEXEC);
        void *map = fd < 0 || !bytes ? MAP_FAILED : mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        unsigned char *in = xmalloc(pages + 1);
        if (map != MAP_FAILED) {
            if (!mincore(map, bytes, in)) for (size_t p = 0; p < pages; p++) held += in[p] & 1;
            munmap(map, bytes);
        }
        free(in);
        if (fd >= 0) close(fd);
    }
    return (double)(held * page) / (double)(f->total ? f->total : 1);
}

/* Every byte of every file, piece by piece, by so many threads. */
static int plain_read(const struct files *f, int threads, double *seconds)
{
    int rc = OK, *fd = xmalloc((size_t)f->n * sizeof *fd);
    int64_t pieces = 0, failed = 0, *first = xmalloc((size_t)(f->n + 1) * sizeof *first);
    for (int i = 0; i < f->n; i++) {
        fd[i] = open(f->path[i], O_RDONLY | O_CLOEXEC);
        if (fd[i] < 0) rc = fail_errno(ERR_IO, "%s: cannot open", f->path[i]);
        first[i] = pieces;
        pieces += (f->bytes[i] + PIECE - 1) / PIECE;
    }
    first[f->n] = pieces;
    double start = now_seconds();
    #pragma omp parallel num_threads(threads) if (rc == OK)
    {
        char *buffer = xmalloc(PIECE);
        int i = 0;
        #pragma omp for schedule(dynamic, 1) reduction(+ : failed)
        for (int64_t p = 0; p < (rc == OK ? pieces : 0); p++) {
            while (i && p < first[i]) i--;
            while (p >= first[i + 1]) i++;
            int64_t at = (p - first[i]) * PIECE, bytes = f->bytes[i] - at < PIECE ? f->bytes[i] - at : PIECE;
            failed += file_pread(fd[i], buffer, (size_t)bytes, at, f->path[i]) != OK;
        }
        free(buffer);
    }
    *seconds = now_seconds() - start;
    if (failed) rc = fail(ERR_IO, "%s: reading back what was just written failed", f->path[0]);
    for (int i = 0; i < f->n; i++) if (fd[i] >= 0) close(fd[i]);
    free(fd);
    free(first);
    return rc;
}

/* ---- shards ---- */

struct shards {
    struct bench *b;
    struct shard_manifest m;
    struct shard_row row;                     /* the one row that all are */
    char *dir, *plain;
    struct files files;
};

/* Targets of POSITIONS random rows of logits, as teacher-dump takes them, and a row that goes round them. Normal logits of this scale give a few ids most of the mass, as
 * teachers do: 50 draws are a dozen or two different ids, where flatter logits would make rows of kind sampled several times as long. */
static int make_row(struct shards *s)
{
    struct bench *b = s->b;
    const struct ops *op = b->be->ops;
    struct shard_manifest *m = &s->m;
    int rc = OK, nT = m->n_temperatures;
    int64_t V = b->config->vocab_size, L = m->row_length;
    size_t R = POSITIONS, k = (size_t)m->k, draws = (size_t)m->draws, width = dtype_width(b->be->act_dtype);
    struct memory_plan *plan = memory_plan_new(b->be);
    act *logits;
    int32_t *labels, token[POSITIONS], label[POSITIONS];
    struct teacher_targets out = {.nT = nT, .temperatures = m->temperatures, .K = m->k};
    struct sample_targets sample = {.draws = m->draws, .K = m->k, .nT = nT, .temperature = m->temperatures[0], .seed = 5, .row_length = L};
    memory_add(plan, "logits", "nothing", &logits, R * (size_t)V * width);
    memory_add(plan, "targets", "nothing", &labels, R * 4);
    memory_add(plan, "targets", "nothing", &out.head_ids, R * k * 4);
    memory_add(plan, "targets", "nothing", &out.head_logprob, R * k * 4);
    memory_add(plan, "targets", "nothing", &out.lse, R * (size_t)nT * 4);
    memory_add(plan, "targets", "nothing", &out.tail_logmass, R * (size_t)nT * 4);
    memory_add(plan, "targets", "nothing", &out.entropy, R * 4);
    memory_add(plan, "targets", "nothing", &out.label_logprob, R * 4);
    memory_add(plan, "targets", "nothing", &out.full, m->kind == SHARD_FULL ? R * (size_t)V * 2 : 0);
    memory_add(plan, "targets", "nothing", &sample.ids, R * draws * 4);
    memory_add(plan, "targets", "nothing", &sample.count, R * draws);
    memory_add(plan, "targets", "nothing", &sample.logprob, m->kind == SHARD_HYBRID ? R * draws * 4 : 0);
    struct op_limits limits = {.N = POSITIONS, .C = 1, .F = 1, .V = V, .chunk_rows = POSITIONS, .max_doc = 1, .Hq = 1, .Hkv = 1, .D = 2, .K = m->k};
    memory_add_scratch(plan, op->scratch_bytes(b->be, &limits));
    uint16_t *full = xmalloc(R * (size_t)V * 2);
    float *floats = xmalloc(R * (k + draws + (size_t)nT + 1) * 4);
    TRY(memory_commit(plan, 0));
    for (size_t i = 0; i < R; i++) token[i] = (int32_t)(philox4x32(3, 0, i).v[0] % (uint32_t)V);
    for (size_t i = 0; i < R; i++) label[i] = token[(i + 1) % R];
    op->upload(b->be, labels, label, sizeof label);
    op->random_normal(b->be, logits, (int64_t)R * V, 0, 1.25f * sqrtf(2 * logf((float)V)), 19, 0);
    op->teacher_targets(b->be, &out, logits, labels, (int64_t)R, V, V);
    sample.head_ids = out.head_ids;
    sample.lse = out.lse;
    if (m->draws) op->sample_targets(b->be, &sample, logits, (int64_t)R, V, V);

#define ROUND(to, from, each, convert) for (int64_t t = 0; t < L; t++) for (size_t j = 0; j < (each); j++) (to)[(size_t)t * (each) + j] = convert((from)[(size_t)(t % POSITIONS) * (each) + j])
    shard_row_alloc(&s->row, m);
    for (int64_t t = 0; t < L; t++) {
        s->row.tokens[t] = (uint32_t)token[t % POSITIONS];
        s->row.loss_mask[t] = t + 1 < L;
        s->row.document[t] = 0;
    }
    op->download(b->be, floats, out.lse, R * (size_t)nT * 4);
    ROUND(s->row.lse, floats, (size_t)nT, );
    op->download(b->be, floats, out.entropy, R * 4);
    ROUND(s->row.entropy, floats, (size_t)1, f16_from_float);
    op->download(b->be, floats, out.label_logprob, R * 4);
    ROUND(s->row.label_logprob, floats, (size_t)1, f16_from_float);
    s->row.label_logprob[L - 1] = 0;
    if (m->kind == SHARD_FULL) {
        op->download(b->be, full, out.full, R * (size_t)V * 2);
        ROUND(s->row.logits, full, (size_t)V, );
    }
    if (k) {
        op->download(b->be, floats, out.tail_logmass, R * (size_t)nT * 4);
        ROUND(s->row.tail, floats, (size_t)nT, );
        op->download(b->be, floats, out.head_logprob, R * k * 4);
        ROUND(s->row.head_logprob, floats, k, f16_from_float);
        op->download(b->be, floats, out.head_ids, R * k * 4);
        ROUND(s->row.head_ids, (uint32_t *)(void *)floats, k, );
    }
    if (draws) {
        op->download(b->be, floats, sample.ids, R * draws * 4);
        ROUND(s->row.draw_ids, (uint32_t *)(void *)floats, draws, );
        op->download(b->be, floats, sample.count, R * draws);
        ROUND(s->row.draw_count, (uint8_t *)(void *)floats, draws, );
    }
    if (m->kind == SHARD_HYBRID) {
        op->download(b->be, floats, sample.logprob, R * draws * 4);
        ROUND(s->row.draw_logprob, floats, draws, f16_from_float);
    }
#undef ROUND
out:
    free(full);
    free(floats);
    memory_plan_free(plan);
    return rc;
}

static void say(struct shards *s, const char *what, double tokens, struct span t, const char *plain, double plain_seconds)
{
    char name[64];
    const char *kind = shard_kind_name(s->m.kind);
    double bytes = (double)s->files.total;
    printf("  %-22s %9s per core, %9s in all, %s", what, bench_quantity(tokens / t.cpu, "tok/s"), bench_quantity(tokens / t.wall, "tok/s"), bench_quantity(bytes / t.wall, "B/s"));
    if (plain) printf("; %s %s: %.1f %% of it", plain, bench_quantity(bytes / plain_seconds, "B/s"), 100 * plain_seconds / t.wall);
    printf("\n");
    snprintf(name, sizeof name, "%s %s", kind, what);
    bench_figure_more(s->b, name, tokens / t.cpu, "tok/s per core", "bytes_per_second", bytes / t.wall, plain ? "share_of_plain" : NULL, plain_seconds / t.wall);
}

static int seal_all(struct shards *s)
{
    struct shard_writer *w = NULL;
    struct span sealing = {0};
    double writing = 0;
    int rc = OK;
    char *data = NULL;
    size_t bytes;
    struct shard_dataset *d = NULL;
    TRY(shard_writer_open(&w, s->dir, &s->m));
    for (int64_t n = 0; n < shard_count(&s->m); n++) {
        struct span start = span_now();
        TRY(shard_writer_begin(w, n));
        for (int64_t r = 0; r < shard_rows(&s->m, n); r++) TRY(shard_writer_put(w, &s->row));
        TRY(shard_writer_seal(w));
        span_add(&sealing, start);
        if (!d) TRY(shard_dataset_open(&d, s->dir));
        char *path = shard_dataset_path(d, n);
        files_add(&s->files, path);
        TRY(file_read(path, MOST_SHARD * 2, &data, &bytes));
        TRY(plain_write(s->plain, data, bytes, &writing));    /* in turns, so that both meet the same disk */
        free(data);
        data = NULL;
    }
    double tokens = (double)(s->m.rows * s->m.row_length);
    printf("  %-22s %9.1f\n", "bytes per token", (double)s->files.total / tokens);
    say(s, "seal", tokens, sealing, "plain write + fsync", writing);
out:
    free(data);
    shard_writer_close(w);
    shard_dataset_close(d);
    return rc;
}

static int read_all(struct shards *s, struct span *reading)
{
    struct shard_dataset *d = NULL;
    struct loader *l = NULL;
    struct batch *batch;
    int rc = OK;
    int64_t sealed, rows = 0;
    struct loader_options o = {.batch_rows = s->b->c->train_micro_rows, .seed = 1, .temperature = s->m.temperatures[0], .samples = shard_kind_draws(s->m.kind)};
    struct span start = span_now();
    TRY(shard_dataset_open(&d, s->dir));
    TRY(shard_dataset_refresh(d, &sealed));
    TRY(loader_open_dataset(&l, d, &o));
    for (;;) {
        TRY(loader_next(l, &batch));
        if (!batch) break;
        rows += batch->rows;
    }
    span_add(reading, start);
    CHECK(rows == s->m.rows, "%lld rows came back of %lld", (long long)rows, (long long)s->m.rows);
out:
    loader_close(l);
    shard_dataset_close(d);
    return rc;
}

static int bench_shards(struct bench *b, const char *dir, enum shard_kind kind)
{
    const struct config *c = b->c;
    struct shards s = {.b = b};
    int rc = OK;
    int64_t V = b->config->vocab_size;
    struct span cold = {0}, warm = {0};
    double plain_cold, plain_warm;
    s.m = (struct shard_manifest){.kind = kind, .row_length = c->corpus_row_length, .k = !shard_kind_has_head(kind) ? 0 : c->shards_k < V ? (int)c->shards_k : (int)V,
                                  .draws = kind == SHARD_HYBRID ? (int)c->shards_m : kind == SHARD_SAMPLED ? (int)c->shards_draws : 0, .valid_vocab = (int32_t)V,
                                  .teacher_vocab = (int32_t)V, .n_temperatures = kind == SHARD_SAMPLED ? 1 : c->shards_temperatures.n, .packing = "benchmark", .teacher_name = "benchmark"};
    if (s.m.n_temperatures > SHARD_MAX_TEMPERATURES) { rc = fail(ERR_USAGE, "shards.temperatures lists %d values; 1 to %d are possible", s.m.n_temperatures, SHARD_MAX_TEMPERATURES); goto out; }
    for (int i = 0; i < s.m.n_temperatures; i++) s.m.temperatures[i] = (float)c->shards_temperatures.item[i];
    /* full logits of long rows are gigabytes: shorter rows, and fewer in a shard, keep a shard in memory and the disk free */
    s.m.rows = s.m.rows_per_shard = 1;
    while (s.m.row_length > 64 && shard_bytes(&s.m, 0) > MOST_SHARD) s.m.row_length /= 2;
    double row_bytes = (double)shard_bytes(&s.m, 0), total = c->bench_seconds * (kind == SHARD_FULL ? 100e6 : 25e6);
    int64_t rows = c->shards_rows_per_shard, most = (int64_t)((double)MOST_SHARD / row_bytes);
    s.m.rows_per_shard = rows < most ? rows : most > 1 ? most : 1;
    s.m.rows = s.m.rows_per_shard * (int64_t)fmax(1, ceil(total / (row_bytes * (double)s.m.rows_per_shard)));
    s.dir = path_join(dir, shard_kind_name(kind));
    s.plain = path_join(dir, "plain");
    printf("shards  %s", shard_kind_name(kind));
    if (s.m.k) printf(" %d", s.m.k);
    if (s.m.draws) printf(s.m.k ? " + %d draws" : ", %d draws", s.m.draws);
    printf(", vocabulary %lld, %lld shards of %lld rows of %lld: %s%.0f bytes per token, %s\n", (long long)V, (long long)shard_count(&s.m), (long long)s.m.rows_per_shard, (long long)s.m.row_length, kind == SHARD_SAMPLED ? "at most " : "",
           (double)shard_bytes(&s.m, 0) / (double)(s.m.rows_per_shard * s.m.row_length), bench_quantity((double)(shard_bytes(&s.m, 0)) * (double)shard_count(&s.m), "B"));
    fflush(stdout);
    TRY(make_row(&s));
    TRY(seal_all(&s));
    double tokens = (double)(s.m.rows * s.m.row_length);
    forget(&s.files);
    TRY(plain_read(&s.files, 1, &plain_cold));
    TRY(plain_read(&s.files, 1, &plain_warm));
    forget(&s.files);
    TRY(read_all(&s, &cold));
    TRY(read_all(&s, &warm));
    say(&s, "read cold", tokens, cold, "plain read", plain_cold);
    say(&s, "read warm", tokens, warm, "plain read", plain_warm);
out:
    if (rc == OK && dir_remove_tree(s.dir) != OK) rc = fail_in(ERR_IO, "after the benchmark");
    shard_row_free(&s.row);
    files_free(&s.files);
    free(s.dir);
    free(s.plain);
    return rc;
}

/* ---- a checkpoint ---- */

struct listing { struct tensor_spec *spec; int n, room; };

static int add_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct listing *l = context;
    (void)offset;
    if (l->n == l->room) l->spec = xrealloc(l->spec, (size_t)(l->room = 2 * l->room + 64) * sizeof *l->spec);
    struct tensor_spec *t = &l->spec[l->n++];
    *t = (struct tensor_spec){.name = xstrdup(name), .dtype = DTYPE_BF16, .n_dims = n_dims};
    memcpy(t->shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

/* The weights are normals of a pool that comes round again. */
static int fill(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    (void)spec;
    (void)offset;
    memcpy(out, context, bytes);
    return OK;
}

struct link { struct backend *be; void *device, *host; size_t bytes; };
static void call_link(void *l_) { struct link *l = l_; l->be->ops->upload(l->be, l->device, l->host, l->bytes); }

/* Seconds per byte from pinned host memory to the device; 0: the device's memory is the host's. */
static double link_seconds(struct backend *be, void *device, size_t bytes)
{
    struct link l = {be, device, be->host_memory ? NULL : be->ops->alloc_host(be, bytes), bytes};
    if (!l.host) return 0;
    memset(l.host, 1, bytes);
    double s = bench_seconds(be, call_link, &l, 0.05);
    be->ops->release_host(be, l.host);
    return s / (double)bytes;
}

static int bench_checkpoint(struct bench *b, const char *dir)
{
    struct params *params = NULL;
    struct memory_plan *plan = memory_plan_new(b->be);
    struct listing list = {0};
    struct tensor_set *set = NULL;
    struct files files = {0};
    struct model_config config = *b->config;
    struct weight_home home = {0};
    char *path = path_join(dir, "model"), **names = NULL;
    uint16_t *pool = xmalloc(PIECE);
    int rc = OK, n_names = 0, threads = omp_get_num_procs() < 16 ? omp_get_num_procs() : 16;
    double plain[2] = {INFINITY, INFINITY}, load[2] = {INFINITY, INFINITY}, link, cached = 0, hash = INFINITY, most = b->c->bench_checkpoint_gib > 0 ? b->c->bench_checkpoint_gib * 0x1p30 : fmax(b->c->bench_seconds, 0.1) * 200e6;      /* [cold, warm] */
    while (config.n_layers > 1 && 2.0 * (double)model_config_parameters(&config) > most) config.n_layers--;
    params = params_new(&config);
    #pragma omp parallel for
    for (int64_t i = 0; i < PIECE / 2; i++) {
        struct philox r = philox4x32(23, 0, (uint64_t)i);
        pool[i] = bf16_from_float(0.02f * normal_float(r.v[0], r.v[1]));
    }
    TRY(params_each(params, add_tensor, &list));
    TRY(dir_make(path));
    TRY(safetensors_write_dir(path, list.spec, list.n, (size_t)1 << 30, fill, pool));
    TRY(dir_list(path, &names, &n_names));
    for (int i = 0; i < n_names; i++) if (strstr(names[i], ".safetensors") && !strstr(names[i], ".json")) files_add(&files, path_join(path, names[i]));
    home.layout = weight_layout_new(params, b->be->act_dtype, 0, 0);
    memory_add(plan, "weights", "the model", &home.device, (size_t)home.layout.total);
    TRY(memory_commit(plan, 0));
    printf("checkpoint  %d of %d layers in bf16, %s in %d files; %d threads\n", config.n_layers, b->all_layers, bench_quantity((double)files.total, "B"), files.n, threads);
    fflush(stdout);
    link = link_seconds(b->be, home.device, (size_t)home.layout.total < LINK ? (size_t)home.layout.total : LINK);
    /* Warm twice a turn: the first plain read after the cold ones had 26 GB/s where later ones had 84 to 94 (an H200's host, 8.2 GB). */
    for (int turn = 0; turn < 3 * TURNS; turn++) {
        bool warm = turn % 3;
        double seconds, start;
        if (!warm) forget(&files);
        if (!warm) cached = fmax(cached, cached_share(&files));
        TRY(plain_read(&files, threads, &seconds));
        plain[warm] = fmin(plain[warm], seconds);
        if (!warm) forget(&files);
        start = now_seconds();
        TRY(tensor_set_open(&set, path));
        TRY(weights_load(params, b->be, &home, set, path, NULL));
        load[warm] = fmin(load[warm], now_seconds() - start);
        if (turn % 3 == 2) {
            char hex[SHA256_HEX];
            start = now_seconds();
            TRY(tensor_set_hash(set, hex));
            hash = fmin(hash, now_seconds() - start);
        }
        tensor_set_close(set);
        set = NULL;
    }
    printf("  cold: after fsync and posix_fadvise(DONTNEED), which left %.1f %% of the bytes in the page cache; the best of %d turns\n", 100 * cached, TURNS);
    if (link > 0) printf("  from pinned memory to the device %s\n", bench_quantity(1 / link, "B/s"));
    for (int warm = 0; warm < 2; warm++) {
        static const char *const figures[] = {"checkpoint load cold", "checkpoint load warm"};
        double bytes = (double)files.total, least = fmax(plain[warm], bytes * link);
        printf("  load %s              %s; plain parallel reads %s: %.1f %% of %s\n", warm ? "warm" : "cold", bench_quantity(bytes / load[warm], "B/s"),
               bench_quantity(bytes / plain[warm], "B/s"), 100 * least / load[warm], link > 0 ? "the slower of these and that copy" : "them");
        bench_figure_more(b, figures[warm], bytes / load[warm], "B/s", "plain_bytes_per_second", bytes / plain[warm], "share_of_limit", least / load[warm]);
    }
    printf("  hashed, as before a dump, warm %s\n", bench_quantity((double)files.total / hash, "B/s"));
    bench_figure(b, "checkpoint hash warm", (double)files.total / hash, "B/s");
out:
    tensor_set_close(set);
    for (int i = 0; i < list.n; i++) free((char *)(void *)(uintptr_t)list.spec[i].name);
    free(list.spec);
    names_free(names, n_names);
    files_free(&files);
    weight_layout_free(&home.layout);
    params_free(params);
    memory_plan_free(plan);
    free(pool);
    free(path);
    return rc;
}

int bench_io(const struct config *c, const char *shape, int n_words, char **words)
{
    struct bench b;
    char *dir = NULL;
    bool made_run_dir = false;
    int rc = OK;
    TRY(bench_open(&b, "io", c, shape));
    TRY(bench_dir_make(c, &dir, &made_run_dir));
    printf("in      %s; per core: per second of CPU time\n", dir);
    for (int kind = 0; kind < SHARD_KIND_COUNT; kind++) {
        const char *name = shard_kind_name((enum shard_kind)kind);
        if (bench_wanted(name, n_words, words)) TRY(bench_shards(&b, dir, (enum shard_kind)kind));
    }
    if (bench_wanted("checkpoint", n_words, words)) TRY(bench_checkpoint(&b, dir));
out:
    bench_dir_remove(c, dir, made_run_dir);
    bench_close(&b);
    return rc;
}
