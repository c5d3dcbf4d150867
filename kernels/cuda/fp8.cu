/* Matrices in fp8 (the maths is in cpu/fp8.c): rounding into them, the transposes that the products of linear_fp8.c read, sums and counts. All of it moves bytes and is done when
 * they are moved: every tensor is read once and written once, in 16 bytes or whole lines of 128, but for a weight, whose new rows have to be known before they are written.
 * The arithmetic of rounding is in fp8.cuh. */
#include "kernels/cuda/fp8.cuh"

enum { QUANTIZE_THREADS = 1024, COLUMN_WARPS = 8, COUNT_WARPS = 8, TILE = 128, TILE_WARPS = 8 };

__device__ __forceinline__ void numbers4(float (&x)[4], uint32_t word)
{
    float2 low = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(word & 0xffffu), __NV_E4M3)));
    float2 high = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(word >> 16), __NV_E4M3)));
    x[0] = low.x; x[1] = low.y; x[2] = high.x; x[3] = high.y;
}

/* ---- rounding ---- */

/* a block per row, the row in registers between its maximum and its rounding */
template <typename T, int VPT>
__global__ void __launch_bounds__(QUANTIZE_THREADS) quantize_kernel(uint8_t *__restrict__ q, float *__restrict__ scale, const T *__restrict__ x, int K)
{
    constexpr int W = vector_width<T>();
    int64_t base = (int64_t)blockIdx.x * K;
    packed<T, W> row[VPT];
    uint32_t most = 0;
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int k = (threadIdx.x + v * blockDim.x) * W;
        if (k < K) row[v] = load_packed<T, W>(x + base + k);
    }
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int k = (threadIdx.x + v * blockDim.x) * W;
        if (k < K) most = max(most, largest_of<T, W>(row[v]));
    }
    float factor = factor_of_row(scale + blockIdx.x, most);
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int k = (threadIdx.x + v * blockDim.x) * W;
        if (k < K) store_rounded<T, W>(q + base + k, row[v], factor);
    }
}

/* most[c] = bits of the largest |number| in column c, over rows [blockIdx.y rows, + rows). block (32, COLUMN_WARPS): 32 x 16 columns. Maxima do not depend on their order. */
__global__ void __launch_bounds__(32 * COLUMN_WARPS) column_most_kernel(uint32_t *most, const uint8_t *__restrict__ q, const float *__restrict__ scale, int64_t R, int64_t rows, int64_t K)
{
    __shared__ uint32_t shared[COLUMN_WARPS][16][32];
    int64_t k = ((int64_t)blockIdx.x * 32 + threadIdx.x) * 16, begin = blockIdx.y * rows, end = begin + rows < R ? begin + rows : R;
    uint32_t top[16] = {};
    if (k < K) {
        #pragma unroll 4
        for (int64_t r = begin + threadIdx.y; r < end; r += COLUMN_WARPS) {
            packed<uint8_t, 16> v = load_packed<uint8_t, 16>(q + r * K + k);
            float s = scale[r];
            #pragma unroll
            for (int w = 0; w < 4; w++) {
                float x[4];
                numbers4(x, v.word[w]);
                #pragma unroll
                for (int i = 0; i < 4; i++) top[4 * w + i] = max(top[4 * w + i], magnitude_bits(x[i] * s));
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < 16; i++) shared[threadIdx.y][i][threadIdx.x] = top[i];
    __syncthreads();
    if (k >= K) return;
    #pragma unroll
    for (int i = 0; i < 16 / COLUMN_WARPS; i++) {
        int at = threadIdx.y + i * COLUMN_WARPS;
        uint32_t m = 0;
        #pragma unroll
        for (int w = 0; w < COLUMN_WARPS; w++) m = max(m, shared[w][at][threadIdx.x]);
        atomicMax(&most[k + at], m);
    }
}

/* ---- transposes ---- */

/* What becomes of four bytes of a row at the columns that a thread has: nothing, */
struct unchanged {
    static constexpr bool SCALES = false;
    struct columns {};
    __device__ columns of_columns(int64_t, int64_t) const { return columns(); }
};

/* their scale from their row's to their column's, which is told; most: column_most_kernel's */
struct to_columns {
    static constexpr bool SCALES = true;
    const float *row_scale;
    const uint32_t *most;
    float *column_scale;
    struct columns { float inverse[4]; };
    __device__ float of_row(int64_t r) const { return row_scale[r]; }
    __device__ columns of_columns(int64_t k, int64_t K) const
    {
        columns c = {};
        if (k >= K) return c;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float s = most[k + i] < INFINITY_BITS ? e4m3_scale(__uint_as_float(most[k + i])) : quiet_nan();
            c.inverse[i] = inverse_of(s);
            if (blockIdx.y == 0 && threadIdx.x < 32) column_scale[k + i] = s;
        }
        return c;
    }
    __device__ uint32_t operator()(uint32_t word, float s, const columns &c) const
    {
        float x[4];
        numbers4(x, word);
        #pragma unroll
        for (int i = 0; i < 4; i++) x[i] = x[i] * s * c.inverse[i];
        return round4(x);
    }
};

/* or their scale from their row's, taken times another's, to *one */
struct to_one {
    static constexpr bool SCALES = true;
    const float *scale, *times, *one;
    struct columns {};
    __device__ float of_row(int64_t r) const { return scale[r] * times[r] / *one; }
    __device__ columns of_columns(int64_t, int64_t) const { return columns(); }
    __device__ uint32_t operator()(uint32_t word, float factor, const columns &) const
    {
        float x[4];
        numbers4(x, word);
        #pragma unroll
        for (int i = 0; i < 4; i++) x[i] *= factor;
        return round4(x);
    }
};

/* A thread's words of a tile: four rows, and four more 4 TILE_WARPS further down; `in` is its first. Not WHOLE: 0 from row `rows` on, counted from `in`, and where it has no column. */
template <bool WHOLE, int QUADS> __device__ __forceinline__ void load_quads(uint32_t (&word)[QUADS][4], const uint8_t *__restrict__ in, int64_t K, int rows, bool column)
{
    #pragma unroll
    for (int i = 0; i < QUADS; i++, in += 4 * TILE_WARPS * K) {
        #pragma unroll
        for (int j = 0; j < 4; j++) word[i][j] = WHOLE || (4 * TILE_WARPS * i + j < rows && column) ? *reinterpret_cast<const uint32_t *>(in + j * K) : 0;
    }
}

/* out (K, padded) = in (R, K)^T, its columns R .. padded - 1 zero. A tile of 128 x 128 in shared memory, in words of four rows of one column: a thread turns 4 x 4 bytes in
 * registers. Word w of column c lies at w ^ c / 4, so that a warp that writes, for one w, 32 c / 4, and one that reads, for one w mod 4, eight w / 4 of four c / 4, finds every bank once. */
template <typename Convert>
__global__ void __launch_bounds__(32 * TILE_WARPS) transpose_kernel(uint8_t *__restrict__ out, const uint8_t *__restrict__ in, int64_t R, int64_t K, int64_t padded, Convert convert)
{
    constexpr int QUADS = TILE / 4 / TILE_WARPS;
    __shared__ uint32_t tile[TILE][TILE / 4];
    __shared__ float of_row[TILE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t r0 = (int64_t)blockIdx.y * TILE, k0 = (int64_t)blockIdx.x * TILE, k = k0 + 4 * lane;
    uint32_t word[QUADS][4];
    const uint8_t *from = in + (r0 + 4 * warp) * K + k;
    if (r0 + TILE <= R && k0 + TILE <= K) load_quads<true>(word, from, K, 0, true);       /* nearly all tiles; with of_row below, 459 -> 337 us for the 16,384 x 37,888 of to_one (H200, ncu), and 1 to 4 % of a transpose without scales */
    else load_quads<false>(word, from, K, (int)(R - r0) - 4 * warp, k < K);
    typename Convert::columns columns = convert.of_columns(k, K);
    if constexpr (Convert::SCALES) {                        /* once a row, while its bytes are on their way */
        if (threadIdx.x < TILE) of_row[threadIdx.x] = r0 + threadIdx.x < R ? convert.of_row(r0 + threadIdx.x) : 1;
        __syncthreads();
    }
    #pragma unroll
    for (int i = 0; i < QUADS; i++) {
        if constexpr (Convert::SCALES) {
            #pragma unroll
            for (int j = 0; j < 4; j++) word[i][j] = convert(word[i][j], of_row[4 * (warp + TILE_WARPS * i) + j], columns);
        }
        /* bytes 0 and 1, then 2 and 3, of two rows each; then of four */
        uint32_t low01 = __byte_perm(word[i][0], word[i][1], 0x5140), high01 = __byte_perm(word[i][0], word[i][1], 0x7362);
        uint32_t low23 = __byte_perm(word[i][2], word[i][3], 0x5140), high23 = __byte_perm(word[i][2], word[i][3], 0x7362);
        int place = (warp + TILE_WARPS * i) ^ lane;
        tile[4 * lane][place] = __byte_perm(low01, low23, 0x5410);
        tile[4 * lane + 1][place] = __byte_perm(low01, low23, 0x7632);
        tile[4 * lane + 2][place] = __byte_perm(high01, high23, 0x5410);
        tile[4 * lane + 3][place] = __byte_perm(high01, high23, 0x7632);
    }
    __syncthreads();
    int group = lane % 8;                                   /* of 16 rows */
    #pragma unroll
    for (int i = 0; i < TILE / 4 / TILE_WARPS; i++) {
        int turn = warp + TILE_WARPS * i, column = 16 * (turn / 4) + 4 * (lane / 8) + turn % 4;
        packed<uint8_t, 16> v;
        #pragma unroll
        for (int w = 0; w < 4; w++) v.word[w] = tile[column][(4 * group + w) ^ (column / 4)];
        if (k0 + column < K && r0 + 16 * group < padded) store_packed<uint8_t, 16>(out + (k0 + column) * padded + r0 + 16 * group, v);
    }
}

/* *most = max_n a[n] b[n]; NaN where one of them is not finite */
__global__ void __launch_bounds__(1024) largest_product_kernel(float *most, const float *__restrict__ a, const float *__restrict__ b, int64_t N)
{
    uint32_t top = 0;
    #pragma unroll 4
    for (int64_t n = threadIdx.x; n < N; n += 1024) top = max(top, magnitude_bits(a[n] * b[n]));
    top = block_reduce(top, 0u, max_op());
    if (threadIdx.x == 0) *most = top < INFINITY_BITS ? __uint_as_float(top) : quiet_nan();
}

/* ---- sums and counts ---- */

/* part[blockIdx.y][c] = sum of the numbers of column c over rows [blockIdx.y rows, + rows). block (32, COLUMN_WARPS): 32 x 16 columns */
__global__ void __launch_bounds__(32 * COLUMN_WARPS) fp8_column_sums_kernel(float *part, const uint8_t *__restrict__ q, const float *__restrict__ scale, int64_t N, int64_t rows, int64_t O)
{
    __shared__ float shared[COLUMN_WARPS][16][32];
    int64_t o = ((int64_t)blockIdx.x * 32 + threadIdx.x) * 16, begin = blockIdx.y * rows, end = begin + rows < N ? begin + rows : N;
    float sum[16] = {};
    if (o < O) {
        #pragma unroll 4
        for (int64_t n = begin + threadIdx.y; n < end; n += COLUMN_WARPS) {
            packed<uint8_t, 16> v = load_packed<uint8_t, 16>(q + n * O + o);
            float s = scale[n];
            #pragma unroll
            for (int w = 0; w < 4; w++) {
                float x[4];
                numbers4(x, v.word[w]);
                #pragma unroll
                for (int i = 0; i < 4; i++) sum[4 * w + i] += x[i] * s;
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < 16; i++) shared[threadIdx.y][i][threadIdx.x] = sum[i];
    __syncthreads();
    if (o >= O) return;
    #pragma unroll
    for (int i = 0; i < 16 / COLUMN_WARPS; i++) {
        int at = threadIdx.y + i * COLUMN_WARPS;
        float total = 0;
        #pragma unroll
        for (int w = 0; w < COLUMN_WARPS; w++) total += shared[w][at][threadIdx.x];
        part[blockIdx.y * O + o + at] = total;
    }
}

/* A warp per row. Counts are whole numbers, which atomics add in any order to the same bits. */
__global__ void __launch_bounds__(32 * COUNT_WARPS) fp8_count_kernel(struct fp8_census *sum, const uint8_t *__restrict__ q, const float *__restrict__ scale, int64_t R, int64_t K)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double zeros = 0;
    float not_finite = 0;
    uint32_t largest = 0;
    for (int64_t r = (int64_t)blockIdx.x * COUNT_WARPS + warp; r < R; r += (int64_t)gridDim.x * COUNT_WARPS) {
        uint32_t top = 0;                                   /* of each byte's place */
        int bits = 0;                                       /* eight a zero */
        #pragma unroll 4
        for (int64_t k = 16 * lane; k < K; k += 16 * 32) {
            packed<uint8_t, 16> v = load_packed<uint8_t, 16>(q + r * K + k);
            #pragma unroll
            for (int w = 0; w < 4; w++) {
                uint32_t magnitudes = v.word[w] & 0x7f7f7f7fu;
                top = __vmaxu4(top, magnitudes);
                bits += __popc(__vcmpeq4(magnitudes, 0));
            }
        }
        top = warp_reduce(max(max(top & 0xff, top >> 8 & 0xff), max(top >> 16 & 0xff, top >> 24)), max_op());
        bits = warp_reduce(bits, add_op());
        if (lane) continue;
        float s = scale[r];
        if (magnitude_bits(s) >= INFINITY_BITS || top == E4M3_NAN) { not_finite += 1; continue; }
        zeros += bits / 8;
        largest = max(largest, magnitude_bits(e4m3_to_float((uint8_t)top) * s));
    }
    zeros = block_sum(zeros);
    not_finite = block_sum(not_finite);
    largest = block_reduce(largest, 0u, max_op());
    if (threadIdx.x) return;
    if (blockIdx.x == 0) atomicAdd(&sum->elements, (double)R * (double)K);
    atomicAdd(&sum->zeros, zeros);
    atomicAdd(&sum->not_finite, not_finite);
    atomicMax(reinterpret_cast<unsigned *>(&sum->largest), largest);      /* neither is negative */
}

/* ---- launchers ---- */

template <typename T, int VPT>
static void launch_quantize(struct backend *be, const struct fp8 *y, const act *x, int64_t R, int64_t K)
{
    int threads = (int)div_up(div_up(K / vector_width<T>(), VPT), 32) * 32;
    quantize_kernel<T, VPT><<<(unsigned)R, threads, 0, cuda_state_of(be)->stream>>>(y->q, y->scale, (const T *)x, (int)K);
}

extern "C" void cuda_quantize(struct backend *be, const struct fp8 *y, const act *x, int64_t R, int64_t K)
{
    if (!R) return;
    require_fp8(y, K);
    CUDA_REQUIRE(aligned16(x), "quantize: the input is not aligned to 16 bytes");
    DISPATCH(be->act_dtype, T,
        int64_t vectors = K / vector_width<T>();
        static_assert(8 * QUANTIZE_THREADS * vector_width<T>() * sizeof(T) == CUDA_FP8_WIDEST_BYTES, "the seam says how wide a row may be");
        CUDA_REQUIRE(vectors <= 8 * QUANTIZE_THREADS, "quantize: rows this wide are not implemented");
        if (vectors <= 256) launch_quantize<T, 1>(be, y, x, R, K);
        else if (vectors <= 1024) launch_quantize<T, 2>(be, y, x, R, K);
        else if (vectors <= 4096) launch_quantize<T, 4>(be, y, x, R, K);
        else launch_quantize<T, 8>(be, y, x, R, K));
    CUDA_CHECK(cudaGetLastError());
}

template <typename Convert>
static void transpose(struct backend *be, uint8_t *out, const uint8_t *in, int64_t R, int64_t K, int64_t padded, Convert convert)
{
    transpose_kernel<<<dim3((unsigned)div_up(K, TILE), (unsigned)div_up(padded, TILE)), 32 * TILE_WARPS, 0, cuda_state_of(be)->stream>>>(out, in, R, K, padded, convert);
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_quantize_weight(struct backend *be, const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C)
{
    enum { ROWS = 16 * COLUMN_WARPS };
    cudaStream_t stream = cuda_state_of(be)->stream;
    require_fp8(t8, O);
    cuda_quantize(be, w8, w, O, C);
    uint32_t *most = (uint32_t *)cuda_scratch(be, (size_t)C * sizeof *most);
    CUDA_CHECK(cudaMemsetAsync(most, 0, (size_t)C * sizeof *most, stream));
    column_most_kernel<<<dim3((unsigned)div_up(C, 32 * 16), (unsigned)div_up(O, ROWS)), dim3(32, COLUMN_WARPS), 0, stream>>>(most, w8->q, w8->scale, O, ROWS, C);
    CUDA_CHECK(cudaGetLastError());
    transpose(be, t8->q, w8->q, O, C, O, to_columns{w8->scale, most, t8->scale});
}

extern "C" void cuda_fp8_transpose(struct backend *be, uint8_t *out, const uint8_t *in, int64_t R, int64_t K, int64_t padded) { transpose(be, out, in, R, K, padded, unchanged()); }

extern "C" void cuda_fp8_transpose_folded(struct backend *be, uint8_t *out, float *one, const struct fp8 *in, const float *times, int64_t R, int64_t K, int64_t padded)
{
    largest_product_kernel<<<1, 1024, 0, cuda_state_of(be)->stream>>>(one, in->scale, times, R);
    CUDA_CHECK(cudaGetLastError());
    transpose(be, out, in->q, R, K, padded, to_one{in->scale, times, one});
}

extern "C" void cuda_fp8_column_sums(struct backend *be, grad *dbias, const struct fp8 *dy, int64_t N, int64_t O, float *part)
{
    int64_t rows = cuda_column_sum_rows(N), parts = div_up(N, rows);
    fp8_column_sums_kernel<<<dim3((unsigned)div_up(O, 32 * 16), (unsigned)parts), dim3(32, COLUMN_WARPS), 0, cuda_state_of(be)->stream>>>(part, dy->q, dy->scale, N, rows, O);
    CUDA_CHECK(cudaGetLastError());
    cuda_add_partials(be, dbias, part, parts, O);
}

extern "C" void cuda_fp8_count(struct backend *be, struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K)
{
    if (!R) return;
    require_fp8(x, K);
    int64_t blocks = least(div_up(R, COUNT_WARPS), 8 * (int64_t)cuda_state_of(be)->sms);
    fp8_count_kernel<<<(unsigned)blocks, 32 * COUNT_WARPS, 0, cuda_state_of(be)->stream>>>(sum, x->q, x->scale, R, K);
    CUDA_CHECK(cudaGetLastError());
}
