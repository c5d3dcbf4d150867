/* What the two kernels of teacher_targets.cu share: what is asked for, what the first leaves to the second, and entries of a row's list as integers in their order. */
#ifndef KERNELS_CUDA_TEACHER_TARGETS_CUH
#define KERNELS_CUDA_TEACHER_TARGETS_CUH

#include "kernels/cuda/row_stats.cuh"

enum { MAX_K = 256, MAX_T = 8 };

/* A slot per temperature, the largest first; one more for the padding's mass where T = 1 is not listed. */
struct targets_shape {
    int nT, slots, K, slot_of[MAX_T + 1], unit_slot;
    int powers;                                             /* slot k's exponentials are the power_of(powers, k)-th powers of 2^{root_c t}; where that is 0, exponentials of their own */
    float root_c;
    int aside, room;                                        /* vectors that a warp of the first kernel sets aside; entries of a row's list */
    float inv_T[MAX_T + 1], c[MAX_T + 1];                   /* by slot; c = log2(e) / T */
    bool entropy;
};
__host__ __device__ constexpr int power_of(int powers, int slot) { return slot < 8 ? powers >> 4 * slot & 15 : 0; }

struct targets_out { int32_t *head_ids; float *head_logprob, *lse, *tail_logmass, *entropy, *label_logprob, *padding_mass; };

/* What the first kernel leaves of a row, beside its list: sums over all that is below the floor. again: of 2^{c (t - floor)}, the last of them of (t - floor) 2^{c (t - floor)}; else still of 2^{t c - fl(floor c)}. */
struct row_part { double total[MAX_T + 2]; float floor; int count; bool again; };

/* An entry of a list: larger logits first, of equal ones the lower id */
__device__ __forceinline__ unsigned long long ranking(float t, int id) { return (unsigned long long)ordered_key(t) << 32 | (uint32_t)~id; }
__device__ __forceinline__ float ranked_logit(unsigned long long e) { return key_value((uint32_t)(e >> 32)); }
__device__ __forceinline__ int ranked_id(unsigned long long e) { return (int)~(uint32_t)e; }

#endif
