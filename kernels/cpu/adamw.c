/* AdamW (Loshchilov & Hutter 2019, algorithm 2), with the clip of the global norm folded in:
 *     g' = g min(1, clip / (norm + 1e-6))      m = b1 m + (1-b1) g'      v = b2 v + (1-b2) g'^2
 *     w = w - lr (decay w + (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps))
 * A norm that is not finite leaves everything as it was. With a master it is the w of this formula, and the weights become a
 * copy of it; here both are fp32, so that nothing but the memory differs. */
#include "kernels/cpu/cpu.h"

void cpu_adamw(struct backend *be, act *w_, float *master, const grad *g_, moment *m_, moment *v_, int64_t count, const double *grad_sum_squares, const struct adamw_args *a)
{
    (void)be;
    if (!isfinite(*grad_sum_squares)) return;
    float *w = fp32(w_), *own = master ? master : w, *m = (float *)m_, *v = (float *)v_;
    const float *g = cgfp32(g_);
    double norm = sqrt(*grad_sum_squares), shrink = a->clip > 0 ? a->clip / (norm + 1e-6) : 1;
    float scale = (float)(shrink < 1 ? shrink : 1), b1 = (float)a->beta1, b2 = (float)a->beta2, eps = (float)a->eps;
    float step_size = (float)(a->lr / (1 - pow(a->beta1, (double)a->step))), v_scale = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->step)));
    float decay = (float)(a->lr * a->weight_decay), new1 = (float)(1 - a->beta1), new2 = (float)(1 - a->beta2);
    #pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float gi = g[i] * scale;
        m[i] = b1 * m[i] + new1 * gi;
        v[i] = b2 * v[i] + new2 * gi * gi;
        own[i] -= decay * own[i] + step_size * m[i] / (sqrtf(v[i]) * v_scale + eps);   /* 1 - decay would round a small decay away */
        w[i] = own[i];
    }
}
