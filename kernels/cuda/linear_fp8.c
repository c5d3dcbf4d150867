/* Linear layers in fp8, through the products of linear.c. Hopper's units read both factors along the sum, so an operand whose rows are not what is summed over is transposed first:
 *     y^T (O,N) = w (C,O)^T x^T (C,N)                                 row scales of w and x: one for each row and each column of y^T
 *     dw^T (C,O) += s (x^T (N,C))^T (dy^T (N,O)),  the sum over rows  x as it is; dy rounded to one scale s for all of it, which the product takes from device memory
 * N is padded with zeros to a multiple of 16 where it is summed over. */
#include "kernels/cuda/cuda.h"

static int64_t padded_rows(int64_t N) { return (N + CUDA_FP8_MULTIPLE - 1) / CUDA_FP8_MULTIPLE * CUDA_FP8_MULTIPLE; }

/* cuBLASLt's own, x^T, dy^T and their scale */
static size_t backward_scratch(int64_t N, int64_t widths) { return CUDA_PRODUCT_WORKSPACE + (size_t)(padded_rows(N) * widths) + 3 * 256; }

size_t cuda_fp8_scratch(struct backend *be, const struct op_limits *l)
{
    (void)be;
    if (!l->fp8) return 0;
    int64_t qkv = (int64_t)(l->Hq + 2 * l->Hkv) * l->D, out = qkv > 2 * l->F ? qkv : 2 * l->F, widest = out > l->C ? out : l->C;
    size_t columns = (size_t)widest * sizeof(uint32_t);     /* a weight's, while it is transposed */
    size_t products = l->backward ? backward_scratch(l->N, l->C + out) : CUDA_PRODUCT_WORKSPACE;
    size_t sums = l->backward ? cuda_column_sum_scratch(l->N, widest) : 0, most = columns > products ? columns : products;
    return most > sums ? most : sums;
}

static bool aligned(const struct fp8 *a) { return (((uintptr_t)a->q | (uintptr_t)a->scale) & 15) == 0; }

static void require(const struct fp8 *a, const struct fp8 *b, int64_t C, int64_t O)
{
    CUDA_REQUIRE(C % CUDA_FP8_MULTIPLE == 0 && O % CUDA_FP8_MULTIPLE == 0, "fp8: a layer's width is not a multiple of 16");
    CUDA_REQUIRE(aligned(a) && aligned(b), "fp8: a factor or its scales are not aligned to 16 bytes");
}

void cuda_linear_forward_fp8(struct backend *be, act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O)
{
    if (!N) return;
    require(x, w, C, O);
    struct product_args p = {.d = y, .d_type = be->act_dtype, .a = w->q, .b = x->q, .m = O, .n = N, .k = C, .transpose_a = 1, .kind = PRODUCT_FP8_ROWS, .scale_a = w->scale, .scale_b = x->scale};
    if (bias && be->act_dtype == DTYPE_BF16) {              /* the epilogue of these products knows no bias in fp32 */
        p.bias = bias;
        if (cuda_product(be, &p)) return;
        p.bias = NULL;
    }
    cuda_product(be, &p);
    if (bias) cuda_add_rows(be, y, bias, N, O);
}

void cuda_linear_backward_weight_fp8(struct backend *be, grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O)
{
    if (!N) return;
    require(dy, x, C, O);
    int64_t padded = padded_rows(N);
    uint8_t *x_t = (uint8_t *)cuda_scratch(be, backward_scratch(N, C + O)) + CUDA_PRODUCT_WORKSPACE, *dy_t = x_t + cuda_round_up((size_t)(C * padded));
    float *one = (float *)(void *)(dy_t + cuda_round_up((size_t)(O * padded)));
    cuda_fp8_transpose(be, x_t, x->q, N, C, padded);
    cuda_fp8_transpose_folded(be, dy_t, one, dy, x->scale, N, O, padded);
    struct product_args p = {.d = dw, .d_type = be->grad_dtype, .a = x_t, .b = dy_t, .m = C, .n = O, .k = padded, .transpose_a = 1, .accumulate = 1, .kind = PRODUCT_FP8_ONE, .scale_a = one};
    cuda_product(be, &p);
    if (dbias) cuda_fp8_column_sums(be, dbias, dy, N, O, cuda_scratch(be, cuda_column_sum_scratch(N, O)));
}
