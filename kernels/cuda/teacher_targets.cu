/* What a dump keeps of a chunk of teacher logits (the maths is in cpu/teacher_targets.c). A block per row, the logits read once; four blocks on a
 * multiprocessor, so that one streams while another sorts.
 *
 * 1. A first part of the row is held in registers, two maxima a thread. The K-th largest of these has at least K logits at or above it, so
 *    it is a floor: nothing below it is among the K largest of the row.
 * 2. The row streams through. Where a thread's four vectors hold a logit at or above the floor, that is noted in shared memory and opened afterwards, into the
 *    list (some hundred logits of 152,064); every logit below it adds 2^{c (t - floor)} to a running sum per temperature. All exponents are <= 0, so no maximum has to be tracked.
 * 3. The K-th largest logit of the list parts it; what reaches that is sorted by (logit, lower id), and its first K are the head. The tail's mass
 *    is the rest's sum plus the list beyond the head: summed over the complement, never a difference.
 * The loop is short of exponentials (16 a clock) and of instructions: a temperature half of the one before in order takes the square of its exponential, and
 * the exponent is one fused multiply-add, t c - fl(floor c); what rounding floor c has shifted all terms by is taken back once. A row whose list overflows (long runs of equal logits, sorted rows) or whose rest vanishes
 * beside the floor is done again from memory: radix selection of the K-th (logit, id), then sums relative to the rest's own maximum. */
#include "kernels/cuda/row_stats.cuh"

enum { THREADS = 256, BLOCKS = 4, LIST = 4096, SORTED = 512, MAX_K = 256, MAX_T = 8, BATCH = 4 };
constexpr float GONE = -1e30f;          /* stands in for a logit that is counted elsewhere: exponentials of it are 0, and 0 * GONE is 0 */
constexpr float TINY = 1e-30f;          /* below it a sum relative to the floor has lost its digits to underflow */

/* A slot per temperature, the largest first; one more for the padding's mass where T = 1 is not listed. Bit i of `squares`: slot i is half of slot i - 1. */
struct targets_shape {
    int nT, slots, squares, K, slot_of[MAX_T + 1], unit_slot;
    float inv_T[MAX_T + 1], c[MAX_T + 1];                   /* by slot; c = log2(e) / T */
    bool entropy;
};
struct targets_out { int32_t *head_ids; float *head_logprob, *lse, *tail_logmass, *entropy, *label_logprob, *padding_mass; };

/* The block's shared memory */
struct targets_shared {
    unsigned long long list[LIST];      /* (ordered logit, ~id): descending order is the ranking */
    unsigned long long sorted[SORTED];  /* of the list, what the head is taken from */
    union {
        int hit[LIST];                  /* batches that hold a logit for the list: first vector, and a bit for each that does */
        struct { long long head[MAX_T + 1], tail[MAX_T + 1], spread; } units[THREADS / 32];     /* later: a warp's sums over the list */
    };
    int hits, reach[32], reaching;
    double partial[THREADS / 32][MAX_T + 2], total[MAX_T + 2], lse[MAX_T + 1], tail_logmass[MAX_T + 1];
    double padding_mass;                /* relative to padding_top */
    float padding_top, label_logit;
    unsigned histogram[256];
    int count, digit, above;
};

__device__ __forceinline__ unsigned long long ranking(float t, int id) { return (unsigned long long)ordered_key(t) << 32 | (uint32_t)~id; }
__device__ __forceinline__ float ranked_logit(unsigned long long e) { return key_value((uint32_t)(e >> 32)); }
__device__ __forceinline__ int ranked_id(unsigned long long e) { return (int)~(uint32_t)e; }

/* The K-th largest of the block's values, two per thread: a bit at a time, 16 bits where the values are bf16. */
template <typename T> __device__ __forceinline__ float kth_of_threads(float x, float y, int K)
{
    constexpr int bits = 8 * (int)sizeof(T);
    uint32_t key = ordered_key(x) >> (32 - bits), other = ordered_key(y) >> (32 - bits), prefix = 0;
    for (int b = bits - 1; b >= 0; b--) {
        uint32_t trial = prefix | 1u << b;
        if (__syncthreads_count(key >= trial) + __syncthreads_count(other >= trial) >= K) prefix = trial;
    }
    if (bits == 32) return key_value(prefix);
    return __uint_as_float((prefix & 0x8000u ? prefix & 0x7fffu : ~prefix & 0xffffu) << 16);
}

/* -infinity becomes GONE, two bf16 at a time: then y (t c - shift) is 0 where y is. NaN stays NaN. */
template <typename T, int W> __device__ __forceinline__ void make_finite(packed<T, W> &v)
{
    if constexpr (sizeof(T) == 2 && W % 2 == 0) {
        const __nv_bfloat162 gone = __float2bfloat162_rn(GONE);
        #pragma unroll
        for (int i = 0; i < W / 2; i++) {
            __nv_bfloat162 x = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162 *>(&v.word[i]), gone);
            v.word[i] = *reinterpret_cast<const uint32_t *>(&x);
        }
    }
}
template <typename T, int W> __device__ __forceinline__ float finite(float t) { return sizeof(T) == 2 && W % 2 == 0 ? t : t < GONE ? GONE : t; }

/* the largest of n vectors */
template <typename T, int W, int N> __device__ __forceinline__ float largest(const packed<T, W> (&v)[N])
{
    if constexpr (sizeof(T) == 2 && W == 8) {
        __nv_bfloat162 m = *reinterpret_cast<const __nv_bfloat162 *>(&v[0].word[0]);
        #pragma unroll
        for (int i = 1; i < 4 * N; i++) m = __hmax2(m, *reinterpret_cast<const __nv_bfloat162 *>(&v[i / 4].word[i % 4]));
        return fmaxf(__low2float(m), __high2float(m));
    }
    float most = -CUDART_INF_F;
    #pragma unroll
    for (int n = 0; n < N; n++) {
        float t[W];
        unpack<T, W>(t, v[n]);
        #pragma unroll
        for (int i = 0; i < W; i++) most = fmaxf(most, t[i]);
    }
    return most;
}

/* Descending bitonic sort of the first n entries, padded with 0 (which ranks after every logit) to a power of two */
__device__ __forceinline__ void sort_descending(unsigned long long *list, int n)
{
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += THREADS) list[i] = 0;
    for (int k = 2; k <= size; k *= 2)
        for (int j = k / 2; j > 0; j /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int lo = (i & -j) * 2 + (i & (j - 1)), hi = lo + j;           /* j is a power of two */
                unsigned long long a = list[lo], b = list[hi];
                if ((a < b) == ((lo & k) == 0)) { list[lo] = b; list[hi] = a; }
            }
        }
    __syncthreads();
}

/* The list's entries in order, as many as reach its K-th largest logit, at least min(K, count): in s.sorted, or, where ties are too many, in s.list. */
template <typename T> __device__ __forceinline__ const unsigned long long *sort_head(targets_shared &s, int count, int K)
{
    constexpr int bits = 8 * (int)sizeof(T);
    uint32_t kth = 0;                                                          /* its leading bits, as ordered keys */
    if (count > K) {
        if (threadIdx.x < 32) s.reach[threadIdx.x] = 0;
        __syncthreads();
        for (int b = bits - 1; b >= 0; b--) {
            uint32_t trial = kth | 1u << b;
            int mine = 0;
            for (int i = threadIdx.x; i < count; i += THREADS) mine += (uint32_t)(s.list[i] >> 32) >> (32 - bits) >= trial;
            mine = __reduce_add_sync(0xffffffffu, mine);
            if (threadIdx.x % 32 == 0 && mine) atomicAdd(&s.reach[b], mine);
            __syncthreads();
            if (s.reach[b] >= K) kth = trial;
        }
    }
    if (threadIdx.x == 0) s.reaching = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        unsigned long long e = s.list[i];
        if ((uint32_t)(e >> 32) >> (32 - bits) < kth) continue;
        int at = atomicAdd(&s.reaching, 1);
        if (at < SORTED) s.sorted[at] = e;
    }
    __syncthreads();
    bool few = s.reaching <= SORTED;
    unsigned long long *from = few ? s.sorted : s.list;
    sort_descending(from, few ? s.reaching : count);
    return from;
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

/* Terms of the list, 0 to 1, in units that add up the same in any order; 2^63 of them hold far more than LIST terms */
constexpr float UNITS = 1099511627776.0f;                                     /* 2^40 */
__device__ __forceinline__ long long whole_units(float y) { return __float2ll_rn(y * UNITS); }

/* e^x, relative error 2^-22: the exponent in double, the hardware's exponential for the rest. The library's is a long chain of double precision, each
 * instruction waiting for the one before. Beyond e^-693 and e^693 it stays where it is; NaN stays NaN. */
__device__ __forceinline__ double exp_short(double x)
{
    double y = x * 1.4426950408889634, n;
    y = y < -1000 ? -1000 : y > 1000 ? 1000 : y;
    n = rint(y);
    return exp2_fast((float)(y - n)) * __hiloint2double(((int)n + 1023) << 20, 0);
}
/* 2^x for what rounding leaves: |x| far below 1 */
__device__ __forceinline__ double exp2_residue(double x) { double u = x * 0.6931471805599453; return 1 + u * (1 + u * (1 / 2.0 + u * (1 / 6.0))); }

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

/* T0: the slot of the first temperature, -1: whichever the shape says. Bit i of SQUARES: slot i takes the square of slot i - 1. */
template <typename T, int W, int SLOTS, int SQUARES, int T0>
__global__ void __launch_bounds__(THREADS, BLOCKS) teacher_targets_kernel(targets_out out, const T *__restrict__ logits, const int32_t *labels, const __grid_constant__ targets_shape shape, int64_t V, int Vv)
{
    extern __shared__ __align__(16) unsigned char memory[];
    targets_shared &s = *reinterpret_cast<targets_shared *>(memory);
    int64_t n = blockIdx.x;
    const T *row = logits + n * V;
    int K = shape.K > 0 ? shape.K : 1, vectors = Vv / W;
    const int T0_slot = T0 >= 0 ? T0 : shape.slot_of[0];

    /* 1: the first part of the row, and the floor */
    packed<T, W> held[2][BATCH], missing;
    #pragma unroll
    for (int i = 0; i < (int)(sizeof missing.word / 4); i++) missing.word[i] = sizeof(T) == 2 ? 0xff80ff80u : 0xff800000u;      /* -infinity */
    #pragma unroll
    for (int h = 0; h < 2; h++)
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int at = (h * BATCH + b) * THREADS + (int)threadIdx.x;
            held[h][b] = at < vectors ? load_packed<T, W>(row + at * W) : missing;
        }
    if (out.padding_mass) {                                 /* while those are on their way */
        float padding_top = -CUDART_INF_F, mass = 0;
        for (int64_t j = Vv + threadIdx.x; j < V; j += THREADS) padding_top = fmaxf(padding_top, to_float(row[j]));
        padding_top = block_max(padding_top);
        if (padding_top > -CUDART_INF_F)
            for (int64_t j = Vv + threadIdx.x; j < V; j += THREADS) mass += exp2_fast((to_float(row[j]) - padding_top) * LOG2E);
        double total = block_sum((double)mass);
        if (threadIdx.x == 0) {
            s.padding_top = padding_top;
            s.padding_mass = total;
        }
    }
    float most[2] = {largest<T, W, BATCH>(held[0]), largest<T, W, BATCH>(held[1])};
    if (threadIdx.x == 0) s.count = s.hits = 0;
    float reached = kth_of_threads<T>(most[0], most[1], K), floor = reached > -CUDART_INF_F ? reached : 0;

    /* 2: the stream */
    float sum[SLOTS + 1] = {}, shift[SLOTS];
    #pragma unroll
    for (int k = 0; k < SLOTS; k++) shift[k] = SQUARES >> k & 1 ? 2 * shift[k - 1] : floor * shape.c[k];
    auto take = [&](float t, int id) {                      /* what reaches the floor */
        int at = atomicAdd(&s.count, 1);
        if (at < LIST) s.list[at] = ranking(t, id);
    };
    auto add = [&](float t) {                               /* everything else; NaN too, which reaches nothing */
        float y[SLOTS], e = 0, y0 = 0, e0 = 0;
        bool below = !(t >= reached);
        t = finite<T, W>(t);
        #pragma unroll
        for (int k = 0; k < SLOTS; k++) {
            if (SQUARES >> k & 1) y[k] = y[k - 1] * y[k - 1];
            else {
                e = fmaf(t, shape.c[k], -shift[k]);
                y[k] = exp2_fast(e);
            }
            if (below) sum[k] += y[k];
            if (k == T0_slot) { y0 = y[k]; e0 = e; }
        }
        if (below) sum[SLOTS] = fmaf(y0, e0, sum[SLOTS]);
    };
    /* Nearly every warp has a hit among its 32 x BATCH vectors: one note for all of a thread's, with a bit for each. Whoever opened all of them would read a quarter
     * of the row twice, from memory: 500 rows in flight are more than the cache holds. */
    auto consume = [&](packed<T, W> (&v)[BATCH], int at) {
        #pragma unroll
        for (int b = 0; b < BATCH; b++) make_finite<T, W>(v[b]);
        if (largest<T, W, BATCH>(v) >= reached) {
            int bits = 0;
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const packed<T, W> one[1] = {v[b]};
                bits |= (largest<T, W, 1>(one) >= reached) << b;
            }
            int to = atomicAdd(&s.hits, 1);
            if (to < LIST) s.hit[to] = at << BATCH | bits;
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float t[W];
            unpack<T, W>(t, v[b]);
            #pragma unroll
            for (int i = 0; i < W; i++) add(t[i]);
        }
    };
    int at = (int)threadIdx.x;
    #pragma unroll
    for (int h = 0; h < 2; h++, at += BATCH * THREADS) consume(held[h], at);
    for (; at - (int)threadIdx.x + BATCH * THREADS <= vectors; at += BATCH * THREADS) {
        packed<T, W> v[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) v[b] = load_packed<T, W>(row + (at + b * THREADS) * W);
        consume(v, at);
    }
    if (at - (int)threadIdx.x < vectors) {                  /* what is left of the vectors; missing ones add nothing and reach nothing, for -infinity is made finite */
        packed<T, W> v[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) v[b] = at + b * THREADS < vectors ? load_packed<T, W>(row + (at + b * THREADS) * W) : missing;
        consume(v, at);
    }
    if ((int)threadIdx.x < Vv - vectors * W) {
        int j = vectors * W + (int)threadIdx.x;
        float t = to_float(row[j]);
        if (t >= reached) take(t, j);
        add(t < GONE ? GONE : t);
    }
    __syncthreads();
    for (int h = threadIdx.x; h < min(s.hits, LIST); h += THREADS) {
        packed<T, W> v[BATCH];
        int first = s.hit[h] >> BATCH, bits = s.hit[h];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) if (bits >> b & 1 && first + b * THREADS < vectors) v[b] = load_packed<T, W>(row + (first + b * THREADS) * W);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!(bits >> b & 1) || first + b * THREADS >= vectors) continue;
            float t[W];
            unpack<T, W>(t, v[b]);
            #pragma unroll
            for (int i = 0; i < W; i++) if (t[i] >= reached) take(t[i], (first + b * THREADS) * W + i);
        }
    }
    block_totals(s, sum, SLOTS + 1);
    int count = s.count;
    if (threadIdx.x == 0) {
        /* from 2^{t c - shift} to 2^{c (t - floor)}, and from exponents to logits; a square's root carries its exponent halved */
        double root = 0, unit = 1;
        for (int k = 0; k < SLOTS; k++) {
            double by = (double)floor * shape.c[k] - shift[k];
            if (SQUARES >> k & 1) unit *= 2;
            else { root = by; unit = 1; }
            if (k == T0_slot) s.total[SLOTS] = unit * (s.total[SLOTS] - root * s.total[k]) / shape.c[k] * exp2_residue(-by);
        }
        for (int k = 0; k < SLOTS; k++) s.total[k] *= exp2_residue(shift[k] - (double)floor * shape.c[k]);
    }
    __syncthreads();
    bool again = count > LIST || s.hits > LIST;
    if (!again && count == K && Vv > count) for (int i = 0; i < shape.nT; i++) again |= s.total[shape.slot_of[i]] < TINY;
    __syncthreads();
    if (again) {
        row_again<T, SLOTS>(s, floor, row, shape, K, Vv);
        count = K;
    }

    /* 3: the ranking, and what follows from it; NaN in a row leaves fewer entries than K and NaN in its sums */
    const unsigned long long *sorted = sort_head<T>(s, count, K);
    unsigned long long last = count >= K ? sorted[K - 1] : 0;                 /* of the head: what ranks after it is tail */
    float top = count ? ranked_logit(sorted[0]) : floor, second = -CUDART_INF_F;
    for (int k = threadIdx.x; k < count; k += THREADS) if (s.list[k] < last) second = fmaxf(second, ranked_logit(s.list[k]));
    second = block_max(second);
    float next = K > 1 && count > 1 ? ranked_logit(sorted[1]) : second;       /* the largest but one */
    if (next == -CUDART_INF_F) next = top;                                    /* there is none, or it has no mass */
    if (second == -CUDART_INF_F) second = floor;                              /* nothing, or nothing but masked logits, beyond the head */
    /* The list's terms in fp32 (2^-22), the largest of each sum 1; their sums in whole units, which add up to the same bits in whatever order threads have listed the entries.
     * Differences of logits are exact or as good. */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < shape.slots; i++) {
        bool with_spread = i == T0_slot && shape.entropy;
        long long head = 0, tail = 0, spread = 0;
        float c = shape.c[i];
        for (int k = threadIdx.x; k < count; k += THREADS) {
            unsigned long long entry = s.list[k];
            float t = ranked_logit(entry), y = exp2_fast((t - next) * c);
            if (entry < last) tail += whole_units(exp2_fast((t - second) * c));
            if (entry == sorted[0]) continue;                                 /* the largest, whose term is 1 */
            head += whole_units(y);
            if (with_spread && t > -CUDART_INF_F) spread += whole_units(y * ((next - t) * shape.inv_T[i]));
        }
        head = warp_reduce(head, add_op());
        tail = warp_reduce(tail, add_op());
        if (with_spread) spread = warp_reduce(spread, add_op());
        if (lane) continue;
        s.units[warp].head[i] = head;
        s.units[warp].tail[i] = tail;
        if (with_spread) s.units[warp].spread = spread;
    }
    __syncthreads();
    /* A thread a temperature: what follows is one long chain of double precision, in which each instruction waits for the one before. Another fetches the label's logit meanwhile. */
    if ((int)threadIdx.x < shape.slots) {
        int i = threadIdx.x;
        bool with_spread = i == T0_slot && shape.entropy;
        long long head_units = 0, tail_units = 0, spread_units = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            head_units += s.units[w].head[i];
            tail_units += s.units[w].tail[i];
            if (with_spread) spread_units += s.units[w].spread;
        }
        double inv_T = shape.inv_T[i], rest = s.total[i], below = ((double)floor - top) * inv_T, at_floor = exp_short(below), to_top = exp_short(((double)next - top) * inv_T);
        double near_top = (double)head_units / UNITS;
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
            if (rest > 0) spread += at_floor * (-s.total[SLOTS] * inv_T - rest * below);
            out.entropy[n] = (float)(log_sum + spread / (1 + others));
        }
    } else if (threadIdx.x == THREADS / 2 && out.label_logprob && labels[n] >= 0) s.label_logit = to_float(row[labels[n]]);
    __syncthreads();
    double inv_T0 = shape.inv_T[shape.slot_of[0]], lse0 = s.lse[shape.slot_of[0]];
    for (int k = threadIdx.x; k < shape.K; k += THREADS) {
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
    if (out.label_logprob) out.label_logprob[n] = labels[n] >= 0 ? (float)(s.label_logit * inv_T0 - lse0) : 0;
    if (out.padding_mass) {
        double ratio = s.padding_mass * exp_short(s.padding_top - s.lse[shape.unit_slot]);
        out.padding_mass[n] = s.padding_mass > 0 ? (float)(ratio / (1 + ratio)) : 0;
    }
}

template <typename T>
__global__ void __launch_bounds__(256) scaled_logits_kernel(uint16_t *full, const T *__restrict__ logits, float inv_T0, int64_t R, int64_t V, int64_t Vv)
{
    int64_t j = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (j >= Vv) return;
    for (int64_t n = blockIdx.y; n < R; n += gridDim.y) full[n * Vv + j] = __half_as_ushort(__float2half_rn(to_float(logits[n * V + j]) * inv_T0));
}

/* Slots in falling order of temperature, `total` of them. */
static void shape_slots(targets_shape *s, const float *T, int total)
{
    int order[MAX_T + 1];
    for (int i = 0; i < total; i++) {
        int at = i;
        for (; at > 0 && T[order[at - 1]] < T[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    s->slots = total;
    for (int k = 0; k < total; k++) {
        s->slot_of[order[k]] = k;
        s->inv_T[k] = 1 / T[order[k]];
        s->c[k] = s->inv_T[k] * LOG2E;
        if (k && T[order[k - 1]] == 2 * T[order[k]]) s->squares |= 1 << k;
    }
}

template <typename T, int W, int SLOTS, int SQUARES, int T0>
static void launch(struct backend *be, const targets_out &o, const act *logits, const int32_t *labels, const targets_shape &shape, int64_t R, int64_t V, int64_t Vv)
{
    auto kernel = teacher_targets_kernel<T, W, SLOTS, SQUARES, T0>;
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(targets_shared)));
    kernel<<<(unsigned)R, THREADS, sizeof(targets_shared), cuda_state_of(be)->stream>>>(o, (const T *)logits, labels, shape, V, (int)Vv);
}

/* In bf16, which dumps are made in, up to three temperatures, of which the first is the lowest, have kernels of their own. */
static void by_slots(struct backend *be, const targets_out &o, const act *logits, const int32_t *labels, const targets_shape &shape, int64_t R, int64_t V, int64_t Vv)
{
    typedef bf16 T;
    constexpr int W = vector_width<T>();
    bool lowest = shape.slot_of[0] == shape.slots - 1;
    switch (shape.slots > 3 ? 0 : lowest ? shape.slots * 8 + shape.squares : shape.slots) {
    case 8:      launch<T, W, 1, 0, 0>(be, o, logits, labels, shape, R, V, Vv); break;
    case 16:     launch<T, W, 2, 0, 1>(be, o, logits, labels, shape, R, V, Vv); break;
    case 16 + 2: launch<T, W, 2, 2, 1>(be, o, logits, labels, shape, R, V, Vv); break;
    case 24:     launch<T, W, 3, 0, 2>(be, o, logits, labels, shape, R, V, Vv); break;
    case 24 + 2: launch<T, W, 3, 2, 2>(be, o, logits, labels, shape, R, V, Vv); break;
    case 24 + 4: launch<T, W, 3, 4, 2>(be, o, logits, labels, shape, R, V, Vv); break;
    case 24 + 6: launch<T, W, 3, 6, 2>(be, o, logits, labels, shape, R, V, Vv); break;
    case 2:      launch<T, W, 2, 0, -1>(be, o, logits, labels, shape, R, V, Vv); break;
    case 3:      launch<T, W, 3, 0, -1>(be, o, logits, labels, shape, R, V, Vv); break;
    default:     launch<T, W, MAX_T + 1, 0, -1>(be, o, logits, labels, shape, R, V, Vv);
    }
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
    shape_slots(&shape, T, out->padding_mass && unit == nT ? nT + 1 : nT);
    shape.nT = nT;
    shape.K = out->K;
    shape.entropy = out->entropy != NULL;
    shape.unit_slot = unit >= 0 ? shape.slot_of[unit] : -1;
    for (int i = shape.slots; i <= MAX_T; i++) { shape.inv_T[i] = shape.inv_T[0]; shape.c[i] = shape.c[0]; }
    targets_out o = {out->head_ids, out->head_logprob, out->lse, out->tail_logmass, out->entropy, out->label_logprob, out->padding_mass};
    DISPATCH(be->act_dtype, E,
        constexpr int W = vector_width<E>();
        bool wide = V % W == 0 && aligned16(logits);
        if (wide && sizeof(E) == 2) by_slots(be, o, logits, labels, shape, R, V, Vv);
        else if (wide) launch<E, W, MAX_T + 1, 0, -1>(be, o, logits, labels, shape, R, V, Vv);
        else launch<E, 1, MAX_T + 1, 0, -1>(be, o, logits, labels, shape, R, V, Vv));
    CUDA_CHECK(cudaGetLastError());
    if (!out->full) return;
    DISPATCH(be->act_dtype, E, scaled_logits_kernel<E><<<dim3((unsigned)div_up(Vv, 256), (unsigned)least(R, 65535)), 256, 0, cuda_state_of(be)->stream>>>(
        out->full, (const E *)logits, 1 / out->temperatures[0], R, V, Vv));
    CUDA_CHECK(cudaGetLastError());
}
