/* The CPU backend: the table, and memory that is ordinary host memory. Everything is fp32; every op runs to its end before it returns. */
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/host_memory.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/open.h"

static void *cpu_alloc(struct backend *be, size_t bytes)
{
    (void)be;
    void *p = NULL;
    return posix_memalign(&p, 256, bytes ? bytes : 256) ? NULL : p;
}

static void cpu_release(struct backend *be, void *p) { (void)be; free(p); }

static int64_t cpu_available(struct backend *be) { (void)be; return host_memory_available(); }

static void cpu_upload(struct backend *be, void *to, const void *from, size_t bytes) { (void)be; memcpy(to, from, bytes); }
static void cpu_download(struct backend *be, void *to, const void *from, size_t bytes) { (void)be; memcpy(to, from, bytes); }
static void cpu_upload_act(struct backend *be, act *to, const float *from, int64_t count) { (void)be; memcpy(to, from, (size_t)count * sizeof *from); }
static void cpu_download_act(struct backend *be, float *to, const act *from, int64_t count) { (void)be; memcpy(to, from, (size_t)count * sizeof *to); }
static void cpu_download_grad(struct backend *be, float *to, const grad *from, int64_t count) { (void)be; memcpy(to, from, (size_t)count * sizeof *to); }
static void cpu_copy(struct backend *be, void *to, const void *from, size_t bytes) { (void)be; memcpy(to, from, bytes); }
static void cpu_sync(struct backend *be) { (void)be; }

/* Every op has run to its end when it returns, so a mark is a time and nothing is ever waited for. */
struct cpu_state { double *mark; int room; };

static void cpu_mark(struct backend *be, int place)
{
    struct cpu_state *s = be->state;
    struct timespec t;
    if (place >= s->room) {
        s->mark = xrealloc(s->mark, (size_t)(2 * place + 16) * sizeof *s->mark);
        s->room = 2 * place + 16;
    }
    clock_gettime(CLOCK_MONOTONIC, &t);
    s->mark[place] = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void cpu_wait_mark(struct backend *be, int place) { (void)be; (void)place; }
static double cpu_seconds_between(struct backend *be, int i, int j) { const struct cpu_state *s = be->state; return s->mark[j] - s->mark[i]; }
static void cpu_stream_in(struct backend *be, int slot, void *to, const void *from, size_t bytes) { (void)be; (void)slot; memcpy(to, from, bytes); }
static void cpu_stream_ready(struct backend *be, int slot) { (void)be; (void)slot; }
static void cpu_stream_free(struct backend *be, int slot) { (void)be; (void)slot; }

static void cpu_fill_zero(struct backend *be, void *p, size_t bytes)
{
    (void)be;
    enum { BLOCK = 1 << 20 };
    #pragma omp parallel for schedule(static)
    for (size_t b = 0; b < bytes; b += BLOCK) memset((char *)p + b, 0, bytes - b < BLOCK ? bytes - b : BLOCK);
}

static size_t cpu_scratch_bytes(struct backend *be, const struct op_limits *l)
{
    size_t attention = cpu_attention_scratch(l), rows = thread_scratch_bytes(cpu_row_scratch(l->V, l->K)), draws = thread_scratch_bytes(cpu_sample_scratch(l->V)), sums = (size_t)1 << 16;
    size_t most = attention > rows ? attention : rows;
    most = most > draws ? most : draws;
    int64_t widest = l->F > l->C ? l->F : l->C, heads = (int64_t)l->Hq * l->D;
    size_t product = be->exact_rows ? thread_scratch_bytes(cpu_exact_rows_scratch(widest > heads ? widest : heads)) : 0;
    most = most > product ? most : product;
    size_t fp8 = cpu_fp8_scratch(be, l);
    most = most > fp8 ? most : fp8;
    return most > sums ? most : sums;
}

static const struct ops cpu_ops = {
    .alloc = cpu_alloc, .release = cpu_release, .available = cpu_available,
    .upload = cpu_upload, .download = cpu_download, .upload_act = cpu_upload_act, .download_act = cpu_download_act, .download_grad = cpu_download_grad,
    .fill_zero = cpu_fill_zero, .copy = cpu_copy, .sync = cpu_sync, .scratch_bytes = cpu_scratch_bytes,
    .alloc_host = cpu_alloc, .release_host = cpu_release, .download_async = cpu_download, .mark = cpu_mark, .wait_mark = cpu_wait_mark, .seconds_between = cpu_seconds_between,
    .stream_in = cpu_stream_in, .stream_ready = cpu_stream_ready, .stream_free = cpu_stream_free, .random_normal = cpu_random_normal,
    .embed_forward = cpu_embed_forward, .embed_backward = cpu_embed_backward,
    .rmsnorm_forward = cpu_rmsnorm_forward, .rmsnorm_backward = cpu_rmsnorm_backward,
    .qk_norm_forward = cpu_qk_norm_forward, .qk_norm_backward = cpu_qk_norm_backward,
    .rope_forward = cpu_rope_forward, .rope_backward = cpu_rope_backward,
    .attention_forward = cpu_attention_forward, .attention_backward = cpu_attention_backward, .attention_cached = cpu_attention_cached,
    .linear_forward = cpu_linear_forward, .linear_backward_input = cpu_linear_backward_input, .linear_backward_weight = cpu_linear_backward_weight,
    .quantize = cpu_quantize, .quantize_weight = cpu_quantize_weight, .linear_forward_fp8 = cpu_linear_forward_fp8, .linear_backward_weight_fp8 = cpu_linear_backward_weight_fp8, .fp8_count = cpu_fp8_count,
    .swiglu_forward = cpu_swiglu_forward, .swiglu_backward = cpu_swiglu_backward,
    .rmsnorm_forward_fp8 = cpu_rmsnorm_forward_fp8, .rmsnorm_backward_fp8 = cpu_rmsnorm_backward_fp8, .rope_backward_fp8 = cpu_rope_backward_fp8, .swiglu_forward_fp8 = cpu_swiglu_forward_fp8, .swiglu_backward_fp8 = cpu_swiglu_backward_fp8,
    .distill_loss = cpu_distill_loss, .teacher_targets = cpu_teacher_targets, .sample_targets = cpu_sample_targets, .compare_logits = cpu_compare_logits,
    .sum_squares = cpu_sum_squares, .sum_rows = cpu_sum_rows, .adamw = cpu_adamw,
};

int cpu_backend_open(struct backend **out, const struct backend_options *o)
{
    if (o->precision && strcmp(o->precision, "fp32")) return fail(ERR_USAGE, "device cpu: computes in fp32, not in %s; leave the precision out or use device cuda", o->precision);
    if (o->threads > 0) omp_set_num_threads(o->threads);
    struct backend *be = xcalloc(1, sizeof *be);
    *be = (struct backend){.name = "cpu", .act_dtype = DTYPE_F32, .grad_dtype = DTYPE_F32, .moment_dtype = DTYPE_F32, .ops = &cpu_ops, .exact_rows = o->exact_rows, .host_memory = true, .fp8 = true, .fp8_multiple = 1, .state = xcalloc(1, sizeof(struct cpu_state))};
    *out = be;
    return OK;
}

void cpu_backend_close(struct backend *be)
{
    struct cpu_state *s = be->state;
    free(s->mark);
    free(s);
    free(be);
}
