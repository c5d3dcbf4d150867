/* Element types of files and of device memory; names as safetensors spells them. */
#ifndef BASE_DTYPE_H
#define BASE_DTYPE_H

#include <stddef.h>

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F64, DTYPE_I64, DTYPE_I32, DTYPE_I16, DTYPE_I8, DTYPE_U64, DTYPE_U32, DTYPE_U16,
             DTYPE_U8, DTYPE_BOOL, DTYPE_F8_E4M3, DTYPE_F8_E5M2, DTYPE_COUNT };

static inline size_t dtype_width(enum dtype d)
{
    static const unsigned char width[DTYPE_COUNT] = {
        [DTYPE_F32] = 4, [DTYPE_F16] = 2, [DTYPE_BF16] = 2, [DTYPE_F64] = 8, [DTYPE_I64] = 8, [DTYPE_I32] = 4, [DTYPE_I16] = 2, [DTYPE_I8] = 1,
        [DTYPE_U64] = 8, [DTYPE_U32] = 4, [DTYPE_U16] = 2, [DTYPE_U8] = 1, [DTYPE_BOOL] = 1, [DTYPE_F8_E4M3] = 1, [DTYPE_F8_E5M2] = 1};
    return width[d];
}

#endif
