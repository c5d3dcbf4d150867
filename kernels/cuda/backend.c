/* The CUDA backend: the table, device memory, and the way of host memory onto the device. One stream carries
 * all ops, in order; a second one brings weights in beside them (stream_in).
 *
 * upload() copies pageable memory into a pinned ring first, so that it returns at once and the caller may reuse its buffer; the ring is
 * two halves, and a half is written again when the copies out of it are done. Memory that is pinned already goes directly: it must
 * stay as it is until the next sync(). */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/open.h"

enum { STAGING_HALF = 32 << 20, OLDEST_CUDNN = 91300 /* 9.11 and 9.12 are wrong in the backward of some wide heads on Hopper */, OLDEST_CUBLASLT_FP8 = 120900 /* scales per row */ };

void cuda_failed(const char *library, const char *reason, const char *expression, const char *file, int line)
{
    fflush(stdout);
    fprintf(stderr, "distill: %s:%d: %s: %s\n    %s\n", file, line, library, reason, expression);
    fflush(stderr);
    abort();
}

void *cuda_scratch(struct backend *be, size_t bytes)
{
    CHECK(be->scratch && be->scratch_bytes >= bytes, "scratch arena of %zu bytes, this op needs %zu: its limits were smaller than its arguments", be->scratch_bytes, bytes);
    return be->scratch;
}

/* ---- memory ---- */

static void *cuda_alloc(struct backend *be, size_t bytes)
{
    (void)be;
    void *p = NULL;
    cudaError_t code = cudaMalloc(&p, bytes ? bytes : 256);
    if (code == cudaErrorMemoryAllocation) { cudaGetLastError(); return NULL; }
    CUDA_CHECK(code);
    return p;
}

static void cuda_release(struct backend *be, void *p) { (void)be; CUDA_CHECK(cudaFree(p)); }

static int64_t cuda_available(struct backend *be)
{
    (void)be;
    size_t free_bytes, total;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    return (int64_t)free_bytes;
}

static void cuda_sync(struct backend *be) { CUDA_CHECK(cudaStreamSynchronize(cuda_state_of(be)->stream)); }

/* Up to `bytes` of the ring, free to write; *got says how many. */
static char *staging_take(struct cuda_state *s, size_t bytes, size_t *got)
{
    if (s->staging_used == STAGING_HALF) {
        s->staging_half ^= 1;
        s->staging_used = 0;
        CUDA_CHECK(cudaEventSynchronize(s->staging_done[s->staging_half]));
    }
    size_t room = STAGING_HALF - s->staging_used;
    *got = bytes < room ? bytes : room;
    char *p = s->staging + (size_t)s->staging_half * STAGING_HALF + s->staging_used;
    s->staging_used += (*got + 255) & ~(size_t)255;
    return p;
}

static void staging_send(struct cuda_state *s, void *to, const char *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s->stream));
    CUDA_CHECK(cudaEventRecord(s->staging_done[s->staging_half], s->stream));
}

static void cuda_upload(struct backend *be, void *to, const void *from, size_t bytes)
{
    struct cuda_state *s = cuda_state_of(be);
    struct cudaPointerAttributes where;
    if (!bytes) return;
    CUDA_CHECK(cudaPointerGetAttributes(&where, from));
    if (where.type != cudaMemoryTypeUnregistered) {
        CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s->stream));
        return;
    }
    for (size_t done = 0, n; done < bytes; done += n) {
        char *p = staging_take(s, bytes - done, &n);
        memcpy(p, (const char *)from + done, n);
        staging_send(s, (char *)to + done, p, n);
    }
}

static void cuda_download(struct backend *be, void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_state_of(be)->stream));
    cuda_sync(be);
}

static void cuda_upload_act(struct backend *be, act *to, const float *from, int64_t count)
{
    struct cuda_state *s = cuda_state_of(be);
    if (be->act_dtype == DTYPE_F32) cuda_upload(be, to, from, (size_t)count * sizeof *from);
    else
        for (size_t done = 0, total = 2 * (size_t)count, n; done < total; done += n) {
            uint16_t *p = (uint16_t *)(void *)staging_take(s, total - done, &n);
            for (size_t i = 0; i < n / 2; i++) p[i] = bf16_from_float(from[done / 2 + i]);
            staging_send(s, (char *)(void *)to + done, (const char *)p, n);
        }
    cuda_sync(be);
}

static void download_as_float(struct backend *be, float *to, const void *from, enum dtype dtype, int64_t count)
{
    struct cuda_state *s = cuda_state_of(be);
    if (dtype == DTYPE_F32) { cuda_download(be, to, from, (size_t)count * sizeof *to); return; }
    cuda_sync(be);                                      /* then the whole ring is free */
    for (size_t done = 0, total = 2 * (size_t)count, n; done < total; done += n) {
        n = total - done < STAGING_HALF ? total - done : STAGING_HALF;
        CUDA_CHECK(cudaMemcpyAsync(s->staging, (const char *)from + done, n, cudaMemcpyDeviceToHost, s->stream));
        cuda_sync(be);
        const uint16_t *p = (const uint16_t *)(const void *)s->staging;
        for (size_t i = 0; i < n / 2; i++) to[done / 2 + i] = bf16_to_float(p[i]);
    }
}

static void cuda_download_act(struct backend *be, float *to, const act *from, int64_t count) { download_as_float(be, to, from, be->act_dtype, count); }
static void cuda_download_grad(struct backend *be, float *to, const grad *from, int64_t count) { download_as_float(be, to, from, be->grad_dtype, count); }

static void cuda_fill_zero(struct backend *be, void *p, size_t bytes) { CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, cuda_state_of(be)->stream)); }

static void cuda_copy(struct backend *be, void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_state_of(be)->stream));
}

static void *cuda_alloc_host(struct backend *be, size_t bytes)
{
    (void)be;
    void *p = NULL;
    cudaError_t code = cudaHostAlloc(&p, bytes ? bytes : 256, cudaHostAllocDefault);
    if (code == cudaErrorMemoryAllocation) { cudaGetLastError(); return NULL; }
    CUDA_CHECK(code);
    return p;
}

static void cuda_release_host(struct backend *be, void *p)
{
    CUDA_CHECK(cudaStreamSynchronize(cuda_state_of(be)->copies));       /* a block that was asked for ahead may still be on its way */
    CUDA_CHECK(cudaFreeHost(p));
}

static void cuda_download_async(struct backend *be, void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_state_of(be)->stream));
}

static void cuda_mark(struct backend *be, int place)
{
    struct cuda_state *s = cuda_state_of(be);
    if (place >= s->n_marks) {                             /* the first few hundred at once: threads wait for marks while others are set */
        int room = place < 256 ? 256 : 2 * place;
        s->marks = xrealloc(s->marks, (size_t)room * sizeof *s->marks);
        for (; s->n_marks < room; s->n_marks++) CUDA_CHECK(cudaEventCreate(&s->marks[s->n_marks]));
    }
    CUDA_CHECK(cudaEventRecord(s->marks[place], s->stream));
}

static void cuda_wait_mark(struct backend *be, int place) { CUDA_CHECK(cudaEventSynchronize(cuda_state_of(be)->marks[place])); }

static double cuda_seconds_between(struct backend *be, int i, int j)
{
    struct cuda_state *s = cuda_state_of(be);
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, s->marks[i], s->marks[j]));
    return 1e-3 * (double)ms;
}

static void cuda_stream_in(struct backend *be, int slot, void *to, const void *from, size_t bytes)
{
    struct cuda_state *s = cuda_state_of(be);
    CUDA_CHECK(cudaStreamWaitEvent(s->copies, s->slot_free[slot], 0));
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s->copies));
    CUDA_CHECK(cudaEventRecord(s->slot_arrived[slot], s->copies));
}

static void cuda_stream_ready(struct backend *be, int slot) { CUDA_CHECK(cudaStreamWaitEvent(cuda_state_of(be)->stream, cuda_state_of(be)->slot_arrived[slot], 0)); }
static void cuda_stream_free(struct backend *be, int slot) { CUDA_CHECK(cudaEventRecord(cuda_state_of(be)->slot_free[slot], cuda_state_of(be)->stream)); }

static size_t cuda_scratch_bytes(struct backend *be, const struct op_limits *l)
{
    size_t need[] = {cuda_embed_scratch(be, l), cuda_rmsnorm_scratch(be, l), cuda_qk_norm_scratch(be, l), cuda_attention_scratch(be, l),
                     cuda_linear_scratch(be, l), cuda_fp8_scratch(be, l), cuda_reduce_scratch(be, l), cuda_teacher_targets_scratch(be, l)}, most = 0;
    for (size_t i = 0; i < sizeof need / sizeof *need; i++) most = need[i] > most ? need[i] : most;
    return cuda_round_up(most);
}

static const struct ops cuda_ops = {
    .alloc = cuda_alloc, .release = cuda_release, .available = cuda_available,
    .upload = cuda_upload, .download = cuda_download, .upload_act = cuda_upload_act, .download_act = cuda_download_act, .download_grad = cuda_download_grad,
    .fill_zero = cuda_fill_zero, .copy = cuda_copy, .sync = cuda_sync, .scratch_bytes = cuda_scratch_bytes,
    .alloc_host = cuda_alloc_host, .release_host = cuda_release_host, .download_async = cuda_download_async, .mark = cuda_mark, .wait_mark = cuda_wait_mark,
    .seconds_between = cuda_seconds_between, .stream_in = cuda_stream_in, .stream_ready = cuda_stream_ready, .stream_free = cuda_stream_free, .random_normal = cuda_random_normal,
    .embed_forward = cuda_embed_forward, .embed_backward = cuda_embed_backward,
    .rmsnorm_forward = cuda_rmsnorm_forward, .rmsnorm_backward = cuda_rmsnorm_backward,
    .qk_norm_forward = cuda_qk_norm_forward, .qk_norm_backward = cuda_qk_norm_backward,
    .rope_forward = cuda_rope_forward, .rope_backward = cuda_rope_backward,
    .attention_forward = cuda_attention_forward, .attention_backward = cuda_attention_backward, .attention_cached = cuda_attention_cached,
    .linear_forward = cuda_linear_forward, .linear_backward_input = cuda_linear_backward_input, .linear_backward_weight = cuda_linear_backward_weight,
    .quantize = cuda_quantize, .quantize_weight = cuda_quantize_weight, .linear_forward_fp8 = cuda_linear_forward_fp8, .linear_backward_weight_fp8 = cuda_linear_backward_weight_fp8,
    .fp8_count = cuda_fp8_count,
    .swiglu_forward = cuda_swiglu_forward, .swiglu_backward = cuda_swiglu_backward,
    .rmsnorm_forward_fp8 = cuda_rmsnorm_forward_fp8, .rmsnorm_backward_fp8 = cuda_rmsnorm_backward_fp8, .rope_backward_fp8 = cuda_rope_backward_fp8, .swiglu_forward_fp8 = cuda_swiglu_forward_fp8, .swiglu_backward_fp8 = cuda_swiglu_backward_fp8,
    .distill_loss = cuda_distill_loss, .teacher_targets = cuda_teacher_targets, .sample_targets = cuda_sample_targets, .compare_logits = cuda_compare_logits,
    .sum_squares = cuda_sum_squares, .sum_rows = cuda_sum_rows, .adamw = cuda_adamw,
};

/* ---- open, close ---- */

static int choose_types(struct backend *be, const struct backend_options *o)
{
    const char *precision = o->precision ? o->precision : "bf16", *recipe = o->recipe ? o->recipe : "compact";
    if (!strcmp(precision, "fp32")) { be->act_dtype = be->grad_dtype = be->moment_dtype = DTYPE_F32; return OK; }
    if (strcmp(precision, "bf16")) return fail(ERR_USAGE, "device cuda: unknown precision \"%s\"; known: bf16, fp32", precision);
    if (strcmp(recipe, "compact") && strcmp(recipe, "exact")) return fail(ERR_USAGE, "device cuda: unknown recipe \"%s\"; known: compact, exact", recipe);
    be->act_dtype = DTYPE_BF16;
    be->master = !strcmp(recipe, "exact");
    be->grad_dtype = be->moment_dtype = be->master ? DTYPE_F32 : DTYPE_BF16;
    return OK;
}

int cuda_backend_open(struct backend **out, const struct backend_options *o)
{
    int rc = OK, devices = 0;
    struct cuda_state *s = xcalloc(1, sizeof *s);
    struct backend *be = xcalloc(1, sizeof *be);
    *be = (struct backend){.name = "cuda", .ops = &cuda_ops, .fp8_multiple = CUDA_FP8_MULTIPLE, .widest_head = CUDA_WIDEST_HEAD, .widest_norm = CUDA_WIDEST_NORM, .state = s, .description = s->description};
    TRY(choose_types(be, o));
    s->deterministic = o->deterministic;
    cudaError_t code = cudaGetDeviceCount(&devices);
    if (code != cudaSuccess || !devices) {
        rc = fail(ERR_USAGE, "device cuda: no usable GPU here (%s); use device cpu", code != cudaSuccess ? cudaGetErrorString(code) : "no device");
        goto out;
    }
    struct cudaDeviceProp card;
    CUDA_CHECK(cudaGetDevice(&s->device));
    CUDA_CHECK(cudaGetDeviceProperties(&card, s->device));
    if (card.major != 9 || card.minor != 0) {
        rc = fail(ERR_USAGE, "device cuda: %s has compute capability %d.%d and this build is for 9.0 (H100, H200); use device cpu", card.name, card.major, card.minor);
        goto out;
    }
    if (cudnnGetVersion() < OLDEST_CUDNN) {
        rc = fail(ERR_USAGE, "device cuda: cuDNN %zu is too old for packed attention; install 9.13 or newer", cudnnGetVersion());
        goto out;
    }
    be->fp8 = cublasLtGetVersion() >= OLDEST_CUBLASLT_FP8;
    be->fp8_widest = CUDA_FP8_WIDEST_BYTES / (int64_t)dtype_width(be->act_dtype);
    s->sms = card.multiProcessorCount;
    CUDA_CHECK(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&s->copies, cudaStreamNonBlocking));
    for (int i = 0; i < STREAM_SLOTS; i++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&s->slot_arrived[i], cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&s->slot_free[i], cudaEventDisableTiming));
    }
    CUBLAS_CHECK(cublasLtCreate(&s->blas));
    CUDNN_CHECK(cudnnCreate(&s->dnn));
    CUDNN_CHECK(cudnnSetStream(s->dnn, s->stream));
    for (int i = 0; i < 2; i++) CUDA_CHECK(cudaEventCreateWithFlags(&s->staging_done[i], cudaEventDisableTiming));
    if (cudaHostAlloc((void **)&s->staging, 2 * (size_t)STAGING_HALF, cudaHostAllocDefault) != cudaSuccess) {
        rc = fail(ERR_IO, "device cuda: no %d MiB of host memory to pin; free some or raise the locked-memory limit", 2 * STAGING_HALF >> 20);
        goto out;
    }
    int runtime = 0;
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    size_t version = cudnnGetVersion();
    snprintf(s->description, sizeof s->description, "%s, CUDA %d.%d, cuBLASLt %zu, cuDNN %zu.%zu.%zu", card.name, runtime / 1000, runtime % 1000 / 10,
             cublasLtGetVersion(), version / 10000, version / 100 % 100, version % 100);
    *out = be;
    be = NULL;
out:
    cuda_backend_close(be);
    return rc;
}

void cuda_backend_close(struct backend *be)
{
    if (!be) return;
    struct cuda_state *s = cuda_state_of(be);
    if (s->stream) cudaStreamSynchronize(s->stream);
    if (s->copies) cudaStreamSynchronize(s->copies);
    cuda_attention_close(s);
    cuda_linear_close(s);
    if (s->dnn) cudnnDestroy(s->dnn);
    if (s->blas) cublasLtDestroy(s->blas);
    for (int i = 0; i < 2; i++) if (s->staging_done[i]) cudaEventDestroy(s->staging_done[i]);
    for (int i = 0; i < STREAM_SLOTS; i++) {
        if (s->slot_arrived[i]) cudaEventDestroy(s->slot_arrived[i]);
        if (s->slot_free[i]) cudaEventDestroy(s->slot_free[i]);
    }
    for (int i = 0; i < s->n_marks; i++) cudaEventDestroy(s->marks[i]);
    free(s->marks);
    if (s->staging) cudaFreeHost(s->staging);
    if (s->copies) cudaStreamDestroy(s->copies);
    if (s->stream) cudaStreamDestroy(s->stream);
    free(s);
    free(be);
}
