/* The second kernel of teacher_targets.cu: of the few hundred entries of a row's list its head in order, and everything that follows from it and from the sums over the rest. */
#ifndef KERNELS_CUDA_TEACHER_TARGETS_RANK_CUH
#define KERNELS_CUDA_TEACHER_TARGETS_RANK_CUH

#include "kernels/cuda/teacher_targets.cuh"

/* The second kernel's, for heads of at most MOST entries: the threads of a block, and the room for a head with its ties; the list follows it */
template <int MOST> struct __align__(16) rank_shared {
    static constexpr int BLOCK = MOST <= 64 ? 32 : 256, SORTED = 2 * MOST;
    unsigned long long sorted[SORTED];
    struct { long long others[MAX_T + 1], tail[MAX_T + 1], spread; } units[BLOCK / 32];             /* a warp's sums over the list: all but the largest, what is not of the head, the entropy's */
    double total[MAX_T + 2], lse[MAX_T + 1], tail_logmass[MAX_T + 1], padding_lse;
    uint32_t high[BLOCK / 32], low[BLOCK / 32];
    int reach[16][3], reaching, above;
};

/* The K-th largest of at least K keys, all between `low` and `high`, two bits at a time from the first in which those differ. counts(n, prefix, bit): n[i] = how many keys of this warp reach
 * prefix + (i + 1 << bit). reach: three counters for every two bits, zeroed, where more than one warp counts. */
template <int WARPS, typename Counts> __device__ __forceinline__ uint32_t kth_key(int (*reach)[3], uint32_t high, uint32_t low, int K, Counts counts)
{
    if (high == low) return high;
    int first = (31 - __clz((int)(high ^ low))) & ~1;
    uint32_t prefix = high & ~(uint32_t)((4ull << first) - 1);
    for (int b = first; b >= 0; b -= 2) {
        int n[3], lane = threadIdx.x % 32;
        counts(n, prefix, b);
        if (WARPS > 1) {
            int mine = lane == 0 ? n[0] : lane == 1 ? n[1] : n[2];
            if (lane < 3 && mine) atomicAdd(&reach[b / 2][lane], mine);
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < 3; i++) n[i] = reach[b / 2][i];
        }
        prefix += (uint32_t)((n[0] >= K) + (n[1] >= K) + (n[2] >= K)) << b;   /* more reach the smaller trials */
    }
    return prefix;
}

/* The first n entries, which are all different, in descending order: each finds its place by counting how many are larger. */
template <int MOST> __device__ __forceinline__ void sort_descending(unsigned long long *list, int n)
{
    constexpr int threads = rank_shared<MOST>::BLOCK, own = rank_shared<MOST>::SORTED / threads;
    unsigned long long mine[own];
    int place[own] = {};
    #pragma unroll
    for (int j = 0; j < own; j++) mine[j] = (int)threadIdx.x + j * threads < n ? list[threadIdx.x + j * threads] : ~0ull;
    #pragma unroll 4
    for (int k = 0; k < n; k++) {
        unsigned long long other = list[k];
        #pragma unroll
        for (int j = 0; j < own; j++) place[j] += other > mine[j];
    }
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < own; j++) if ((int)threadIdx.x + j * threads < n) list[place[j]] = mine[j];
    __syncthreads();
}

/* K-th largest of those 32-bit words of the list that word_of takes from an entry; `counted`: whether it takes one */
template <int MOST, typename Counted, typename Word> __device__ __forceinline__ uint32_t kth_word(rank_shared<MOST> &s, const unsigned long long *list, int count, int K, Counted counted, Word word_of)
{
    constexpr int threads = rank_shared<MOST>::BLOCK;
    uint32_t high = 0, low = 0xffffffffu;
    for (int i = threadIdx.x; i < count; i += threads) {
        if (!counted(list[i])) continue;
        high = max(high, word_of(list[i]));
        low = min(low, word_of(list[i]));
    }
    high = __reduce_max_sync(0xffffffffu, high);
    low = __reduce_min_sync(0xffffffffu, low);
    if (threads > 32) {
        if (threadIdx.x < 16) s.reach[threadIdx.x][0] = s.reach[threadIdx.x][1] = s.reach[threadIdx.x][2] = 0;
        if (threadIdx.x % 32 == 0) {
            s.high[threadIdx.x / 32] = high;
            s.low[threadIdx.x / 32] = low;
        }
        __syncthreads();
        #pragma unroll
        for (int w = 0; w < threads / 32; w++) {
            high = max(high, s.high[w]);
            low = min(low, s.low[w]);
        }
    }
    uint32_t kth = kth_key<threads / 32>(s.reach, high, low, K, [&](int (&n)[3], uint32_t prefix, int b) {
        n[0] = n[1] = n[2] = 0;
        for (int i = threadIdx.x; i < count; i += threads) {
            if (!counted(list[i])) continue;
            uint32_t word = word_of(list[i]);
            #pragma unroll
            for (int t = 0; t < 3; t++) n[t] += word >= prefix + ((uint32_t)(t + 1) << b);
        }
        #pragma unroll
        for (int t = 0; t < 3; t++) n[t] = __reduce_add_sync(0xffffffffu, n[t]);
    });
    if (threads > 32) __syncthreads();                      /* the counters are free again */
    return kth;
}

/* What of the list ranks at or above `least`, into s.sorted, in any order; s.reaching: how many, more than there is room for where ties are too many */
template <int MOST> __device__ __forceinline__ void take_from(rank_shared<MOST> &s, const unsigned long long *list, int count, unsigned long long least)
{
    if (threadIdx.x == 0) s.reaching = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += rank_shared<MOST>::BLOCK) {
        unsigned long long e = list[i];
        if (e < least) continue;
        int at = atomicAdd(&s.reaching, 1);
        if (at < rank_shared<MOST>::SORTED) s.sorted[at] = e;
    }
    __syncthreads();
}

/* The list's first min(K, count) entries into s.sorted, and what ties with the last of them where there is room for it, in any order; s.reaching: how many */
template <typename T, int MOST> __device__ __forceinline__ void part_head(rank_shared<MOST> &s, const unsigned long long *list, int count, int K)
{
    constexpr int spare = 32 - 8 * (int)sizeof(T);          /* bits of a key that say no more than its sign */
    auto level = [](unsigned long long e) { return (uint32_t)(e >> 32) >> spare; };
    uint32_t kth = count <= K ? 0 : kth_word<MOST>(s, list, count, K, [](unsigned long long) { return true; }, level);
    take_from<MOST>(s, list, count, (unsigned long long)kth << spare << 32);
    if (s.reaching <= rank_shared<MOST>::SORTED) return;
    /* Hundreds that tie: their ids part them. */
    int above = 0;
    if (threadIdx.x == 0) s.above = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += rank_shared<MOST>::BLOCK) above += level(list[i]) > kth;
    above = __reduce_add_sync(0xffffffffu, above);
    if (threadIdx.x % 32 == 0) atomicAdd(&s.above, above);
    __syncthreads();
    uint32_t last = kth_word<MOST>(s, list, count, K - s.above, [&](unsigned long long e) { return level(e) == kth; }, [](unsigned long long e) { return (uint32_t)e; });
    uint32_t key = kth << spare | (kth >> (31 - spare) ? 0 : (1u << spare) - 1);        /* of a logit below 0 the spare bits are ones */
    take_from<MOST>(s, list, count, (unsigned long long)key << 32 | last);
}

/* Terms of the list, 0 to 1, in units that add up the same in any order; 2^63 of them hold far more terms than a list */
constexpr float UNITS = 1099511627776.0f;                                     /* 2^40 */
/* NaN, from infinities less infinities, adds nothing: of a row that is no distribution the largest entry or the rest says so. */
__device__ __forceinline__ long long whole_units(float y) { return y > 0 ? __float2ll_rn(y * UNITS) : 0; }

/* e^x, relative error 2^-22: the exponent in double, the hardware's exponential for the rest. The library's is a long chain of double precision, each
 * instruction waiting for the one before. Beyond e^-693 and e^693 it stays where it is; NaN stays NaN. */
__device__ __forceinline__ double exp_short(double x)
{
    double y = x * 1.4426950408889634, n;
    y = y < -1000 ? -1000 : y > 1000 ? 1000 : y;
    n = rint(y);
    return exp2_fast((float)(y - n)) * __hiloint2double((int)((unsigned)((int)n + 1023) << 20), 0);
}
/* 2^x for what rounding leaves: |x| far below 1 */
__device__ __forceinline__ double exp2_residue(double x) { double u = x * 0.6931471805599453; return 1 + u * (1 + u * (1 / 2.0 + u * (1 / 6.0))); }

/* ran_slots: SLOTS of the first kernel */
template <typename T, int MOST>
__global__ void __launch_bounds__(rank_shared<MOST>::BLOCK) rank_kernel(targets_out out, const row_part *parts, const unsigned long long *lists, const T *__restrict__ logits, const int32_t *labels,
                                                                         const __grid_constant__ targets_shape shape, int ran_slots, int64_t V, int Vv)
{
    constexpr int BLOCK = rank_shared<MOST>::BLOCK;
    extern __shared__ __align__(16) unsigned char memory[];
    rank_shared<MOST> &s = *reinterpret_cast<rank_shared<MOST> *>(memory);
    unsigned long long *list = reinterpret_cast<unsigned long long *>(memory + sizeof s);
    int64_t n = blockIdx.x;
    const T *row = logits + n * V;
    const row_part &part = parts[n];
    const int K = shape.K > 0 ? shape.K : 1, T0_slot = shape.slot_of[0], count = part.count;
    const float floor = part.floor;
    for (int k = threadIdx.x; k < count; k += BLOCK) list[k] = lists[n * shape.room + k];
    float label_logit = threadIdx.x == 0 && out.label_logprob && labels[n] >= 0 ? to_float(row[labels[n]]) : 0;
    if (threadIdx.x == 0) {
        /* from 2^{t c - fl(floor c)}, or a power of that, to 2^{c (t - floor)}, and from exponents to logits */
        for (int k = 0; k < shape.slots; k++) {
            int p = power_of(shape.powers, k), times = p ? p : 1;
            float c = p ? shape.root_c : shape.c[k];
            double by = part.again ? 0 : (double)floor * c - floor * c, total = part.total[k];
            if (k == T0_slot) s.total[MAX_T + 1] = part.again ? part.total[MAX_T + 1] : times * (part.total[ran_slots] - by * total) / shape.c[k] * exp2_residue(-times * by);
            s.total[k] = total * exp2_residue(-times * by);
        }
    }
    if (out.padding_mass) {
        constexpr int BATCH = 8;
        const float c[1] = {LOG2E};
        const double one[1] = {1};
        double lse[1];
        running_sums<1> sums;
        sums.clear();
        for (int64_t j = Vv + threadIdx.x; j < V; j += BATCH * BLOCK) {
            float x[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) x[i] = j + i * BLOCK < V ? to_float(row[j + i * BLOCK]) : -CUDART_INF_F;
            sums.add<BATCH>(x, c);
        }
        sums.merge(lse, c, one);
        if (threadIdx.x == 0) s.padding_lse = lse[0];
    }
    __syncthreads();
    part_head<T, MOST>(s, list, count, K);

    /* 3: the ranking, and what follows from it; NaN in a row leaves NaN in its sums, and the list short of entries or with NaN on top */
    const unsigned long long *sorted = s.sorted;
    sort_descending<MOST>(s.sorted, s.reaching);
    unsigned long long last = count >= K ? sorted[K - 1] : 0;                 /* of the head: what ranks after it is tail */
    float top = count ? ranked_logit(sorted[0]) : floor, second = -CUDART_INF_F;
    for (int k = threadIdx.x; k < count; k += BLOCK) if (list[k] < last) second = fmaxf(second, ranked_logit(list[k]));
    second = block_max(second);
    float next = K > 1 && count > 1 ? ranked_logit(sorted[1]) : second;       /* the largest but one */
    if (next == -CUDART_INF_F) next = top;                                    /* there is none, or it has no mass */
    if (second == -CUDART_INF_F) second = floor;                              /* nothing, or nothing but masked logits, beyond the head */
    /* The list's terms in fp32 (2^-22), the largest of each sum 1; their sums in whole units, which add up to the same bits in whatever order threads have listed the entries.
     * Differences of logits are exact or as good. */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < shape.slots; i++) {
        bool with_spread = i == T0_slot && shape.entropy;
        long long others = 0, tail = 0, spread = 0;
        float c = shape.c[i];
        for (int k = threadIdx.x; k < count; k += BLOCK) {
            unsigned long long entry = list[k];
            float t = ranked_logit(entry), y = exp2_fast((t - next) * c);
            if (entry < last) tail += whole_units(exp2_fast((t - second) * c));
            if (entry == sorted[0]) continue;                                 /* the largest, whose term is 1 */
            others += whole_units(y);
            if (with_spread && t > -CUDART_INF_F) spread += whole_units(y * ((next - t) * shape.inv_T[i]));
        }
        others = warp_reduce(others, add_op());
        tail = warp_reduce(tail, add_op());
        if (with_spread) spread = warp_reduce(spread, add_op());
        if (lane) continue;
        s.units[warp].others[i] = others;
        s.units[warp].tail[i] = tail;
        if (with_spread) s.units[warp].spread = spread;
    }
    __syncthreads();
    /* A thread a temperature: what follows is one long chain of double precision, in which each instruction waits for the one before. */
    if ((int)threadIdx.x < shape.slots) {
        int i = threadIdx.x;
        bool with_spread = i == T0_slot && shape.entropy;
        long long others_units = 0, tail_units = 0, spread_units = 0;
        for (int w = 0; w < BLOCK / 32; w++) {
            others_units += s.units[w].others[i];
            tail_units += s.units[w].tail[i];
            if (with_spread) spread_units += s.units[w].spread;
        }
        double inv_T = shape.inv_T[i], rest = s.total[i], below = ((double)floor - top) * inv_T, at_floor = exp_short(below), to_top = exp_short(((double)next - top) * inv_T);
        double near_top = (double)others_units / UNITS;
        double others = top < CUDART_INF_F ? near_top * to_top : CUDART_NAN;  /* beside the largest, whose term is 1; a logit of infinity leaves no distribution */
        double mass = (double)tail_units / UNITS;
        if (rest != 0) {                                                      /* NaN too */
            others += rest * at_floor;
            mass += rest * exp_short(((double)floor - second) * inv_T);
        }
        double log_sum = log1p(others), lse = top * inv_T + log_sum;
        s.lse[i] = lse;
        s.tail_logmass[i] = shape.K ? second * inv_T + log(mass) - lse : 0;   /* without a head it is all */
        /* H = log S + sum e^x (-x) / S, x relative to the largest logit: both parts >= 0 */
        if (out.entropy && i == T0_slot) {
            double spread = ((double)spread_units / UNITS + near_top * (((double)top - next) * inv_T)) * to_top;
            if (rest > 0) spread += at_floor * (-s.total[MAX_T + 1] * inv_T - rest * below);
            out.entropy[n] = (float)(log_sum + spread / (1 + others));
        }
    }
    __syncthreads();
    double inv_T0 = shape.inv_T[shape.slot_of[0]], lse0 = s.lse[shape.slot_of[0]];
    for (int k = threadIdx.x; k < shape.K; k += BLOCK) {
        bool there = k < count;
        if (out.head_ids) out.head_ids[n * shape.K + k] = there ? ranked_id(sorted[k]) : 0;
        if (out.head_logprob) out.head_logprob[n * shape.K + k] = there ? (float)(ranked_logit(sorted[k]) * inv_T0 - lse0) : CUDART_NAN_F;
    }
    if ((int)threadIdx.x < shape.nT) {
        int t = threadIdx.x, i = shape.slot_of[t];
        if (out.lse) out.lse[n * shape.nT + t] = (float)s.lse[i];
        if (out.tail_logmass) out.tail_logmass[n * shape.nT + t] = (float)s.tail_logmass[i];
    }
    if (threadIdx.x) return;
    if (out.label_logprob) out.label_logprob[n] = labels[n] >= 0 ? (float)(label_logit * inv_T0 - lse0) : 0;
    if (out.padding_mass) {
        double ratio = exp_short(s.padding_lse - s.lse[shape.unit_slot]);
        out.padding_mass[n] = s.padding_lse == -CUDART_INF ? 0 : (float)(ratio / (1 + ratio));    /* of rows that nobody initialised it may be NaN, and says so */
    }
}

#endif
