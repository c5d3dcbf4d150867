/* Draws from the teacher's distribution (kernels/draw.h; cpu/sample_targets.c is the specification, and the draws are its draws). A block per row,
 * three reads of it, the second and third from the cache: the largest logit outside the head; the weights of every tile by a warp, then their
 * running sums; and for every draw, by a warp, its tile and in it its id. Integers throughout: no order of summation matters. */
#include "kernels/cuda/common.cuh"
#include "kernels/draw.h"

enum { THREADS = 256, WARPS = THREADS / 32, PER_LANE = DRAW_TILE / 32 };

/* The lane's ids of a tile: weights into w, their sum returned. */
template <typename T>
__device__ __forceinline__ uint64_t lane_weights(uint64_t (&w)[PER_LANE], const T *row, const uint32_t *head, int64_t begin, int64_t Vv, float top, float inv_T)
{
    uint64_t sum = 0;
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int64_t j = begin + i;
        bool out = j >= Vv || (head[j >> 5] >> (j & 31) & 1);
        w[i] = out ? 0 : draw_weight(to_float(row[j]), top, inv_T);
        sum += w[i];
    }
    return sum;
}

__device__ __forceinline__ uint64_t warp_scan(uint64_t x)                       /* inclusive */
{
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        uint64_t below = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) sample_targets_kernel(const sample_targets s, const T *__restrict__ logits, float inv_T, int64_t V, int64_t Vv)
{
    extern __shared__ uint64_t tile_end[];
    __shared__ int drawn[DRAW_MOST], sorted[DRAW_MOST];
    int tiles = (int)div_up(Vv, DRAW_TILE), lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = s.draws, words = (int)div_up(Vv, 32);
    uint32_t *head = (uint32_t *)(tile_end + tiles);                            /* a bit per id */
    int64_t n = blockIdx.x, first = s.first + n;
    const T *row = logits + n * V;
    uint64_t w[PER_LANE];

    for (int i = threadIdx.x; i < words; i += THREADS) head[i] = 0;
    __syncthreads();
    for (int k = threadIdx.x; k < s.K; k += THREADS) {
        int id = s.head_ids[n * s.K + k];
        atomicOr(&head[id >> 5], 1u << (id & 31));
    }
    __syncthreads();
    float top = -CUDART_INF_F;
    for (int64_t j = threadIdx.x; j < Vv; j += THREADS)
        if (!(head[j >> 5] >> (j & 31) & 1)) top = fmaxf(top, to_float(row[j]));
    top = block_max(top);
    for (int tile = warp; tile < tiles; tile += WARPS) {
        uint64_t sum = warp_reduce(lane_weights(w, row, head, (int64_t)tile * DRAW_TILE + lane * PER_LANE, Vv, top, inv_T), add_op());
        if (lane == 0) tile_end[tile] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        uint64_t before = 0;
        for (int begin = 0; begin < tiles; begin += 32) {
            uint64_t end = before + warp_scan(begin + lane < tiles ? tile_end[begin + lane] : 0);
            if (begin + lane < tiles) tile_end[begin + lane] = end;
            before = __shfl_sync(0xffffffffu, end, 31);
        }
    }
    __syncthreads();
    uint64_t total = tile_end[tiles - 1];
    if (total == 0) D = 0;                                                      /* the head holds everything */
    for (int d = warp; d < D; d += WARPS) {
        uint64_t at = draw_target(s.seed, first / s.row_length, first % s.row_length, d, total);
        int low = 0, high = tiles - 1;                                          /* the first tile that ends behind it */
        while (low < high) {
            int middle = (low + high) / 2;
            if (tile_end[middle] > at) high = middle; else low = middle + 1;
        }
        int64_t begin = (int64_t)low * DRAW_TILE + lane * PER_LANE;
        uint64_t sum = lane_weights(w, row, head, begin, Vv, top, inv_T), end = (low ? tile_end[low - 1] : 0) + warp_scan(sum);
        uint64_t below = end - sum;
        if (below <= at && at < end) {                                          /* one lane */
            int found = -1;
            #pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                below += w[i];
                if (found < 0 && at < below) found = i;
            }
            drawn[d] = (int)(begin + found);
        }
    }
    __syncthreads();
    int d = threadIdx.x, mine = d < D ? drawn[d] : 0, rank = 0;
    if (d < D) {
        for (int i = 0; i < D; i++) rank += drawn[i] < mine || (drawn[i] == mine && i < d);
        sorted[rank] = mine;
    }
    __syncthreads();
    bool starts = d < D && (d == 0 || sorted[d] != sorted[d - 1]);
    int used = __syncthreads_count(starts);
    int64_t out = n * s.draws;
    if (starts) {
        int slot = 0, count = 0, id = sorted[d];
        for (int i = 1; i <= d; i++) slot += sorted[i] != sorted[i - 1];
        for (int i = d; i < D && sorted[i] == id; i++) count++;
        s.ids[out + slot] = id;
        s.count[out + slot] = (uint8_t)count;
        if (s.logprob) s.logprob[out + slot] = (float)((double)to_float(row[id]) * inv_T - s.lse[n * s.nT]);
    }
    if (d >= used && d < s.draws) {
        s.ids[out + d] = 0;
        s.count[out + d] = 0;
        if (s.logprob) s.logprob[out + d] = 0;
    }
}

extern "C" void cuda_sample_targets(struct backend *be, const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv)
{
    if (!R) return;
    CUDA_REQUIRE(s->draws >= 1 && s->draws <= DRAW_MOST, "sample_targets: 1 to 255 draws");
    CUDA_REQUIRE(Vv >= 1 && Vv <= DRAW_MAX_VOCAB, "sample_targets: at most 2^18 ids");
    size_t shared = (size_t)div_up(Vv, DRAW_TILE) * sizeof(uint64_t) + (size_t)div_up(Vv, 32) * sizeof(uint32_t);      /* 40 KiB at 2^18 ids */
    DISPATCH(be->act_dtype, T, sample_targets_kernel<T><<<(unsigned)R, THREADS, shared, cuda_state_of(be)->stream>>>(*s, (const T *)logits, 1 / s->temperature, V, Vv));
    CUDA_CHECK(cudaGetLastError());
}
