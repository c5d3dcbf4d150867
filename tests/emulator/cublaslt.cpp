/* cuBLASLt, as far as linear.c and linear_fp8.c call it: descriptors are kept as they were set, held to what NVIDIA documents for Hopper, and
 * interpreted: types, transposes, leading dimensions, scales, bias. The product is a sum in double. What is not documented as supported the heuristic
 * refuses, as the library does; what breaks the rules between heuristic and call (another problem, a worse alignment, a workspace that is too small)
 * is refused with a sentence.
 *
 * DISTILL_EMULATE_REFUSE, a list of words: "bias" no epilogue with a bias (else none where m is odd, so that both ways are taken); "row-scales" no
 * scales of rows but with bf16 results. DISTILL_EMULATE_VERBOSE=1: why the heuristic refuses. */
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "tests/emulator/parts.h"

namespace
{

enum { A, B, C, D, MATRICES };
enum {
    WORKSPACE_BYTES = 1 << 20,
    BEST_ALIGNMENT = 256,
    TOO_GREEDY = 0 /* the heuristic's first answer wants more workspace than is allowed: it may not be taken */
};

struct description {
    cublasComputeType_t compute;
    cudaDataType_t scale_type;
    cublasOperation_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    int32_t bias_type = -1, scale_mode_a = 0, scale_mode_b = 0;
    const void *bias = nullptr, *scale_a = nullptr, *scale_b = nullptr;
    int8_t fast_accumulation = 0;
};
struct layout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t leading;
};
struct preference {
    size_t workspace = 0;
    uint32_t alignment[MATRICES] = {BEST_ALIGNMENT, BEST_ALIGNMENT, BEST_ALIGNMENT, BEST_ALIGNMENT};
};

/* What an algorithm was asked for, and what it may be used for; of integers alone, without padding, so that memcmp compares them */
struct problem {
    int64_t m, n, k, leading[3];
    int32_t type[3], transpose_a, transpose_b, epilogue, bias_type, scale_mode_a, scale_mode_b, fast_accumulation;
    uint32_t alignment[MATRICES];
};
std::vector<problem> problems; /* an algorithm's first word is an index + 1, its second the place in the heuristic's list */

/* The handles are opaque pointers: ours */
description &of(cublasLtMatmulDesc_t d) { return *(description *)(void *)d; }
layout &of(cublasLtMatrixLayout_t l) { return *(layout *)(void *)l; }
preference &of(cublasLtMatmulPreference_t p) { return *(preference *)(void *)p; }

cublasStatus_t refused(const std::string &why)
{
    fprintf(stderr, "emulator: cuBLASLt: %s\n", why.c_str());
    return CUBLAS_STATUS_INVALID_VALUE;
}

bool told_to_refuse(const char *word) { return strstr(emulator::setting("DISTILL_EMULATE_REFUSE", ""), word); }
int64_t width_of(cudaDataType_t t) { return t == CUDA_R_32F ? 4 : t == CUDA_R_16BF || t == CUDA_R_16F ? 2 : 1; }
bool is_fp8(cudaDataType_t t) { return t == CUDA_R_8F_E4M3 || t == CUDA_R_8F_E5M2; }
uint32_t alignment_of(const void *p)
{
    uintptr_t at = (uintptr_t)p | BEST_ALIGNMENT;
    return (uint32_t)(at & -at); /* its lowest bit */
}
int bias_type_of(const description &d, const layout &a, const layout &out)
{
    if (d.bias_type != -1) return d.bias_type;
    return is_fp8(a.type) && out.type == CUDA_R_32F ? CUDA_R_16BF : out.type;
}

/* The documentation of cublasLtMatmul(), "To use FP8 kernels, the following set of requirements must be satisfied", and of the scale modes */
const char *unsupported_in_fp8(const description &d, const layout &a, const layout &b, const layout &out, const preference &p)
{
    if (d.transpose_a != CUBLAS_OP_T || d.transpose_b != CUBLAS_OP_N) return "fp8: A has to be transposed, B not";
    if (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2) return "fp8: A and B may not both be e5m2";
    if (*std::min_element(p.alignment, p.alignment + MATRICES) < 16) return "fp8: matrices are aligned to 16 bytes";
    if (a.leading % 16 || b.leading % 16 || out.leading * width_of(out.type) % 16) return "fp8: leading dimensions are multiples of 16 bytes";
    if (a.rows % 16 || out.rows % 16) return "fp8: k and m are multiples of 16";
    if (out.type != CUDA_R_16BF && out.type != CUDA_R_16F && out.type != CUDA_R_32F) return "fp8: the result's type";
    if (d.epilogue == CUBLASLT_EPILOGUE_BIAS && bias_type_of(d, a, out) != (out.type == CUDA_R_16F ? CUDA_R_16F : CUDA_R_16BF))
        return "fp8: a bias is bf16, or fp16 with fp16 results";
    if (d.scale_mode_a != d.scale_mode_b) return "fp8: A and B have scales of different modes";
    bool rows = d.scale_mode_a == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if (!rows && d.scale_mode_a != CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F) return "fp8: the mode of the scales";
    if (rows && (!d.scale_a || !d.scale_b)) return "fp8: scales of rows without pointers to them";
    if (rows && out.type != CUDA_R_16BF && told_to_refuse("row-scales")) return "fp8: scales of rows with a result that is not bf16 (told to refuse)";
    if (((uintptr_t)d.scale_a | (uintptr_t)d.scale_b) % (rows ? 16 : 4)) return "fp8: the alignment of scales";
    return nullptr;
}

/* Why there is no algorithm; NULL: there is one */
const char *unsupported(const description &d, const layout &a, const layout &b, const layout &c, const layout &out, const preference &p)
{
    bool bias = d.epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (d.compute != CUBLAS_COMPUTE_32F || d.scale_type != CUDA_R_32F) return "computes in anything but fp32";
    if (c.type != out.type || c.rows != out.rows || c.columns != out.columns || c.leading != out.leading) return "C and D differ";
    if (a.leading < (int64_t)a.rows || b.leading < (int64_t)b.rows || out.leading < (int64_t)out.rows) return "a leading dimension below the rows";
    if (!bias && d.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return "an epilogue that is not emulated";
    if (!p.workspace) return "no workspace";
    if (is_fp8(a.type) || is_fp8(b.type)) {
        if (const char *why = unsupported_in_fp8(d, a, b, out, p)) return why;
    } else {
        bool fp32 = a.type == CUDA_R_32F && b.type == CUDA_R_32F && out.type == CUDA_R_32F;
        bool bf16 = a.type == CUDA_R_16BF && b.type == CUDA_R_16BF && (out.type == CUDA_R_16BF || out.type == CUDA_R_32F);
        if (!fp32 && !bf16) return "these types together";
        if (d.scale_mode_a || d.scale_mode_b || d.scale_a || d.scale_b) return "scales of what is not fp8";
        if (bias && bias_type_of(d, a, out) != out.type) return "a bias of another type than the result";
    }
    if (bias && (out.rows % 2 || told_to_refuse("bias"))) return "a bias with this shape (the emulator's choice)";
    return nullptr;
}

/* false: the matrices do not fit each other */
bool state(problem &q, const description &d, const layout &a, const layout &b, const layout &out)
{
    memset(&q, 0, sizeof q);
    q.m = (int64_t)out.rows;
    q.n = (int64_t)out.columns;
    q.k = (int64_t)(d.transpose_a ? a.rows : a.columns);
    if ((int64_t)(d.transpose_a ? a.columns : a.rows) != q.m || (int64_t)(d.transpose_b ? b.rows : b.columns) != q.n ||
        (int64_t)(d.transpose_b ? b.columns : b.rows) != q.k)
        return false;
    const layout *all[] = {&a, &b, &out};
    for (int i = 0; i < 3; i++) q.type[i] = all[i]->type, q.leading[i] = all[i]->leading;
    q.transpose_a = d.transpose_a;
    q.transpose_b = d.transpose_b;
    q.epilogue = d.epilogue;
    q.bias_type = d.bias_type;
    q.scale_mode_a = d.scale_mode_a;
    q.scale_mode_b = d.scale_mode_b;
    q.fast_accumulation = d.fast_accumulation;
    return true;
}

double number(const void *p, int64_t i, int type)
{
    switch (type) {
    case CUDA_R_32F: return ((const float *)p)[i];
    case CUDA_R_16BF: return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    case CUDA_R_16F: return __half2float(((const __half *)p)[i]);
    default: return __half2float(__half(__nv_cvt_fp8_to_halfraw(((const uint8_t *)p)[i], type == CUDA_R_8F_E4M3 ? __NV_E4M3 : __NV_E5M2)));
    }
}

void store(void *p, int64_t i, int type, double x)
{
    if (type == CUDA_R_32F) ((float *)p)[i] = (float)x;
    else if (type == CUDA_R_16BF) ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn((float)x);
    else ((__half *)p)[i] = __float2half_rn((float)x);
}

/* out (m, n) = alpha op(a) op(b) scales + beta out + bias, column-major */
void multiply(const problem &q, const description &d, float alpha, float beta, const void *a, const void *b, void *out, int bias_type)
{
    bool rows = d.scale_mode_a == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    std::vector<double> x((size_t)(q.m * q.k)), y((size_t)(q.n * q.k)); /* both along the sum */
    for (int64_t i = 0; i < q.m; i++)
        for (int64_t k = 0; k < q.k; k++)
            x[(size_t)(i * q.k + k)] = number(a, q.transpose_a ? i * q.leading[A] + k : k * q.leading[A] + i, q.type[A]);
    for (int64_t j = 0; j < q.n; j++)
        for (int64_t k = 0; k < q.k; k++)
            y[(size_t)(j * q.k + k)] = number(b, q.transpose_b ? k * q.leading[B] + j : j * q.leading[B] + k, q.type[B]);
    for (int64_t j = 0; j < q.n; j++)
        for (int64_t i = 0; i < q.m; i++) {
            int64_t at = j * q.leading[2] + i;
            double sum = 0;
            for (int64_t k = 0; k < q.k; k++) sum += x[(size_t)(i * q.k + k)] * y[(size_t)(j * q.k + k)];
            sum *= alpha;
            if (d.scale_a) sum *= (double)((const float *)d.scale_a)[rows ? i : 0];
            if (d.scale_b) sum *= (double)((const float *)d.scale_b)[rows ? j : 0];
            if (beta != 0) sum += (double)beta * number(out, at, q.type[2]);
            if (d.epilogue == CUBLASLT_EPILOGUE_BIAS) sum += number(d.bias, i, bias_type);
            store(out, at, q.type[2], sum);
        }
}

} // namespace

extern "C" {

size_t cublasLtGetVersion(void) { return 130100; }
const char *cublasLtGetStatusString(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_SUCCESS ? "success" : s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "refused by the emulator";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { return *h = (cublasLtHandle_t)malloc(1), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return free(h), CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType_t scale_type)
{
    description *made = new description;
    made->compute = compute;
    made->scale_type = scale_type;
    *d = (cublasLtMatmulDesc_t)(void *)made;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return delete &of(d), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle, cublasLtMatmulDescAttributes_t name, const void *value, size_t bytes)
{
    description &d = of(handle);
    const struct {
        cublasLtMatmulDescAttributes_t name;
        void *to;
        size_t bytes;
    } known[] = {
        {CUBLASLT_MATMUL_DESC_TRANSA, &d.transpose_a, sizeof d.transpose_a},
        {CUBLASLT_MATMUL_DESC_TRANSB, &d.transpose_b, sizeof d.transpose_b},
        {CUBLASLT_MATMUL_DESC_EPILOGUE, &d.epilogue, sizeof d.epilogue},
        {CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &d.bias_type, sizeof d.bias_type},
        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, &d.bias, sizeof d.bias},
        {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &d.scale_a, sizeof d.scale_a},
        {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &d.scale_b, sizeof d.scale_b},
        {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &d.scale_mode_a, sizeof d.scale_mode_a},
        {CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &d.scale_mode_b, sizeof d.scale_mode_b},
        {CUBLASLT_MATMUL_DESC_FAST_ACCUM, &d.fast_accumulation, sizeof d.fast_accumulation},
    };
    for (auto &k : known) {
        if (k.name != name) continue;
        if (bytes != k.bytes)
            return refused("attribute " + std::to_string(name) + " has " + std::to_string(k.bytes) + " bytes, not " + std::to_string(bytes));
        memcpy(k.to, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    return refused("attribute " + std::to_string(name) + " is not emulated");
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t leading)
{
    *l = (cublasLtMatrixLayout_t)(void *)new layout{type, rows, columns, leading};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return delete &of(l), CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p)
{
    return *p = (cublasLtMatmulPreference_t)(void *)new preference, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return delete &of(p), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle, cublasLtMatmulPreferenceAttributes_t name, const void *value,
                                                    size_t bytes)
{
    preference &p = of(handle);
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    void *to = name == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? (void *)&p.workspace : nullptr;
    for (int i = 0; i < MATRICES; i++)
        if (name == alignments[i]) to = &p.alignment[i];
    if (!to || bytes != (to == &p.workspace ? sizeof p.workspace : sizeof *p.alignment))
        return refused("preference " + std::to_string(name) + " is not emulated, or of another size");
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out, cublasLtMatmulPreference_t preferred, int most,
                                              cublasLtMatmulHeuristicResult_t found[], int *count)
{
    preference &p = of(preferred);
    problem q;
    *count = 0;
    if (!state(q, of(d), of(a), of(b), of(out))) return refused("the matrices do not fit each other");
    if (const char *why = unsupported(of(d), of(a), of(b), of(c), of(out), p)) {
        if (*emulator::setting("DISTILL_EMULATE_VERBOSE", ""))
            fprintf(stderr, "emulator: cuBLASLt: no algorithm for m %lld, n %lld, k %lld, types %d and %d: %s\n", (long long)q.m, (long long)q.n,
                    (long long)q.k, q.type[A], q.type[2], why);
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    memcpy(q.alignment, p.alignment, sizeof q.alignment);
    problems.push_back(q);
    for (; *count < most && *count < 3; ++*count) {
        cublasLtMatmulHeuristicResult_t &result = found[*count];
        memset(&result, 0, sizeof result);
        result.algo.data[0] = problems.size();
        result.algo.data[1] = (uint64_t)*count;
        result.workspaceSize = *count == TOO_GREEDY ? p.workspace + 1 : (size_t)WORKSPACE_BYTES;
        result.state = CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algorithm, cublasLtMatmulAlgoConfigAttributes_t name, void *value,
                                                    size_t bytes, size_t *written)
{
    cublasLtMatmulTile_t tile = algorithm->data[1] == 2 ? CUBLASLT_MATMUL_TILE_128x256 : CUBLASLT_MATMUL_TILE_64x64;
    if (name != CUBLASLT_ALGO_CONFIG_TILE_ID || bytes != sizeof tile)
        return refused("attribute " + std::to_string(name) + " of an algorithm is not emulated");
    memcpy(value, &tile, sizeof tile);
    *written = sizeof tile;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t described, const void *alpha, const void *a, cublasLtMatrixLayout_t la,
                              const void *b, cublasLtMatrixLayout_t lb, const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *out,
                              cublasLtMatrixLayout_t lout, const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes,
                              cudaStream_t)
{
    const description &d = of(described);
    problem q, &asked_for = problems.at(algorithm->data[0] - 1);
    preference actual;
    const void *matrix[MATRICES] = {a, b, c, out};
    actual.workspace = workspace_bytes;
    if (!state(q, d, of(la), of(lb), of(lout))) return refused("the matrices do not fit each other");
    for (int i = 0; i < MATRICES; i++) {
        actual.alignment[i] = alignment_of(matrix[i]);
        if (actual.alignment[i] < asked_for.alignment[i])
            return refused("a matrix is aligned to " + std::to_string(actual.alignment[i]) + " bytes, its algorithm was asked for with " +
                           std::to_string(asked_for.alignment[i]));
    }
    memcpy(q.alignment, asked_for.alignment, sizeof q.alignment);
    if (memcmp(&q, &asked_for, sizeof q)) return refused("this is not the problem that the algorithm was asked for");
    if (const char *why = unsupported(d, of(la), of(lb), of(lc), of(lout), actual)) return refused(why);
    if (c != out) return refused("C is not D");
    if (algorithm->data[1] == TOO_GREEDY || workspace_bytes < WORKSPACE_BYTES || alignment_of(workspace) < BEST_ALIGNMENT)
        return refused("a workspace that this algorithm cannot take");
    memset(workspace, 0xff, WORKSPACE_BYTES); /* it is the library's to write */
    multiply(q, d, *(const float *)alpha, *(const float *)beta, a, b, out, bias_type_of(d, of(la), of(lout)));
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
