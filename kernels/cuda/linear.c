/* Linear layers through cuBLASLt. Row-major products seen as column-major ones of the transposes:
 *     y^T (O,N) = w (C,O)^T x^T (C,N) + bias      dx^T (C,N) = w^T (C,O) dy^T (O,N)      dw^T (C,O) += x^T (C,N) dy (N,O)
 * bf16 inputs accumulate in fp32; fp32 stays fp32 (no TF32), so that tests are tight. A shape's algorithm is asked for once and
 * kept; dw is added to in the gradient's own type by beta = 1, the bias rides in the product's epilogue, or, for odd shapes that no
 * algorithm with that epilogue takes, is written first and added to. The bias gradient is a sum over rows of its own
 * (reduce.cu): cuBLASLt's epilogue for it overwrites where we accumulate. */
#include <string.h>

#include "base/error.h"
#include "kernels/cuda/cuda.h"

enum { WORKSPACE = CUDA_PRODUCT_WORKSPACE, CANDIDATES = 8 };

/* Sums of fp8 products stay in the matrix units' own registers, which keep fewer bits than fp32, for the whole of k: 4 to 23 % faster than moving them into fp32 every few
 * instructions (cuBLASLt by itself at the 7B shape, sustained on an H200). Each term already carries the rounding of its factors, 2^-4, beside which what is lost there is small; not so in a weight's gradient, which is
 * one long sum over the tokens of a pass, and goes on to be added to others like it. */
static const int8_t FAST_SUMS[] = {[PRODUCT_PLAIN] = 0, [PRODUCT_FP8_ROWS] = 1, [PRODUCT_FP8_ONE] = 0};

struct product_key {
    int64_t m, n, k;
    int transpose_a, transpose_b, beta, has_bias, a_type, d_type, kind;
    int unused;                                     /* keys are compared as bytes: no padding */
    int align_a, align_b, align_d, align_bias;      /* bytes, at most 256: part of what an algorithm may assume */
};

struct product_plan {
    struct product_key key;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    bool usable;                                    /* false: no algorithm takes this shape */
};

static cudaDataType_t cuda_type(enum dtype d) { return d == DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF; }

static int alignment(const void *p)
{
    uintptr_t low = (uintptr_t)p & -(uintptr_t)p;
    return !low || low > 256 ? 256 : (int)low;
}

static void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t name, const void *value, size_t bytes)
{
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(product, name, value, bytes));
}

/* Which of the heuristic's candidates: the first, but for large products the first whose tiles are 256 x 128 or 128 x 256. The heuristic ranks by speed at full
 * clock, where they are equal; an H200 that multiplies for longer than a second is limited by its power, and there the squarest large tiles, which read
 * least per product, sustained 1 to 4 % more than the first candidate wherever that was another one (ten products of the 7B and 72B shapes, one run each). */
static int choose(const cublasLtMatmulHeuristicResult_t *found, int count, const struct product_key *key)
{
    enum { LARGE_TILE = 256 * 128, WAVES = 4, MULTIPROCESSORS = 132 };
    int first = count;
    for (int i = count - 1; i >= 0; i--) if (found[i].state == CUBLAS_STATUS_SUCCESS && found[i].workspaceSize <= WORKSPACE) first = i;
    if (key->a_type != CUDA_R_16BF || key->m * key->n < (int64_t)LARGE_TILE * WAVES * MULTIPROCESSORS) return first;
    for (int i = first; i < count; i++) {
        uint32_t tile = CUBLASLT_MATMUL_TILE_UNDEFINED;
        size_t written;
        if (found[i].state != CUBLAS_STATUS_SUCCESS || found[i].workspaceSize > WORKSPACE) continue;
        cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile, &written);
        if (tile == CUBLASLT_MATMUL_TILE_256x128 || tile == CUBLASLT_MATMUL_TILE_128x256) return i;
    }
    return first;
}

/* what may change from call to call; cuBLASLt wants to see it when it is asked for an algorithm too */
static void set_pointers(cublasLtMatmulDesc_t product, const struct product_args *p)
{
    if (p->bias) set(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    if (p->kind != PRODUCT_PLAIN) set(product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &p->scale_a, sizeof p->scale_a);
    if (p->kind == PRODUCT_FP8_ROWS) set(product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &p->scale_b, sizeof p->scale_b);
}

static struct product_plan *plan_new(struct cuda_state *s, const struct product_key *key, const struct product_args *args)
{
    struct product_plan p = {.key = *key};
    cublasOperation_t op_a = key->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = key->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    if (key->has_bias) {
        cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        cudaDataType_t type = key->d_type;
        set(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        set(p.product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type);
    }
    if (key->kind != PRODUCT_PLAIN) {
        int32_t mode = key->kind == PRODUCT_FP8_ROWS ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
        set(p.product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode);
        set(p.product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode);
        set(p.product, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &FAST_SUMS[key->kind], sizeof FAST_SUMS[key->kind]);
    }
    set_pointers(p.product, args);
    int64_t a_rows = key->transpose_a ? key->k : key->m, a_columns = key->transpose_a ? key->m : key->k;
    int64_t b_rows = key->transpose_b ? key->n : key->k, b_columns = key->transpose_b ? key->k : key->n;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&p.a, key->a_type, (uint64_t)a_rows, (uint64_t)a_columns, a_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&p.b, key->a_type, (uint64_t)b_rows, (uint64_t)b_columns, b_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&p.d, key->d_type, (uint64_t)key->m, (uint64_t)key->n, key->m));

    cublasLtMatmulPreference_t preference;
    size_t workspace = WORKSPACE;
    uint32_t align_a = (uint32_t)key->align_a, align_b = (uint32_t)key->align_b, align_d = (uint32_t)key->align_d;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_d, sizeof align_d));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_d, sizeof align_d));
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    int count = 0, use;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(s->blas, p.product, p.a, p.b, p.d, p.d, preference, CANDIDATES, found, &count);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) count = 0;
    else CUBLAS_CHECK(status);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    use = choose(found, count, key);
    p.usable = use < count;
    if (p.usable) p.algorithm = found[use].algo;

    if ((s->n_products & (s->n_products - 1)) == 0) s->products = xrealloc(s->products, (size_t)(s->n_products ? 2 * s->n_products : 1) * sizeof *s->products);
    s->products[s->n_products] = p;
    return &s->products[s->n_products++];
}

bool cuda_product(struct backend *be, const struct product_args *args)
{
    struct cuda_state *s = cuda_state_of(be);
    struct product_key key;
    memset(&key, 0, sizeof key);                   /* compared as bytes */
    key.m = args->m; key.n = args->n; key.k = args->k;
    key.transpose_a = args->transpose_a; key.transpose_b = args->transpose_b; key.beta = args->accumulate; key.has_bias = args->bias != NULL; key.kind = (int)args->kind;
    key.a_type = args->kind == PRODUCT_PLAIN ? cuda_type(be->act_dtype) : CUDA_R_8F_E4M3; key.d_type = cuda_type(args->d_type);
    key.align_a = alignment(args->a); key.align_b = alignment(args->b); key.align_d = alignment(args->d); key.align_bias = alignment(args->bias);
    struct product_plan *p = NULL;
    for (int i = 0; i < s->n_products && !p; i++) if (!memcmp(&s->products[i].key, &key, sizeof key)) p = &s->products[i];
    if (!p) p = plan_new(s, &key, args);
    if (!p->usable && args->bias) return false;
    CHECK(p->usable, "cuBLASLt knows no algorithm for a product%s of %lld x %lld x %lld", args->kind == PRODUCT_PLAIN ? "" : " in fp8", (long long)args->m, (long long)args->n, (long long)args->k);
    set_pointers(p->product, args);
    float one = 1, beta = args->accumulate ? 1 : 0;
    CUBLAS_CHECK(cublasLtMatmul(s->blas, p->product, &one, args->a, p->a, args->b, p->b, &beta, args->d, p->d, args->d, p->d, &p->algorithm, cuda_scratch(be, WORKSPACE), WORKSPACE, s->stream));
    return true;
}

/* a and b have the activations' type */
static bool product(struct backend *be, void *d, enum dtype d_type, const void *a, const void *b, const void *bias, int64_t m, int64_t n, int64_t k,
                    int transpose_a, int transpose_b, int accumulate)
{
    return cuda_product(be, &(struct product_args){.d = d, .d_type = d_type, .a = a, .b = b, .bias = bias, .m = m, .n = n, .k = k, .transpose_a = transpose_a, .transpose_b = transpose_b,
                                                   .accumulate = accumulate, .kind = PRODUCT_PLAIN});
}

size_t cuda_linear_scratch(struct backend *be, const struct op_limits *l)
{
    (void)be;
    int64_t widest = l->C > 2 * l->F ? l->C : 2 * l->F, qkv = (int64_t)(l->Hq + 2 * l->Hkv) * l->D;
    size_t sums = cuda_column_sum_scratch(l->N, widest > qkv ? widest : qkv);
    return sums > WORKSPACE ? sums : WORKSPACE;
}

void cuda_linear_close(struct cuda_state *s)
{
    for (int i = 0; i < s->n_products; i++) {
        cublasLtMatmulDescDestroy(s->products[i].product);
        cublasLtMatrixLayoutDestroy(s->products[i].a);
        cublasLtMatrixLayoutDestroy(s->products[i].b);
        cublasLtMatrixLayoutDestroy(s->products[i].d);
    }
    free(s->products);
}

void cuda_linear_forward(struct backend *be, act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O)
{
    if (!N) return;
    if (product(be, y, be->act_dtype, w, x, bias, O, N, C, 1, 0, 0)) return;
    cuda_fill_rows(be, y, bias, N, O);
    product(be, y, be->act_dtype, w, x, NULL, O, N, C, 1, 0, 1);
}

void cuda_linear_backward_input(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O)
{
    if (!N) return;
    product(be, dx, be->act_dtype, w, dy, NULL, C, N, O, 0, 0, 0);
}

void cuda_linear_backward_weight(struct backend *be, grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O)
{
    if (!N) return;
    product(be, dw, be->grad_dtype, x, dy, NULL, C, O, N, 0, 1, 1);
    if (dbias) cuda_column_sums(be, dbias, dy, N, O, cuda_scratch(be, cuda_column_sum_scratch(N, O)));
}
