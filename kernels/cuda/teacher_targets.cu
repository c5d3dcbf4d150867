/* What a dump keeps of a chunk of teacher logits (the maths is in cpu/teacher_targets.c). A block per row, the logits read once.
 *
 * 1. A first part of the row is held in registers. The K-th largest of its threads' maxima has at least K logits at or above it, so
 *    it is a floor: nothing below it is among the K largest of the row.
 * 2. The row streams through. What reaches the floor is appended to a list in shared memory (some hundred of 152,064); everything
 *    else adds 2^{c (t - floor)} to a running sum per temperature. All exponents are <= 0, so no maximum has to be tracked.
 * 3. The list is sorted by (logit, lower id). Its first K are the head. The tail's mass is the rest's sum plus the list beyond the
 *    head: summed over the complement, never a difference.
 * The exponential unit is what the loop is short of (16 a clock): where the temperatures are powers of two apart, one exponential at the
 * largest T is squared up to the others. A row whose list overflows (long runs of equal logits, sorted rows) or whose rest vanishes
 * beside the floor is done again from memory: radix selection of the K-th (logit, id), then sums relative to the rest's own maximum. */
#include "kernels/cuda/row_stats.cuh"

enum { THREADS = 512, LIST = 4096, MAX_K = 256, MAX_T = 8, HELD = 8, BATCH = 4 };
constexpr float GONE = -1e30f;          /* stands in for a logit that is counted elsewhere: exponentials of it are 0, and 0 * GONE is 0 */
constexpr float TINY = 1e-30f;          /* below it a sum relative to the floor has lost its digits to underflow */

/* sums[i] belongs to slot i: temperature 1 / inv_T[slot_of[i]]; with a ladder slot l is T_max / 2^l */
struct targets_shape {
    int nT, slots, K, slot_of[MAX_T], unit_slot;            /* unit_slot: the slot of T = 1, for the padding's mass; -1: not wanted */
    float inv_T[MAX_T + 1], c[MAX_T + 1];                   /* by slot; c = log2(e) / T */
    bool entropy;
};
struct targets_out { int32_t *head_ids; float *head_logprob, *lse, *tail_logmass, *entropy, *label_logprob, *padding_mass; };

/* The block's shared memory */
struct targets_shared {
    unsigned long long list[LIST];      /* (ordered logit, ~id): descending order is the ranking */
    double partial[THREADS / 32][MAX_T + 2], total[MAX_T + 2], lse[MAX_T + 1];
    unsigned histogram[256];
    int count, digit, above;
};

__device__ __forceinline__ unsigned long long ranking(float t, int id) { return (unsigned long long)ordered_key(t) << 32 | (uint32_t)~id; }
__device__ __forceinline__ float ranked_logit(unsigned long long e) { return key_value((uint32_t)(e >> 32)); }
__device__ __forceinline__ int ranked_id(unsigned long long e) { return (int)~(uint32_t)e; }

/* The K-th largest of the block's values, one per thread: a bit at a time, 16 bits where the values are bf16. */
template <typename T> __device__ __forceinline__ float kth_of_threads(float x, int K)
{
    constexpr int bits = 8 * (int)sizeof(T);
    uint32_t key = ordered_key(x) >> (32 - bits), prefix = 0;
    for (int b = bits - 1; b >= 0; b--) {
        uint32_t trial = prefix | 1u << b;
        if (__syncthreads_count(key >= trial) >= K) prefix = trial;
    }
    if (bits == 32) return key_value(prefix);
    return __uint_as_float((prefix & 0x8000u ? prefix & 0x7fffu : ~prefix & 0xffffu) << 16);
}

/* Descending bitonic sort of the first n entries, padded with 0 (which ranks after every logit) to a power of two */
__device__ __forceinline__ void sort_list(unsigned long long *list, int n)
{
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += THREADS) list[i] = 0;
    for (int k = 2; k <= size; k *= 2)
        for (int j = k / 2; j > 0; j /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int lo = (i / j) * 2 * j + i % j, hi = lo + j;
                unsigned long long a = list[lo], b = list[hi];
                if ((a < b) == ((lo & k) == 0)) { list[lo] = b; list[hi] = a; }
            }
        }
    __syncthreads();
}

/* total[i] = sum over the block of x[i] */
template <int N> __device__ __forceinline__ void block_totals(targets_shared &s, const float (&x)[N], int n)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        float v = warp_reduce(x[i], add_op());
        if (lane == 0) s.partial[warp][i] = v;
    }
    __syncthreads();
    if (threadIdx.x < n) {
        double t = 0;
        for (int w = 0; w < THREADS / 32; w++) t += s.partial[w][threadIdx.x];
        s.total[threadIdx.x] = t;
    }
    __syncthreads();
}

/* A row again from memory. The list gets exactly its K first entries; total[] the sums over everything else relative to `floor`, which
 * becomes the largest of them. */
template <typename T, int SLOTS>
__device__ __noinline__ void row_again(targets_shared &s, float &floor, const T *row, const targets_shape &shape, int K, int64_t Vv)
{
    /* The K-th key, eight bits at a time: keys are distinct, so the entries at or above it are exactly K. */
    unsigned long long prefix = 0, mask = 0;
    int wanted = K;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 256; i += THREADS) s.histogram[i] = 0;
        __syncthreads();
        for (int64_t j = threadIdx.x; j < Vv; j += THREADS) {
            unsigned long long e = ranking(to_float(row[j]), (int)j);
            if ((e & mask) == prefix) atomicAdd(&s.histogram[e >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int above = 0, d = 255;
            while (d > 0 && above + (int)s.histogram[d] < wanted) above += (int)s.histogram[d--];
            s.digit = d;
            s.above = above;
        }
        __syncthreads();
        prefix |= (unsigned long long)s.digit << shift;
        mask |= 255ull << shift;
        wanted -= s.above;
    }
    __syncthreads();
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    float most = -CUDART_INF_F;
    for (int64_t j = threadIdx.x; j < Vv; j += THREADS) {
        float t = to_float(row[j]);
        unsigned long long e = ranking(t, (int)j);
        if (e >= prefix) {
            int at = atomicAdd(&s.count, 1);
            if (at < MAX_K) s.list[at] = e;
        } else most = fmaxf(most, t);
    }
    most = block_max(most);
    floor = most > -CUDART_INF_F ? most : 0;
    float sum[SLOTS + 1] = {};
    for (int64_t j = threadIdx.x; j < Vv; j += THREADS) {
        float t = to_float(row[j]);
        if (ranking(t, (int)j) >= prefix) continue;
        float d = fmaxf(t - floor, GONE), y0 = 0;
        #pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            if (i >= shape.slots) continue;
            float y = exp2_fast(d * shape.c[i]);
            sum[i] += y;
            if (i == shape.slot_of[0]) y0 = y;
        }
        sum[SLOTS] += y0 * d;
    }
    block_totals(s, sum, SLOTS + 1);
}

/* LADDER: slot i is the square of slot i-1. */
template <typename T, int W, int SLOTS, bool LADDER>
__global__ void __launch_bounds__(THREADS, 2) teacher_targets_kernel(targets_out out, const T *__restrict__ logits, const int32_t *labels, const __grid_constant__ targets_shape shape, int64_t V, int64_t Vv)
{
    extern __shared__ __align__(16) unsigned char memory[];
    targets_shared &s = *reinterpret_cast<targets_shared *>(memory);
    int64_t n = blockIdx.x;
    const T *row = logits + n * V;
    int K = shape.K > 0 ? shape.K : 1;
    constexpr int64_t STEP = THREADS * W;

    /* 1: the first part of the row, and the floor */
    packed<T, W> held[HELD];
    float most = -CUDART_INF_F;
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        int64_t j = h * STEP + (int64_t)threadIdx.x * W;
        if (j < Vv) held[h] = load_packed<T, W>(row + j);
    }
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        int64_t j = h * STEP + (int64_t)threadIdx.x * W;
        if (j < Vv) {
            float t[W];
            unpack<T, W>(t, held[h]);
            #pragma unroll
            for (int i = 0; i < W; i++) if (j + i < Vv) most = fmaxf(most, t[i]);
        }
    }
    if (threadIdx.x == 0) s.count = 0;
    float reached = kth_of_threads<T>(most, K), floor = reached > -CUDART_INF_F ? reached : 0;

    /* 2: the stream */
    float sum[SLOTS + 1] = {};
    auto consume = [&](const packed<T, W> &v, int64_t j) {
        float t[W];
        unpack<T, W>(t, v);
        float top = t[0];
        #pragma unroll
        for (int i = 1; i < W; i++) top = fmaxf(top, t[i]);
        if (top >= reached || j + W > Vv) {
            #pragma unroll
            for (int i = 0; i < W; i++) {
                if (j + i >= Vv) t[i] = GONE;
                else if (t[i] >= reached) {
                    int at = atomicAdd(&s.count, 1);
                    if (at < LIST) s.list[at] = ranking(t[i], (int)(j + i));
                    t[i] = GONE;
                }
            }
        }
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float d = t[i] - floor, y0 = 0, y = 0;
            #pragma unroll
            for (int k = 0; k < SLOTS; k++) {
                y = LADDER && k ? y * y : exp2_fast(d * shape.c[k]);
                sum[k] += y;
                if (k == shape.slot_of[0]) y0 = y;
            }
            if (shape.entropy) sum[SLOTS] = fmaf(y0, fmaxf(d, GONE), sum[SLOTS]);
        }
    };
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        int64_t j = h * STEP + (int64_t)threadIdx.x * W;
        if (j < Vv) consume(held[h], j);
    }
    for (int64_t begin = HELD * STEP + (int64_t)threadIdx.x * W; begin < Vv; begin += BATCH * STEP) {
        packed<T, W> v[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) if (begin + b * STEP < Vv) v[b] = load_packed<T, W>(row + begin + b * STEP);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) if (begin + b * STEP < Vv) consume(v[b], begin + b * STEP);
    }
    block_totals(s, sum, SLOTS + 1);
    int count = s.count;
    bool again = count > LIST;
    if (!again && count == K && Vv > count) for (int i = 0; i < shape.nT; i++) again |= s.total[shape.slot_of[i]] < TINY;
    __syncthreads();
    if (again) {
        row_again<T, SLOTS>(s, floor, row, shape, K, Vv);
        count = K;
    }

    /* 3: the ranking, and what follows from it; NaN in a row leaves fewer entries than K and NaN in its sums */
    sort_list(s.list, count);
    float top = count ? ranked_logit(s.list[0]) : floor, second = count > K ? ranked_logit(s.list[K]) : floor;
    if (second == -CUDART_INF_F) second = floor;                               /* nothing but masked logits beyond the head */
    for (int i = 0; i < shape.slots; i++) {
        double inv_T = shape.inv_T[i], head = 0, tail = 0, spread = 0;
        for (int k = threadIdx.x; k < count; k += THREADS) {
            double x = ((double)ranked_logit(s.list[k]) - top) * inv_T;
            if (k) head += exp(x);
            if (k >= K) tail += exp(((double)ranked_logit(s.list[k]) - second) * inv_T);
            if (i == shape.slot_of[0] && shape.entropy && k && x > -CUDART_INF) spread -= exp(x) * x;
        }
        head = block_sum(head);
        tail = block_sum(tail);
        spread = block_sum(spread);
        double below = ((double)floor - top) * inv_T, rest = s.total[i];
        double others = head + rest * exp(below);                              /* beside the largest, whose term is 1 */
        double lse = top * inv_T + log1p(others);
        if (threadIdx.x == 0) {
            s.lse[i] = lse;
            double mass = tail + rest * exp(((double)floor - second) * inv_T);
            for (int t = 0; t < shape.nT; t++) {
                if (shape.slot_of[t] != i) continue;
                if (out.lse) out.lse[n * shape.nT + t] = (float)lse;
                if (out.tail_logmass) out.tail_logmass[n * shape.nT + t] = shape.K ? (float)(second * inv_T + log(mass) - lse) : 0;   /* without a head it is all */
            }
            /* H = log S + sum e^x (-x) / S, x relative to the largest logit: both parts >= 0 */
            if (out.entropy && i == shape.slot_of[0]) {
                if (rest > 0) spread += exp(below) * (-s.total[SLOTS] * inv_T - rest * below);
                out.entropy[n] = (float)(log1p(others) + spread / (1 + others));
            }
        }
    }
    __syncthreads();
    double inv_T0 = shape.inv_T[shape.slot_of[0]], lse0 = s.lse[shape.slot_of[0]];
    for (int k = threadIdx.x; k < shape.K; k += THREADS) {
        bool there = k < count;
        if (out.head_ids) out.head_ids[n * shape.K + k] = there ? ranked_id(s.list[k]) : 0;
        if (out.head_logprob) out.head_logprob[n * shape.K + k] = there ? (float)(ranked_logit(s.list[k]) * inv_T0 - lse0) : CUDART_NAN_F;
    }
    if (out.label_logprob && threadIdx.x == 0) out.label_logprob[n] = labels[n] >= 0 ? (float)(to_float(row[labels[n]]) * inv_T0 - lse0) : 0;
    if (out.padding_mass) {
        float padding_top = -CUDART_INF_F;
        for (int64_t j = Vv + threadIdx.x; j < V; j += THREADS) padding_top = fmaxf(padding_top, to_float(row[j]));
        padding_top = block_max(padding_top);
        double mass = 0;
        if (padding_top > -CUDART_INF_F) {
            float m = 0;
            for (int64_t j = Vv + threadIdx.x; j < V; j += THREADS) m += exp2_fast((to_float(row[j]) - padding_top) * LOG2E);
            mass = block_sum((double)m);
        }
        if (threadIdx.x == 0) out.padding_mass[n] = mass > 0 ? (float)(1 / (1 + exp(s.lse[shape.unit_slot] - padding_top - log(mass)))) : 0;
    }
}

template <typename T>
__global__ void __launch_bounds__(256) scaled_logits_kernel(uint16_t *full, const T *__restrict__ logits, float inv_T0, int64_t R, int64_t V, int64_t Vv)
{
    int64_t j = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (j >= Vv) return;
    for (int64_t n = blockIdx.y; n < R; n += gridDim.y) full[n * Vv + j] = __half_as_ushort(__float2half_rn(to_float(logits[n * V + j]) * inv_T0));
}

/* Powers of two apart: slot l is T_max / 2^l, at most 4 of them. Else a slot per temperature. */
static bool shape_slots(targets_shape *s, const float *T, int nT)
{
    float most = T[0];
    for (int i = 1; i < nT; i++) most = T[i] > most ? T[i] : most;
    int rungs = 0;
    bool ladder = true;
    for (int i = 0; i < nT; i++) {
        int l = 0;
        while (l < 4 && most / (float)(1 << l) != T[i]) l++;
        ladder &= l < 4;
        s->slot_of[i] = l;
        rungs = l + 1 > rungs ? l + 1 : rungs;
    }
    s->slots = ladder ? rungs : nT;
    for (int i = 0; i < s->slots; i++) s->inv_T[i] = 1 / (ladder ? most / (float)(1 << i) : T[i]);
    if (!ladder) for (int i = 0; i < nT; i++) s->slot_of[i] = i;
    return ladder;
}

template <typename T, int W, int SLOTS, bool LADDER>
static void launch(struct backend *be, const targets_out &o, const act *logits, const int32_t *labels, const targets_shape &shape, int64_t R, int64_t V, int64_t Vv)
{
    auto kernel = teacher_targets_kernel<T, W, SLOTS, LADDER>;
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(targets_shared)));
    kernel<<<(unsigned)R, THREADS, sizeof(targets_shared), cuda_state_of(be)->stream>>>(o, (const T *)logits, labels, shape, V, Vv);
}

template <typename T, int W>
static void by_slots(struct backend *be, const targets_out &o, const act *logits, const int32_t *labels, const targets_shape &shape, bool ladder, int64_t R, int64_t V, int64_t Vv)
{
    if (ladder && shape.slots == 1) launch<T, W, 1, true>(be, o, logits, labels, shape, R, V, Vv);
    else if (ladder && shape.slots == 2) launch<T, W, 2, true>(be, o, logits, labels, shape, R, V, Vv);
    else if (ladder && shape.slots == 3) launch<T, W, 3, true>(be, o, logits, labels, shape, R, V, Vv);
    else if (ladder) launch<T, W, 4, true>(be, o, logits, labels, shape, R, V, Vv);
    else if (shape.slots == 2) launch<T, W, 2, false>(be, o, logits, labels, shape, R, V, Vv);
    else if (shape.slots == 3) launch<T, W, 3, false>(be, o, logits, labels, shape, R, V, Vv);
    else if (shape.slots == 4) launch<T, W, 4, false>(be, o, logits, labels, shape, R, V, Vv);
    else launch<T, W, MAX_T + 1, false>(be, o, logits, labels, shape, R, V, Vv);
}

extern "C" void cuda_teacher_targets(struct backend *be, const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv)
{
    if (!R) return;
    CUDA_REQUIRE(out->nT >= 1 && out->nT <= MAX_T, "teacher_targets: 1 to 8 temperatures");
    CUDA_REQUIRE(out->K <= MAX_K && out->K <= Vv, "teacher_targets: at most 256 entries, and no more than there are ids");
    targets_shape shape = {};
    float T[MAX_T + 1];
    int nT = out->nT, unit = -1;
    for (int i = 0; i < nT; i++) {
        T[i] = out->temperatures[i];
        if (T[i] == 1) unit = i;
    }
    if (out->padding_mass && unit < 0) { unit = nT; T[nT] = 1; }      /* the padding's mass is at T = 1, listed or not */
    /* one more than listed fits: slot_of has MAX_T entries, the extra one is looked up apart */
    int total = out->padding_mass && unit == nT ? nT + 1 : nT;
    CUDA_REQUIRE(total <= MAX_T, "teacher_targets: 8 temperatures without T = 1 leave none for the padding's mass");
    bool ladder = shape_slots(&shape, T, total);
    shape.nT = nT;
    shape.K = out->K;
    shape.entropy = out->entropy != NULL;
    shape.unit_slot = unit >= 0 ? shape.slot_of[unit] : -1;
    for (int i = 0; i < shape.slots; i++) shape.c[i] = shape.inv_T[i] * LOG2E;
    for (int i = shape.slots; i <= MAX_T; i++) { shape.inv_T[i] = shape.inv_T[0]; shape.c[i] = shape.c[0]; }
    targets_out o = {out->head_ids, out->head_logprob, out->lse, out->tail_logmass, out->entropy, out->label_logprob, out->padding_mass};
    DISPATCH(be->act_dtype, E,
        constexpr int W = vector_width<E>();
        if (V % W == 0 && aligned16(logits)) by_slots<E, W>(be, o, logits, labels, shape, ladder, R, V, Vv);
        else launch<E, 1, MAX_T + 1, false>(be, o, logits, labels, shape, R, V, Vv));
    CUDA_CHECK(cudaGetLastError());
    if (!out->full) return;
    DISPATCH(be->act_dtype, E, scaled_logits_kernel<E><<<dim3((unsigned)div_up(Vv, 256), (unsigned)least(R, 65535)), 256, 0, cuda_state_of(be)->stream>>>(
        out->full, (const E *)logits, 1 / out->temperatures[0], R, V, Vv));
    CUDA_CHECK(cudaGetLastError());
}
