/* The element types of GGUF: floats <-> bytes. The numbers are ggml's; rounding is that of ggml's reference (quantize_row_q8_0_ref)
 * and of gguf-py, so that files of the same weights are the same bytes.
 *
 *     q8_0   d = max|x| / 127 over a block of 32, stored in f16; q = round(x / d), half away from zero, with d BEFORE it was rounded
 */
#include "data/gguf.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"

enum { BLOCK_BYTES = 2 + GGUF_BLOCK };

const char *gguf_dtype_name(enum gguf_dtype t)
{
    switch (t) {
    case GGUF_DTYPE_F32: return "f32";
    case GGUF_DTYPE_F16: return "f16";
    case GGUF_DTYPE_BF16: return "bf16";
    case GGUF_DTYPE_Q8_0: return "q8_0";
    }
    return "unknown";
}

size_t gguf_dtype_bytes(enum gguf_dtype t, int64_t count)
{
    if (t == GGUF_DTYPE_F32) return (size_t)count * 4;
    if (t != GGUF_DTYPE_Q8_0) return (size_t)count * 2;
    CHECK(count % GGUF_BLOCK == 0, "%lld elements are no whole blocks of q8_0", (long long)count);
    return (size_t)(count / GGUF_BLOCK) * BLOCK_BYTES;
}

static void encode_block(const float *x, unsigned char *out)
{
    float largest = 0;
    for (int i = 0; i < GGUF_BLOCK; i++) if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
    float d = largest / 127, inverse = d != 0 ? 1 / d : 0;
    uint16_t bits = f16_from_float(d);
    memcpy(out, &bits, 2);
    for (int i = 0; i < GGUF_BLOCK; i++) {
        float q = roundf(x[i] * inverse);             /* 1/d of a subnormal d is infinite: the block's d is 0 then, and so is what is read */
        out[2 + i] = (unsigned char)(int8_t)(q >= -127 && q <= 127 ? q : 0);
    }
}

void gguf_encode(enum gguf_dtype t, const float *x, int64_t count, void *bytes)
{
    unsigned char *out = bytes;
    switch (t) {
    case GGUF_DTYPE_F32:
        memcpy(out, x, (size_t)count * 4);
        break;
    case GGUF_DTYPE_F16: case GGUF_DTYPE_BF16:
        #pragma omp parallel for schedule(static) if (count > 1 << 16)
        for (int64_t i = 0; i < count; i++) {
            uint16_t h = t == GGUF_DTYPE_F16 ? f16_from_float(x[i]) : bf16_from_float(x[i]);
            memcpy(out + 2 * i, &h, 2);
        }
        break;
    case GGUF_DTYPE_Q8_0:
        CHECK(count % GGUF_BLOCK == 0, "%lld elements are no whole blocks of q8_0", (long long)count);
        #pragma omp parallel for schedule(static) if (count > 1 << 16)
        for (int64_t b = 0; b < count / GGUF_BLOCK; b++) encode_block(x + b * GGUF_BLOCK, out + b * BLOCK_BYTES);
        break;
    }
}

void gguf_decode(enum gguf_dtype t, const void *bytes, int64_t count, float *x)
{
    const unsigned char *in = bytes;
    switch (t) {
    case GGUF_DTYPE_F32:
        memcpy(x, in, (size_t)count * 4);
        break;
    case GGUF_DTYPE_F16: case GGUF_DTYPE_BF16:
        #pragma omp parallel for schedule(static) if (count > 1 << 16)
        for (int64_t i = 0; i < count; i++) {
            uint16_t h;
            memcpy(&h, in + 2 * i, 2);
            x[i] = t == GGUF_DTYPE_F16 ? f16_to_float(h) : bf16_to_float(h);
        }
        break;
    case GGUF_DTYPE_Q8_0:
        CHECK(count % GGUF_BLOCK == 0, "%lld elements are no whole blocks of q8_0", (long long)count);
        #pragma omp parallel for schedule(static) if (count > 1 << 16)
        for (int64_t b = 0; b < count / GGUF_BLOCK; b++) {
            uint16_t h;
            memcpy(&h, in + b * BLOCK_BYTES, 2);
            float d = f16_to_float(h);
            for (int i = 0; i < GGUF_BLOCK; i++) x[b * GGUF_BLOCK + i] = d * (float)(int8_t)in[b * BLOCK_BYTES + 2 + i];
        }
        break;
    }
}
