/* What a dump keeps of a chunk of teacher logits (the maths is in cpu/teacher_targets.c), by two kernels: one streams the logits, once; one ranks the few hundred of a row that are left.
 *
 * The first, a block per row, four on a multiprocessor.
 * 1. A sample spread over the row comes first (ids are in no random order: the low ones of a vocabulary are its commonest tokens, and those of one script lie together). The K-th largest of one or
 *    two maxima a thread has at least K logits at or above it, so it is a floor: nothing below it is among the K largest of the row. The sample is read again when its turn comes, from the
 *    cache: in flight it is 65 kB a row, 35 MB in all, and what streams past it is asked for as the first to be given up.
 * 2. The row streams through. A vector without a logit that reaches the floor adds 2^{c (t - floor)} of its logits to a running sum per temperature. Others are set aside by their warp, in shared
 *    memory, and opened at the end: what reaches the floor into the row's list in scratch, the rest into the sums. All exponents are <= 0, so no maximum has to be tracked.
 * The loop saves exponentials (16 a clock) and instructions: temperatures whose inverses are small multiples of one number are powers of one exponential (of e^{t/6} the sixth, the third and the
 * second are T = 1, 2, 3), and the exponent is one fused multiply-add, t c - fl(floor c); what rounding floor c has shifted all terms by is taken back once.
 * A row whose list overflows (long runs of equal logits, sorted rows) or whose rest vanishes beside the floor is done again from memory, at once: radix selection of the K-th (logit, id), then
 * sums relative to the rest's own maximum.
 *
 * The second, a row a warp, for large heads a block (teacher_targets_rank.cuh).
 * 3. The K-th largest logit of the list parts it; what reaches that is ordered by (logit, lower id), and its first K are the head. The tail's mass is the rest's sum plus the list beyond
 *    the head: summed over the complement, never a difference. */
#include "kernels/cuda/teacher_targets_rank.cuh"

enum { THREADS = 256, BLOCKS = 4, AHEAD = 4, SAMPLE = 16 };                     /* a stage is a vector of every thread: AHEAD of them on their way, SAMPLE, of vectors of 8, before the floor */
static_assert(MAX_K <= 2 * THREADS, "a thread has two maxima");
constexpr float GONE = -1e30f;          /* stands in for a logit that is counted elsewhere: exponentials of it are 0, and 0 * GONE is 0 */
constexpr float TINY = 1e-25f;          /* below it a sum relative to the floor has lost digits to underflow: 262,144 terms that are not quite 2^-126 */

/* The first kernel's shared memory. Behind it the vectors set aside, [THREADS / 32][aside], and their indices in the row; before these, in their place, the maxima of the sample as ordered keys; after
 * them the histogram of a row that is done again. */
struct __align__(16) stream_shared {
    uint32_t kth;
    int count, digit, above, level;
    float partial[THREADS / 32][MAX_T + 2];
    double total[MAX_T + 2];
};
template <typename T, int W> static size_t stream_bytes(int aside)
{
    size_t kept = (size_t)aside * (THREADS / 32) * (sizeof(packed<T, W>) + sizeof(int)), most = 2 * THREADS * sizeof(uint32_t);
    return sizeof(stream_shared) + (kept > most ? kept : most);
}

/* The K-th largest of 32 N keys of logits of type T, by one warp, a bit at a time from the first in which they differ: the block's other warps spend no instructions on it. */
template <typename T, int N> __device__ __forceinline__ uint32_t kth_of_keys(const uint32_t *keys, int K)
{
    constexpr int bits = 8 * (int)sizeof(T);                /* the leading ones; the others are 1 where the logit is negative, else 0 */
    uint32_t key[N], high = 0, low = 0xffffffffu;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        key[i] = keys[32 * i + threadIdx.x % 32];
        high = max(high, key[i]);
        low = min(low, key[i]);
    }
    high = __reduce_max_sync(0xffffffffu, high);
    low = __reduce_min_sync(0xffffffffu, low);
    if (high == low) return high;
    int first = 31 - __clz((int)(high ^ low));
    uint32_t prefix = high & ~(uint32_t)((2ull << first) - 1);
    for (int b = first; b >= 32 - bits; b--) {
        uint32_t trial = prefix | 1u << b;
        int n[2] = {};
        #pragma unroll
        for (int i = 0; i < N; i++) n[i % 2] += key[i] >= trial;
        if (__reduce_add_sync(0xffffffffu, n[0] + n[1]) >= K) prefix = trial;
    }
    return bits < 32 && !(prefix >> 31) ? prefix | 0xffffu : prefix;
}

/* -infinity becomes GONE, by finite() or, two bf16 at a time, before: then y (t c - shift) is 0 where y is. NaN stays NaN. */
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

/* The largest of a vector, as a pair of which one is it where that is cheaper; NaN counts only where there is nothing else. */
template <int W> __device__ __forceinline__ __nv_bfloat162 largest_pair(const packed<bf16, W> &v)
{
    __nv_bfloat162 m = *reinterpret_cast<const __nv_bfloat162 *>(&v.word[0]);
    #pragma unroll
    for (int i = 1; i < W / 2; i++) m = __hmax2(m, *reinterpret_cast<const __nv_bfloat162 *>(&v.word[i]));
    return m;
}
template <typename T, int W> __device__ __forceinline__ float largest(const packed<T, W> &v)
{
    if constexpr (sizeof(T) == 2 && W == 8) {
        __nv_bfloat162 m = largest_pair<W>(v);
        return fmaxf(__low2float(m), __high2float(m));
    }
    float t[W], most = -CUDART_INF_F;
    unpack<T, W>(t, v);
    #pragma unroll
    for (int i = 0; i < W; i++) most = fmaxf(most, t[i]);
    return most;
}
/* whether one of them reaches the floor, which T holds exactly */
template <typename T, int W> __device__ __forceinline__ bool reaches(const packed<T, W> &v, float reached)
{
    if constexpr (sizeof(T) == 2 && W == 8) return __hge2_mask(largest_pair<W>(v), __float2bfloat162_rn(reached)) != 0;
    return largest<T, W>(v) >= reached;
}

/* logits of -infinity */
template <typename T, int W> __device__ __forceinline__ packed<T, W> none()
{
    packed<T, W> v;
    #pragma unroll
    for (int w = 0; w < (int)(sizeof v.word / 4); w++) v.word[w] = sizeof(T) == 2 ? 0xff80ff80u : 0xff800000u;
    return v;
}

/* GONE in place of what reaches the floor */
template <typename T, int W> __device__ __forceinline__ void keep_below(packed<T, W> &v, float reached)
{
    if constexpr (sizeof(T) == 2 && W == 8) {
        const __nv_bfloat162 level = __float2bfloat162_rn(reached), gone = __float2bfloat162_rn(GONE);
        #pragma unroll
        for (int i = 0; i < W / 2; i++) {
            uint32_t reaching = __hge2_mask(*reinterpret_cast<const __nv_bfloat162 *>(&v.word[i]), level);
            v.word[i] = (v.word[i] & ~reaching) | (*reinterpret_cast<const uint32_t *>(&gone) & reaching);
        }
        return;
    }
    float t[W];
    unpack<T, W>(t, v);
    #pragma unroll
    for (int i = 0; i < W; i++) if (t[i] >= reached) t[i] = GONE;
    v = pack<T, W>(t);
}

/* total[i] = sum over the block of x[i] */
template <int WARPS, int N> __device__ __forceinline__ void block_totals(double *total, float (&partial)[WARPS][MAX_T + 2], const float (&x)[N])
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        float v = warp_reduce(x[i], add_op());
        if (lane == 0) partial[warp][i] = v;
    }
    __syncthreads();
    if ((int)threadIdx.x < N) {
        double t = 0;
        for (int w = 0; w < WARPS; w++) t += partial[w][threadIdx.x];
        total[threadIdx.x] = t;
    }
    __syncthreads();
}

/* A row again from memory. The list gets exactly its K first entries; total[] the sums over everything else relative to `floor`, which
 * becomes the largest of them. */
template <typename T, int W>
__device__ __noinline__ void row_again(stream_shared &s, unsigned *histogram, unsigned long long *list, float &floor, const T *row, const targets_shape &shape, int K, int64_t Vv)
{
    constexpr int BATCH = 4;
    /* The K-th key, eight bits at a time: keys are distinct, so the entries at or above it are exactly K. */
    unsigned long long prefix = 0, mask = 0;
    int wanted = K;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
        __syncthreads();
        for_each_vector<T, W, BATCH, false>(row, Vv, [&](float (&x)[W], int64_t j) {
            for (int i = 0; i < W; i++) {
                unsigned long long e = ranking(x[i], (int)j + i);
                if (j + i < Vv && (e & mask) == prefix) atomicAdd(&histogram[e >> shift & 255], 1u);
            }
        });
        __syncthreads();
        if (threadIdx.x == 0) {
            int above = 0, d = 255;
            while (d > 0 && above + (int)histogram[d] < wanted) above += (int)histogram[d--];
            s.digit = d;
            s.above = above;
            s.level = (int)histogram[d];
        }
        __syncthreads();
        prefix |= (unsigned long long)s.digit << shift;
        mask |= 255ull << shift;
        wanted -= s.above;
        if (s.level == wanted) break;                       /* all that begin so: what follows does not matter */
    }
    __syncthreads();
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    float most = -CUDART_INF_F;
    for_each_vector<T, W, BATCH, false>(row, Vv, [&](float (&x)[W], int64_t j) {
        for (int i = 0; i < W; i++) {
            unsigned long long e = ranking(x[i], (int)j + i);
            if (j + i >= Vv) continue;
            if (e >= prefix) {
                int at = atomicAdd(&s.count, 1);
                if (at < MAX_K) list[at] = e;
            } else most = fmaxf(most, x[i]);
        }
    });
    most = block_max(most);
    floor = most > -CUDART_INF_F ? most : 0;
    float sum[MAX_T + 2] = {};
    for_each_vector<T, W, 1, false>(row, Vv, [&](float (&x)[W], int64_t j) {
        for (int i = 0; i < W; i++) {
            if (j + i >= Vv || ranking(x[i], (int)j + i) >= prefix) continue;
            float d = x[i] - floor, y0 = 0;
            if (d < GONE) d = GONE;                         /* NaN stays */
            #pragma unroll
            for (int k = 0; k <= MAX_T; k++) {
                if (k >= shape.slots) continue;
                float y = exp2_fast(d * shape.c[k]);
                sum[k] += y;
                if (k == shape.slot_of[0]) y0 = y;
            }
            sum[MAX_T + 1] += y0 * d;
        }
    });
    block_totals(s.total, s.partial, sum);
}

/* What reaches the floor of a vector that begins at column `first`, and is in memory -> the list */
template <typename T, int W> __device__ __forceinline__ void take_reaching(unsigned long long *list, int *count, int room, const packed<T, W> &v, const T *in_memory, float reached, int first)
{
    float t[W];
    unsigned which = 0;
    unpack<T, W>(t, v);
    #pragma unroll
    for (int i = 0; i < W; i++) which |= (unsigned)(t[i] >= reached) << i;
    for (int at = atomicAdd(count, __popc(which)); which; which &= which - 1, at++) {
        int i = __ffs((int)which) - 1;
        if (at < room) list[at] = ranking(to_float(in_memory[i]), first + i);
    }
}

/* A vector that is not needed again */
template <typename T, int W> __device__ __forceinline__ packed<T, W> load_last(const T *p)
{
    if constexpr (sizeof(packed<T, W>) == 16) {
        uint4 q = __ldcs(reinterpret_cast<const uint4 *>(p));
        return {{q.x, q.y, q.z, q.w}};
    } else return load_packed<T, W>(p);
}

/* u^P; what powers have in common is computed once */
template <int P> __device__ __forceinline__ float power(float u)
{
    if constexpr (P == 1) return u;
    else if constexpr (P % 2) return power<P - 1>(u) * u;
    else {
        float half = power<P / 2>(u);
        return half * half;
    }
}

/* y of the slots from K on that are powers of u */
template <int SLOTS, int POWERS, int K = 0> __device__ __forceinline__ void powers_of(float u, float (&y)[SLOTS])
{
    constexpr int p = power_of(POWERS, K);
    if constexpr (p > 0) y[K] = power<p>(u);
    if constexpr (K + 1 < SLOTS) powers_of<SLOTS, POWERS, K + 1>(u, y);
}

/* T0: the slot of the first temperature, -1: whichever the shape says. POWERS: as in targets_shape. total[SLOTS] of a part: the sum of 2^e times e at T0; where T0's slot is a power, e is the root's exponent. */
template <typename T, int W, int SLOTS, int POWERS, int T0>
__global__ void __launch_bounds__(THREADS, BLOCKS) stream_kernel(row_part *parts, unsigned long long *lists, const T *__restrict__ logits, const __grid_constant__ targets_shape shape, int64_t V, int Vv)
{
    extern __shared__ __align__(16) unsigned char memory[];
    stream_shared &s = *reinterpret_cast<stream_shared *>(memory);
    packed<T, W> *aside = reinterpret_cast<packed<T, W> *>(memory + sizeof s);
    int *aside_index = reinterpret_cast<int *>(aside + THREADS / 32 * shape.aside);
    uint32_t *sampled = reinterpret_cast<uint32_t *>(memory + sizeof s);
    const T *row = logits + blockIdx.x * V;
    unsigned long long *list = lists + (int64_t)blockIdx.x * shape.room;
    const int K = shape.K > 0 ? shape.K : 1, T0_slot = T0 >= 0 ? T0 : shape.slot_of[0], me = threadIdx.x;
    const bool two = K > THREADS / 4;                       /* maxima of a thread; one is as good where few are wanted */

    /* A round is AHEAD stages. After the whole ones comes one of `left` stages, at most AHEAD - 1, and, in the last place, for some threads, a vector that fills no stage; what fills no vector is an
     * element of some. */
    const int vectors = Vv / W, stages = vectors / THREADS, rounds = stages / AHEAD, left = stages - rounds * AHEAD;
    const bool has_vector = me < vectors - stages * THREADS, has_element = me < Vv - vectors * W;

    /* 1: the floor */
    float most[2] = {-CUDART_INF_F, -CUDART_INF_F};
    {
        /* stages of a sample of as many logits whatever a vector holds; where the row has no more, it is the row */
        constexpr int samples = SAMPLE * 8 / W, BATCH = 8;
        #pragma unroll 2
        for (int batch = 0; batch < samples / BATCH; batch++) {
            packed<T, W> v[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int n = batch * BATCH + i, stage = stages > samples ? n * stages / samples : n;
                if (n < stages) v[i] = load_packed<T, W>(row + (stage * THREADS + me) * W);
            }
            #pragma unroll
            for (int i = 0; i < BATCH; i++) if (batch * BATCH + i < stages) most[batch % 2] = fmaxf(most[batch % 2], largest<T, W>(v[i]));
        }
        if (stages < samples && has_vector) most[1] = fmaxf(most[1], largest<T, W>(load_packed<T, W>(row + (stages * THREADS + me) * W)));
    }
    packed<T, W> ahead[AHEAD];
    const T *from = row + me * W;                           /* of the round that is asked for next; whole: it is not the last */
    auto fetch = [&](int i, bool whole) {
        if (whole || (i < AHEAD - 1 && i < left)) ahead[i] = load_last<T, W>(from + i * (THREADS * W));
        else if (i == AHEAD - 1 && has_vector) ahead[i] = load_last<T, W>(from + left * (THREADS * W));
    };
    #pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(i, rounds > 0);
    sampled[me] = ordered_key(two ? most[0] : fmaxf(most[0], most[1]));
    if (two) sampled[THREADS + me] = ordered_key(most[1]);
    __syncthreads();
    if (me < 32) {
        uint32_t kth = two ? kth_of_keys<T, 2 * THREADS / 32>(sampled, K) : kth_of_keys<T, THREADS / 32>(sampled, K);
        if (me == 0) {
            s.kth = kth;
            s.count = 0;
        }
    }
    __syncthreads();
    float reached = key_value(s.kth), floor = reached > GONE ? reached : 0;

    /* 2: the stream */
    int kept = 0;
    float sum[SLOTS + 1] = {}, shift[SLOTS];
    const float root_shift = floor * shape.root_c;
    #pragma unroll
    for (int k = 0; k < SLOTS; k++) shift[k] = floor * shape.c[k];
    auto add = [&](float t) {                               /* NaN too, which reaches nothing */
        float y[SLOTS], root = 0, y0 = 0, e0 = 0;
        t = finite<T, W>(t);
        if (POWERS) {
            root = fmaf(t, shape.root_c, -root_shift);
            powers_of<SLOTS, POWERS>(exp2_fast(root), y);
        }
        #pragma unroll
        for (int k = 0; k < SLOTS; k++) {
            float e = root;
            if (!power_of(POWERS, k)) {
                e = fmaf(t, shape.c[k], -shift[k]);
                y[k] = exp2_fast(e);
            }
            sum[k] += y[k];
            if (k == T0_slot) { y0 = y[k]; e0 = e; }
        }
        sum[SLOTS] = fmaf(y0, e0, sum[SLOTS]);
    };
    auto add_vector = [&](packed<T, W> v) {
        float t[W];
        make_finite<T, W>(v);
        unpack<T, W>(t, v);
        #pragma unroll
        for (int i = 0; i < W; i++) add(t[i]);
    };
    aside += me / 32 * shape.aside;                         /* this warp's */
    aside_index += me / 32 * shape.aside;
    /* The whole warp takes part. */
    auto consume = [&](packed<T, W> v, int stage, bool there) {
        const bool apart = there && reaches<T, W>(v, reached);
        const unsigned which = __ballot_sync(0xffffffffu, apart);
        if (which) {
            int at = kept + __popc(which & ((1u << me % 32) - 1));
            if (apart && at < shape.aside) {
                aside[at] = v;
                aside_index[at] = stage * THREADS + me;
            }
            kept += __popc(which);
        }
        if (apart) v = none<T, W>();
        add_vector(v);
    };
    for (int round = 0; round < rounds; round++) {
        from += AHEAD * THREADS * W;
        #pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            consume(ahead[i], round * AHEAD + i, true);
            fetch(i, round + 1 < rounds);
        }
    }
    #pragma unroll
    for (int i = 0; i < AHEAD - 1; i++) if (i < left) consume(ahead[i], rounds * AHEAD + i, true);
    consume(has_vector ? ahead[AHEAD - 1] : none<T, W>(), stages, has_vector);
    if (has_element) {
        const T *t = row + vectors * W + me;
        packed<T, 1> v = load_packed<T, 1>(t);
        if (to_float(*t) >= reached) take_reaching<T, 1>(list, &s.count, shape.room, v, t, reached, vectors * W + me);
        else add(to_float(*t) < GONE ? GONE : to_float(*t));
    }
    __syncwarp();
    for (int h = me % 32; h < min(kept, shape.aside); h += 32) {
        packed<T, W> v = aside[h];
        take_reaching<T, W>(list, &s.count, shape.room, v, reinterpret_cast<const T *>(aside + h), reached, aside_index[h] * W);
        keep_below<T, W>(v, reached);
        add_vector(v);
    }
    if (me % 32 == 0 && kept > shape.aside) atomicAdd(&s.count, shape.room + 1);
    __syncthreads();
    block_totals(s.total, s.partial, sum);
    bool again = s.count > shape.room;
    if (s.count == K && Vv > K) for (int i = 0; i < shape.nT; i++) again |= s.total[shape.slot_of[i]] < TINY;
    if (again) row_again<T, W>(s, sampled, list, floor, row, shape, K, Vv);
    row_part &part = parts[blockIdx.x];
    if (me < (again ? MAX_T + 2 : SLOTS + 1)) part.total[me] = s.total[me];
    if (me) return;
    part.floor = floor;
    part.count = again ? K : s.count;
    part.again = again;
}

template <typename T>
__global__ void __launch_bounds__(256) scaled_logits_kernel(uint16_t *full, const T *__restrict__ logits, float inv_T0, int64_t R, int64_t V, int64_t Vv)
{
    int64_t j = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (j >= Vv) return;
    for (int64_t n = blockIdx.y; n < R; n += gridDim.y) full[n * Vv + j] = __half_as_ushort(__float2half_rn(to_float(logits[n * V + j]) * inv_T0));
}

/* Slots in falling order of temperature, `total` of them, and T in that order */
static void shape_slots(targets_shape *s, float *T, int total)
{
    int order[MAX_T + 1];
    float listed[MAX_T + 1];
    for (int i = 0; i < total; i++) {
        int at = i;
        for (; at > 0 && T[order[at - 1]] < T[i]; at--) order[at] = order[at - 1];
        order[at] = i;
        listed[i] = T[i];
    }
    s->slots = total;
    for (int k = 0; k < total; k++) {
        s->slot_of[order[k]] = k;
        T[k] = listed[order[k]];
        s->inv_T[k] = 1 / T[k];
        s->c[k] = s->inv_T[k] * LOG2E;
    }
}

/* Whether the temperatures of the slots, T, are in the ratios of these powers; if so, the shape has them. */
static bool take_powers(targets_shape *s, const float *T, int powers)
{
    double root = 0;
    for (int k = 0; k < s->slots; k++) {
        double mine = (double)T[k] * power_of(powers, k);
        if (mine && root && mine != root) return false;
        if (mine) root = mine;
    }
    s->powers = powers;
    s->root_c = root ? (float)(LOG2E / root) : 0;
    return true;
}

/* ---- launchers ---- */

struct launch_args { const targets_out *out; row_part *parts; unsigned long long *lists; const act *logits; const int32_t *labels; targets_shape *shape; const float *T; int64_t R, V, Vv; };

template <typename T, int W, int SLOTS, int POWERS, int T0> static void launch(struct backend *be, const launch_args &a)
{
    auto stream = stream_kernel<T, W, SLOTS, POWERS, T0>;
    const targets_shape &shape = *a.shape;
    struct cuda_state *state = cuda_state_of(be);
    size_t bytes = stream_bytes<T, W>(shape.aside), list_bytes = (size_t)shape.room * sizeof *a.lists;
    CUDA_CHECK(cudaFuncSetAttribute((const void *)stream, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    stream<<<(unsigned)a.R, THREADS, bytes, state->stream>>>(a.parts, a.lists, (const T *)a.logits, shape, a.V, (int)a.Vv);
    CUDA_CHECK(cudaGetLastError());
    auto rank = [&](auto kernel, int threads, size_t with_list) {
        CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)with_list));
        kernel<<<(unsigned)a.R, (unsigned)threads, with_list, state->stream>>>(*a.out, a.parts, a.lists, (const T *)a.logits, a.labels, shape, SLOTS, a.V, (int)a.Vv);
        CUDA_CHECK(cudaGetLastError());
    };
    if (shape.K <= 64) rank(rank_kernel<T, 64>, rank_shared<64>::BLOCK, sizeof(rank_shared<64>) + list_bytes);
    else rank(rank_kernel<T, MAX_K>, rank_shared<MAX_K>::BLOCK, sizeof(rank_shared<MAX_K>) + list_bytes);
}

/* The first of the kernels for SLOTS temperatures, of which the first is the lowest, that these are fit for */
template <int SLOTS, int POWERS, int... MORE> static void by_powers(struct backend *be, const launch_args &a)
{
    if (take_powers(a.shape, a.T, POWERS)) launch<bf16, vector_width<bf16>(), SLOTS, POWERS, SLOTS - 1>(be, a);
    else if constexpr (sizeof...(MORE) > 0) by_powers<SLOTS, MORE...>(be, a);
}

/* In bf16, which dumps are made in, up to three temperatures have kernels of their own: T = 1, 2, 4; 1, 2, 3; 1, 1.5, 2; 1, 2, 5; and what is like them. */
static void by_slots(struct backend *be, const launch_args &a)
{
    constexpr int W = vector_width<bf16>();
    bool lowest = a.shape->slot_of[0] == a.shape->slots - 1;
    switch (a.shape->slots > 3 ? 0 : lowest ? a.shape->slots : -a.shape->slots) {
    case 1:  by_powers<1, 0>(be, a); break;
    case 2:  by_powers<2, 0x21, 0x32, 0x31, 0>(be, a); break;
    case 3:  by_powers<3, 0x421, 0x632, 0x643, 0xa52, 0x021, 0x210, 0>(be, a); break;
    case -2: launch<bf16, W, 2, 0, -1>(be, a); break;
    case -3: launch<bf16, W, 3, 0, -1>(be, a); break;
    default: launch<bf16, W, MAX_T + 1, 0, -1>(be, a);
    }
}

/* Entries that a row's list has room for. Of rows of 152k independent logits some 340 reach the floor for top 64, 1,640 for top 256: K-th of the sample's 256 (512) maxima of 128 (64) logits. They are
 * more in longer rows, of which the sample is a smaller part. */
static int longer_rows(int n, int64_t V) { return V <= 153600 ? n : (int)(n * V / 153600); }
static int list_room(int K, int64_t V) { return longer_rows(K <= 85 ? 1024 : 12 * K, V); }

/* Vectors that a warp sets aside: of such rows 43 or 205 in the mean. More than 336 leave no room for BLOCKS blocks. */
static int set_aside(int K, int64_t V) { return longer_rows(K <= 85 ? 128 : 336, V); }

/* Parts and lists of a launch; a chunk whose rows need more goes in several. */
constexpr size_t MOST_SCRATCH = CUDA_PRODUCT_WORKSPACE;
static size_t row_scratch(int K, int64_t V) { return sizeof(row_part) + (size_t)list_room(K, V) * sizeof(unsigned long long); }

extern "C" size_t cuda_teacher_targets_scratch(struct backend *be, const struct op_limits *l)
{
    (void)be;
    size_t all = (size_t)l->chunk_rows * row_scratch(MAX_K, l->V) + 256;      /* a model's limits do not say which K its targets have */
    return all < MOST_SCRATCH ? all : MOST_SCRATCH;
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
    shape.aside = set_aside(out->K, Vv);
    shape.room = list_room(out->K, Vv);
    for (int i = shape.slots; i <= MAX_T; i++) { shape.inv_T[i] = shape.inv_T[0]; shape.c[i] = shape.c[0]; }
    size_t per_row = row_scratch(out->K, Vv);
    int64_t launches = div_up(R, (int64_t)((MOST_SCRATCH - 256) / per_row)), rows = div_up(R, launches);
    char *scratch = (char *)cuda_scratch(be, (size_t)rows * per_row + 256);
    unsigned long long *lists = (unsigned long long *)(void *)(scratch + cuda_round_up((size_t)rows * sizeof(row_part)));
    for (int64_t first = 0; first < R; first += rows) {
        targets_out o = {out->head_ids, out->head_logprob, out->lse, out->tail_logmass, out->entropy, out->label_logprob, out->padding_mass};
        if (o.head_ids) o.head_ids += first * out->K;
        if (o.head_logprob) o.head_logprob += first * out->K;
        if (o.lse) o.lse += first * nT;
        if (o.tail_logmass) o.tail_logmass += first * nT;
        if (o.entropy) o.entropy += first;
        if (o.label_logprob) o.label_logprob += first;
        if (o.padding_mass) o.padding_mass += first;
        DISPATCH(be->act_dtype, E,
            constexpr int W = vector_width<E>();
            launch_args a = {&o, (row_part *)(void *)scratch, lists, (const act *)((const E *)logits + first * V), labels ? labels + first : NULL, &shape, T, least(rows, R - first), V, Vv};
            bool wide = V % W == 0 && aligned16(logits);
            if (wide && sizeof(E) == 2) by_slots(be, a);
            else if (wide) launch<E, W, MAX_T + 1, 0, -1>(be, a);
            else launch<E, 1, MAX_T + 1, 0, -1>(be, a));
    }
    if (!out->full) return;
    DISPATCH(be->act_dtype, E, scaled_logits_kernel<E><<<dim3((unsigned)div_up(Vv, 256), (unsigned)least(R, 65535)), 256, 0, cuda_state_of(be)->stream>>>(
        out->full, (const E *)logits, 1 / out->temperatures[0], R, V, Vv));
    CUDA_CHECK(cudaGetLastError());
}
