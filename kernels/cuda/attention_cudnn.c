/* bf16 attention through cuDNN's graph API, documents packed end to end. A plan is a graph of operations that cuDNN's engine recognises
 * as flash attention; the order of the operations is part of the pattern. Forward and backward read as the maths of
 * cpu/attention.c from top to bottom. Plans are made on first use and kept; lengths and offsets are device data, so that one plan
 * serves every batch whose document count and longest document round up to the same powers of two.
 *
 * Packed layout: a tensor is (slots, heads, longest, D) with token stride `row` and a ragged tensor of element offsets doc_begin * row;
 * unused slots have length 0. A gradient must have its input's layout and ragged tensor, scratch that of its gradient: otherwise cuDNN
 * accepts the graph and computes something else. Planes of q, k and v keep that scratch at N Hq D elements.
 *
 * The backward's sum over keys, dq, is in whatever order its blocks finish: two runs over a document of several tiles may differ in the last bit. cuDNN has no attribute
 * against that; a graph whose last product writes dq directly is deterministic and takes slots Hq longest^2 bf16 of workspace (1 GiB for one document of
 * 4096 at 32 heads), which is not built here: a deterministic backend takes the plain kernels of attention.cu for backward. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "kernels/cuda/cuda.h"

enum { WORKSPACE = 64 << 20, MOST_DESCRIPTORS = 192, MOST_OPERATIONS = 48, MOST_ENGINES = 8 };

enum uid { Q = 1, K, V, O, STATS, D_O, DQ, DK, DV, ROW_SUM, DQ_ACC, DK_FULL, DV_FULL, LENGTH, SCALE, ONE, NO_PAD, NO_FUTURE, NO_PAST, WINDOW,
           RAGGED, FIRST_VIRTUAL = RAGGED + ATTENTION_WIDTHS };

typedef cudnnBackendDescriptor_t descriptor;

struct plan_key { int64_t backward, slots, longest, Hq, Hkv, D, windowed, too_far; };

struct attention_plan {
    struct plan_key key;
    descriptor made[MOST_DESCRIPTORS];      /* everything the plan may still refer to */
    int n_made;
    descriptor plan;                        /* NULL: cuDNN has none for this shape */
    int64_t workspace, width[ATTENTION_WIDTHS];  /* row widths of the ragged tensors RAGGED, RAGGED + 1, ... */
    int widths;
};

/* ---- building a graph ---- */

struct graph {
    struct attention_plan *p;
    descriptor operation[MOST_OPERATIONS], ragged[ATTENTION_WIDTHS], length;
    int operations;
    int64_t next_virtual, b, s;
    cudnnStatus_t status;                   /* of the first call that failed; nothing is done after it */
};

static bool ok(struct graph *g, cudnnStatus_t status)
{
    if (g->status == CUDNN_STATUS_SUCCESS) g->status = status;
    return g->status == CUDNN_STATUS_SUCCESS;
}

static descriptor make(struct graph *g, cudnnBackendDescriptorType_t type)
{
    descriptor d = NULL;
    CHECK(g->p->n_made < MOST_DESCRIPTORS, "cuDNN graph: more than %d descriptors", MOST_DESCRIPTORS);
    if (g->status == CUDNN_STATUS_SUCCESS && ok(g, cudnnBackendCreateDescriptor(type, &d))) g->p->made[g->p->n_made++] = d;
    return d;
}

static void put(struct graph *g, descriptor d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count, const void *values)
{
    if (g->status == CUDNN_STATUS_SUCCESS) ok(g, cudnnBackendSetAttribute(d, name, type, count, values));
}

static void put_descriptor(struct graph *g, descriptor d, cudnnBackendAttributeName_t name, descriptor value)
{
    put(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static descriptor finish(struct graph *g, descriptor d)
{
    if (g->status == CUDNN_STATUS_SUCCESS) ok(g, cudnnBackendFinalize(d));
    return d;
}

static descriptor tensor(struct graph *g, int64_t uid, cudnnDataType_t type, const int64_t dims[4], const int64_t strides[4], descriptor ragged, bool by_value)
{
    descriptor d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    int64_t alignment = 16;
    bool is_virtual = uid >= FIRST_VIRTUAL;
    put(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
    put(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    put(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims);
    put(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides);
    put(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    put(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    if (by_value) put(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
    if (ragged) put_descriptor(g, d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, ragged);
    return finish(g, d);
}

/* an intermediate result (b, h, rows, columns), contiguous */
static descriptor inner(struct graph *g, cudnnDataType_t type, int64_t h, int64_t rows, int64_t columns)
{
    return tensor(g, g->next_virtual++, type, (int64_t[]){g->b, h, rows, columns}, (int64_t[]){h * rows * columns, rows * columns, columns, 1}, NULL, false);
}

/* its transpose over the last two dimensions */
static descriptor inner_transposed(struct graph *g, cudnnDataType_t type, int64_t h, int64_t rows, int64_t columns)
{
    return tensor(g, g->next_virtual++, type, (int64_t[]){g->b, h, rows, columns}, (int64_t[]){h * rows * columns, rows * columns, 1, rows}, NULL, false);
}

static descriptor scalar(struct graph *g, enum uid uid) { return tensor(g, uid, CUDNN_DATA_FLOAT, (int64_t[]){1, 1, 1, 1}, (int64_t[]){1, 1, 1, 1}, NULL, true); }

static descriptor per_document(struct graph *g, int64_t uid, int64_t n) { return tensor(g, uid, CUDNN_DATA_INT32, (int64_t[]){n, 1, 1, 1}, (int64_t[]){1, 1, 1, 1}, NULL, false); }

/* the ragged tensor of rows `width` elements wide: one per width */
static descriptor ragged(struct graph *g, int64_t width)
{
    struct attention_plan *p = g->p;
    for (int i = 0; i < p->widths; i++) if (p->width[i] == width) return g->ragged[i];
    CHECK(p->widths < ATTENTION_WIDTHS, "cuDNN graph: more than %d row widths", ATTENTION_WIDTHS);
    g->ragged[p->widths] = per_document(g, RAGGED + p->widths, g->b + 1);
    p->width[p->widths] = width;
    return g->ragged[p->widths++];
}

/* packed (documents, h, tokens, D), a token every `row` elements; multiple: strides of a scratch tensor that shares a narrower tensor's offsets */
static descriptor packed(struct graph *g, int64_t uid, cudnnDataType_t type, int64_t h, int64_t D, int64_t row, int64_t multiple)
{
    return tensor(g, uid, type, (int64_t[]){g->b, h, g->s, D}, (int64_t[]){g->s * row * multiple, D, row * multiple, 1}, ragged(g, row), false);
}

static descriptor packed_transposed(struct graph *g, int64_t uid, int64_t h, int64_t D, int64_t row)
{
    return tensor(g, uid, CUDNN_DATA_BFLOAT16, (int64_t[]){g->b, h, D, g->s}, (int64_t[]){g->s * row, D, 1, row}, ragged(g, row), false);
}

static void add(struct graph *g, descriptor operation)
{
    CHECK(g->operations < MOST_OPERATIONS, "cuDNN graph: more than %d operations", MOST_OPERATIONS);
    g->operation[g->operations++] = finish(g, operation);
}

/* y = mode(x, b, choose); b and choose may be NULL; axis of GEN_INDEX, else -1 */
static descriptor pointwise(struct graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t precision, int64_t axis, descriptor y, descriptor x, descriptor b, descriptor choose)
{
    descriptor how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR), op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    put(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    put(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &precision);
    if (axis >= 0) put(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, finish(g, how));
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (b) put_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    if (choose) put_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, choose);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    add(g, op);
    return y;
}

static descriptor arithmetic(struct graph *g, cudnnPointwiseMode_t mode, descriptor y, descriptor x, descriptor b) { return pointwise(g, mode, CUDNN_DATA_FLOAT, -1, y, x, b, NULL); }

/* c = a b; which of M, N, K are the document's length rather than s */
enum { OVER_M = 1, OVER_N = 2, OVER_K = 4 };
static descriptor matmul(struct graph *g, descriptor c, descriptor a, descriptor b, int over)
{
    descriptor how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR), op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    cudnnDataType_t precision = CUDNN_DATA_FLOAT;
    put(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &precision);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, finish(g, how));
    if (over & OVER_M) put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, g->length);
    if (over & OVER_N) put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, g->length);
    if (over & OVER_K) put_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, g->length);
    add(g, op);
    return c;
}

static descriptor reduction(struct graph *g, cudnnReduceTensorOp_t kind, descriptor y, descriptor x)
{
    descriptor how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR), op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    cudnnDataType_t precision = CUDNN_DATA_FLOAT;
    put(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &kind);
    put(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &precision);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, finish(g, how));
    add(g, op);
    return y;
}

static descriptor reshape(struct graph *g, descriptor y, descriptor x)
{
    descriptor op = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    put_descriptor(g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    add(g, op);
    return y;
}

/* s where keep(row index, column index), -infinity elsewhere. The masks differ in the precision of the indices, as the engines expect them. */
static descriptor index_of(struct graph *g, descriptor s, int64_t h, int64_t axis, cudnnDataType_t precision)
{
    return pointwise(g, CUDNN_POINTWISE_GEN_INDEX, precision, axis, inner(g, CUDNN_DATA_INT32, h, g->s, g->s), s, NULL, NULL);
}

static descriptor compare(struct graph *g, cudnnPointwiseMode_t mode, int64_t h, descriptor a, descriptor b)
{
    return pointwise(g, mode, CUDNN_DATA_BOOLEAN, -1, inner(g, CUDNN_DATA_BOOLEAN, h, g->s, g->s), a, b, NULL);
}

static descriptor choose(struct graph *g, int64_t h, descriptor s, descriptor keep, enum uid minus_infinity)
{
    return pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1, inner(g, CUDNN_DATA_FLOAT, h, g->s, g->s), s, scalar(g, minus_infinity), keep);
}

static descriptor mask_padding(struct graph *g, descriptor s, int64_t h)
{
    descriptor row = index_of(g, s, h, 2, CUDNN_DATA_INT32), column = index_of(g, s, h, 3, CUDNN_DATA_INT32);
    descriptor row_in = compare(g, CUDNN_POINTWISE_CMP_LT, h, row, g->length), column_in = compare(g, CUDNN_POINTWISE_CMP_LT, h, column, g->length);
    return choose(g, h, s, compare(g, CUDNN_POINTWISE_LOGICAL_AND, h, row_in, column_in), NO_PAD);
}

/* column <= row, and column + window > row where there is a window */
static descriptor mask_band(struct graph *g, descriptor s, int64_t h, bool windowed)
{
    descriptor row = index_of(g, s, h, 2, CUDNN_DATA_FLOAT), column = index_of(g, s, h, 3, CUDNN_DATA_FLOAT);
    s = choose(g, h, s, compare(g, CUDNN_POINTWISE_CMP_GE, h, row, column), NO_FUTURE);
    if (!windowed) return s;
    row = index_of(g, s, h, 2, CUDNN_DATA_FLOAT);
    column = index_of(g, s, h, 3, CUDNN_DATA_FLOAT);
    column = arithmetic(g, CUDNN_POINTWISE_ADD, inner(g, CUDNN_DATA_FLOAT, h, g->s, g->s), column, scalar(g, WINDOW));
    return choose(g, h, s, compare(g, CUDNN_POINTWISE_CMP_GT, h, column, row), NO_PAST);
}

static void build_forward(struct graph *g, int64_t Hq, int64_t Hkv, int64_t D, bool windowed)
{
    int64_t q_row = Hq * D, kv_row = Hkv * D, s = g->s;
    cudnnDataType_t bf16 = CUDNN_DATA_BFLOAT16, fp32 = CUDNN_DATA_FLOAT;
    descriptor q = packed(g, Q, bf16, Hq, D, q_row, 1), k_t = packed_transposed(g, K, Hkv, D, kv_row), v = packed(g, V, bf16, Hkv, D, kv_row, 1);
    descriptor o = packed(g, O, bf16, Hq, D, q_row, 1), stats = packed(g, STATS, fp32, Hq, 1, Hq, 1);

    descriptor x = matmul(g, inner(g, fp32, Hq, s, s), q, k_t, OVER_M | OVER_N);
    x = arithmetic(g, CUDNN_POINTWISE_MUL, inner(g, fp32, Hq, s, s), x, scalar(g, SCALE));
    x = mask_padding(g, x, Hq);
    x = mask_band(g, x, Hq, windowed);
    descriptor top = reduction(g, CUDNN_REDUCE_TENSOR_MAX, inner(g, fp32, Hq, s, 1), x);
    x = arithmetic(g, CUDNN_POINTWISE_SUB, inner(g, fp32, Hq, s, s), x, top);
    x = arithmetic(g, CUDNN_POINTWISE_EXP, inner(g, fp32, Hq, s, s), x, NULL);
    descriptor sum = reduction(g, CUDNN_REDUCE_TENSOR_ADD, inner(g, fp32, Hq, s, 1), x);
    descriptor log_sum = arithmetic(g, CUDNN_POINTWISE_LOG, inner(g, fp32, Hq, s, 1), sum, NULL);
    arithmetic(g, CUDNN_POINTWISE_ADD, stats, top, log_sum);
    descriptor p = arithmetic(g, CUDNN_POINTWISE_DIV, inner(g, bf16, Hq, s, s), x, sum);
    matmul(g, o, p, v, OVER_M | OVER_K);
}

static void build_backward(struct graph *g, int64_t Hq, int64_t Hkv, int64_t D, bool windowed)
{
    int64_t q_row = Hq * D, kv_row = Hkv * D, group = Hq / Hkv, s = g->s;
    cudnnDataType_t bf16 = CUDNN_DATA_BFLOAT16, fp32 = CUDNN_DATA_FLOAT;
    descriptor q = packed(g, Q, bf16, Hq, D, q_row, 1), k_t = packed_transposed(g, K, Hkv, D, kv_row), v_t = packed_transposed(g, V, Hkv, D, kv_row);
    descriptor o = packed(g, O, bf16, Hq, D, q_row, 1), d_o = packed(g, D_O, bf16, Hq, D, q_row, 1), stats = packed(g, STATS, fp32, Hq, 1, Hq, 1);
    descriptor dq = packed(g, DQ, bf16, Hq, D, q_row, 1), dk = packed(g, DK, bf16, Hkv, D, kv_row, 1), dv = packed(g, DV, bf16, Hkv, D, kv_row, 1);
    descriptor scale = scalar(g, SCALE);

    /* do o, a row's sum of p dp */
    descriptor product = tensor(g, g->next_virtual++, fp32, (int64_t[]){g->b, Hq, s, D}, (int64_t[]){Hq * s * D, s * D, Hq * D, 1}, NULL, false);
    descriptor row_sum = reduction(g, CUDNN_REDUCE_TENSOR_ADD, inner(g, fp32, Hq, s, 1), arithmetic(g, CUDNN_POINTWISE_MUL, product, d_o, o));
    row_sum = arithmetic(g, CUDNN_POINTWISE_MUL, packed(g, ROW_SUM, fp32, Hq, 1, Hq, 1), row_sum, scalar(g, ONE));

    /* p, from the scores and their log-sum-exp */
    descriptor x = matmul(g, inner(g, fp32, Hq, s, s), q, k_t, OVER_M | OVER_N);
    x = arithmetic(g, CUDNN_POINTWISE_MUL, inner(g, fp32, Hq, s, s), x, scale);
    x = mask_padding(g, x, Hq);
    x = arithmetic(g, CUDNN_POINTWISE_SUB, inner(g, fp32, Hq, s, s), x, stats);
    x = mask_band(g, x, Hq, windowed);
    descriptor p = arithmetic(g, CUDNN_POINTWISE_EXP, inner(g, fp32, Hq, s, s), x, NULL);

    /* dv = p^T do */
    descriptor p_t = reshape(g, inner_transposed(g, bf16, Hq, s, s), p);
    if (group == 1) matmul(g, dv, p_t, d_o, OVER_M | OVER_K);
    else reduction(g, CUDNN_REDUCE_TENSOR_ADD, dv, matmul(g, packed(g, DV_FULL, bf16, Hq, D, kv_row, group), p_t, d_o, OVER_M | OVER_K));

    /* ds = p (do v^T - row_sum) scale */
    x = matmul(g, inner(g, fp32, Hq, s, s), d_o, v_t, OVER_M | OVER_N);
    x = arithmetic(g, CUDNN_POINTWISE_SUB, inner(g, fp32, Hq, s, s), x, row_sum);
    x = arithmetic(g, CUDNN_POINTWISE_MUL, inner(g, fp32, Hq, s, s), x, p);
    descriptor ds = arithmetic(g, CUDNN_POINTWISE_MUL, inner(g, fp32, Hq, s, s), x, scale);

    /* dk = ds^T q */
    descriptor ds_t = reshape(g, inner_transposed(g, bf16, Hq, s, s), ds);
    if (group == 1) matmul(g, dk, ds_t, q, OVER_M | OVER_K);
    else reduction(g, CUDNN_REDUCE_TENSOR_ADD, dk, matmul(g, packed(g, DK_FULL, bf16, Hq, D, kv_row, group), ds_t, q, OVER_M | OVER_K));

    /* dq = ds k, summed in fp32 */
    descriptor k = reshape(g, packed(g, g->next_virtual++, fp32, Hkv, D, kv_row, 1), k_t);
    descriptor dq_acc = matmul(g, packed(g, DQ_ACC, fp32, Hq, D, q_row, 1), ds, k, OVER_M | OVER_K);
    arithmetic(g, CUDNN_POINTWISE_IDENTITY, dq, dq_acc, NULL);
}

/* ---- plans ---- */

static int64_t power_of_two(int64_t x, int64_t least)
{
    int64_t p = least;
    while (p < x) p *= 2;
    return p;
}

/* The first engine of the heuristic's list that can be made and fits the workspace. */
static void choose_engine(struct graph *g, cudnnHandle_t handle)
{
    descriptor whole = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR), heuristic = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), engine[MOST_ENGINES];
    cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t found = 0;
    put(g, whole, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->operations, g->operation);
    put(g, whole, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finish(g, whole);
    put_descriptor(g, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, whole);
    put(g, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    finish(g, heuristic);
    for (int i = 0; i < MOST_ENGINES; i++) engine[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (g->status == CUDNN_STATUS_SUCCESS)
        ok(g, cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, MOST_ENGINES, &found, engine));
    if (g->status != CUDNN_STATUS_SUCCESS) return;
    for (int64_t i = 0; i < found && i < MOST_ENGINES && !g->p->plan; i++) {
        descriptor plan = make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        put(g, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
        put_descriptor(g, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engine[i]);
        int64_t workspace = 0, count = 0;
        if (g->status == CUDNN_STATUS_SUCCESS && cudnnBackendFinalize(plan) == CUDNN_STATUS_SUCCESS
            && cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, &workspace) == CUDNN_STATUS_SUCCESS && workspace <= WORKSPACE) {
            g->p->plan = plan;
            g->p->workspace = workspace;
        }
    }
}

/* The plan for these arguments, made if it is new; NULL where there is none. */
static struct attention_plan *plan_for(struct backend *be, const struct attention_args *a, bool backward)
{
    struct cuda_state *st = cuda_state_of(be);
    if (a->D % 16 || a->D > 256) return NULL;                   /* packed backward is wrong at other multiples of 8; 256 is Hopper's limit */
    bool too_far = a->N * a->Hq * a->D > INT32_MAX;             /* documents begin at offsets of 32 bits */
    struct plan_key key = {backward, power_of_two(a->n_docs, 1), power_of_two(a->max_doc, 64), a->Hq, a->Hkv, a->D, a->window > 0, too_far};
    for (int i = 0; i < st->n_attentions; i++) {
        struct attention_plan *p = &st->attentions[i];
        if (!memcmp(&p->key, &key, sizeof key)) return p->plan ? p : NULL;
    }
    st->attentions = xrealloc(st->attentions, (size_t)(st->n_attentions + 1) * sizeof *st->attentions);
    struct attention_plan *p = &st->attentions[st->n_attentions++];
    *p = (struct attention_plan){.key = key};
    if (too_far) {
        warn("%lld positions of %lld query heads of width %lld in one pass are more numbers than cuDNN's packed attention counts to (2^31 - 1): plain attention, which is slow, is used instead; put fewer rows into a pass",
             (long long)a->N, (long long)a->Hq, (long long)a->D);
        return NULL;
    }
    struct graph g = {.p = p, .next_virtual = FIRST_VIRTUAL, .b = key.slots, .s = key.longest, .status = CUDNN_STATUS_SUCCESS};
    g.length = per_document(&g, LENGTH, g.b);
    (backward ? build_backward : build_forward)(&g, a->Hq, a->Hkv, a->D, a->window > 0);
    choose_engine(&g, st->dnn);
    if (p->plan) return p;
    char reason[256] = "";
    cudnnGetLastErrorString(reason, sizeof reason);
    warn("cuDNN has no %s plan for %lld query heads, %lld key heads of width %lld (%s): plain attention, which is slow, is used instead",
         backward ? "backward" : "forward", (long long)key.Hq, (long long)key.Hkv, (long long)key.D, reason);
    return NULL;
}

void cuda_attention_close(struct cuda_state *s)
{
    for (int i = 0; i < s->n_attentions; i++)
        for (int d = s->attentions[i].n_made - 1; d >= 0; d--) cudnnBackendDestroyDescriptor(s->attentions[i].made[d]);
    free(s->attentions);
}

/* ---- running ---- */

struct bindings { int64_t uid[32]; void *pointer[32]; int n; };

static void bind(struct bindings *b, int64_t uid, const void *p)
{
    b->uid[b->n] = uid;
    b->pointer[b->n++] = (void *)(uintptr_t)p;
}

static void run(struct cuda_state *st, const struct attention_plan *p, const struct bindings *b, void *workspace)
{
    descriptor pack;
    CUDNN_CHECK(cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack));
    CUDNN_CHECK(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, b->n, b->uid));
    CUDNN_CHECK(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, b->n, b->pointer));
    CUDNN_CHECK(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace));
    CUDNN_CHECK(cudnnBackendFinalize(pack));
    CUDNN_CHECK(cudnnBackendExecute(st->dnn, p->plan, pack));
    CUDNN_CHECK(cudnnBackendDestroyDescriptor(pack));
}

static void *take(char **at, size_t bytes)
{
    void *p = *at;
    *at += cuda_round_up(bytes);
    return p;
}

/* The arena from its start: workspace, lengths and offsets, filled; the rest from *at on is the caller's. */
static void *prepare(struct backend *be, const struct attention_plan *p, const struct attention_args *a, struct bindings *b, size_t more, char **at)
{
    size_t slots = (size_t)p->key.slots, list = cuda_round_up((slots + 1) * sizeof(int32_t));
    *at = cuda_scratch(be, cuda_round_up((size_t)p->workspace) + (size_t)(1 + p->widths) * list + more);
    void *workspace = take(at, (size_t)p->workspace);
    struct attention_offsets to = {.length = take(at, list), .widths = p->widths};
    for (int i = 0; i < p->widths; i++) {
        to.offset[i] = take(at, list);
        to.width[i] = p->width[i];
        bind(b, RAGGED + i, to.offset[i]);
    }
    bind(b, LENGTH, to.length);
    cuda_attention_fill_offsets(be, &to, a->doc_begin, a->n_docs, p->key.slots);
    return workspace;
}

/* Scalars are read from host memory when the plan runs. */
struct scalars { float scale, one, minus_infinity, window; };

static void bind_scalars(struct bindings *b, const struct scalars *v, bool backward, bool windowed)
{
    bind(b, SCALE, &v->scale);
    bind(b, NO_PAD, &v->minus_infinity);
    bind(b, NO_FUTURE, &v->minus_infinity);
    if (backward) bind(b, ONE, &v->one);
    if (!windowed) return;
    bind(b, NO_PAST, &v->minus_infinity);
    bind(b, WINDOW, &v->window);
}

size_t cuda_attention_cudnn_scratch(const struct op_limits *l)
{
    size_t N = (size_t)l->N, q = N * (size_t)l->Hq * (size_t)l->D, lists = (1 + ATTENTION_WIDTHS) * (2 * N + 2) * sizeof(int32_t);
    size_t backward = N * (size_t)l->Hq * sizeof(float) + q * (sizeof(float) + 2 * sizeof(uint16_t));
    return WORKSPACE + lists + (l->backward ? backward : 0) + 16 * 256;
}

bool cuda_attention_cudnn_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a)
{
    struct attention_plan *p = plan_for(be, a, false);
    if (!p) return false;
    struct bindings b = {.n = 0};
    struct scalars s = {a->scale, 1, -INFINITY, (float)a->window};
    char *at;
    void *workspace = prepare(be, p, a, &b, 0, &at);
    bind_scalars(&b, &s, false, a->window > 0);
    bind(&b, Q, q); bind(&b, K, k); bind(&b, V, v);
    bind(&b, O, o); bind(&b, STATS, lse);
    run(cuda_state_of(be), p, &b, workspace);
    return true;
}

bool cuda_attention_cudnn_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                                   const struct attention_args *a)
{
    if (cuda_state_of(be)->deterministic) return false;         /* dq is added up with atomics */
    struct attention_plan *p = plan_for(be, a, true);
    if (!p) return false;
    struct bindings b = {.n = 0};
    struct scalars s = {a->scale, 1, -INFINITY, (float)a->window};
    size_t heads = (size_t)(a->N * a->Hq), q_bytes = heads * (size_t)a->D * sizeof(uint16_t);
    char *at;
    void *workspace = prepare(be, p, a, &b, cuda_round_up(heads * sizeof(float)) + cuda_round_up(2 * q_bytes) + 2 * cuda_round_up(q_bytes), &at);
    bind_scalars(&b, &s, true, a->window > 0);
    bind(&b, Q, q); bind(&b, K, k); bind(&b, V, v);
    bind(&b, O, o); bind(&b, D_O, d_o); bind(&b, STATS, lse);
    bind(&b, DQ, dq); bind(&b, DK, dk); bind(&b, DV, dv);
    bind(&b, ROW_SUM, take(&at, heads * sizeof(float)));
    bind(&b, DQ_ACC, take(&at, 2 * q_bytes));
    if (a->Hq != a->Hkv) {
        bind(&b, DK_FULL, take(&at, q_bytes));
        bind(&b, DV_FULL, take(&at, q_bytes));
    }
    run(cuda_state_of(be), p, &b, workspace);
    return true;
}
