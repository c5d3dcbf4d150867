/* quantization_config of config.json: how a published checkpoint stores its weights. Known are weights in e4m3 with scales, as these tools write them:
 *
 *     quant_method         scale of tensor X.weight                                          written by
 *     fp8                  X.weight_scale_inv, one per block of weight_block_size            DeepSeek-V3, Qwen3-FP8, transformers
 *                          without weight_block_size: X.weight_scale or _inv, one            AutoFP8, vLLM
 *     compressed-tensors   X.weight_scale, one, one per row or one per block                 llm-compressor, RedHatAI
 *     fbgemm_fp8           X.weight_scale, one per row                                       Meta, transformers
 *     modelopt             X.weight_scale, one                                               NVIDIA ModelOpt (quant_algo FP8)
 *
 * In all of them a weight is its number times its scale, _inv or not: the scale to multiply by, the inverse of the one it was quantised with.
 * What is said of activations and of the kv cache is read over: here activations stay in the precision that this program is told to compute in, and there is
 * no kv cache, so that neither changes what the weights are. Everything else that is not known is refused by the name of its key. */
#ifndef DATA_QUANTIZATION_H
#define DATA_QUANTIZATION_H

#include <jansson.h>
#include <stdint.h>

enum scale_kind { SCALE_NONE, SCALE_TENSOR, SCALE_ROW, SCALE_BLOCK };

struct quantization {
    enum scale_kind scales;               /* SCALE_NONE: no quantization_config, weights are what their bytes say */
    int64_t block_rows, block_cols;       /* SCALE_BLOCK */
    const char *method;                   /* quant_method, static; NULL with SCALE_NONE */
};

/* From the whole config.json; `name` is for messages. ERR_INPUT names key and value, and what is known. */
int quantization_read(struct quantization *q, const json_t *config, const char *name);
/* "one scale per tensor", "one scale per row", "one scale per block of 128 x 128"; returns `text`. */
const char *scales_text(enum scale_kind kind, int64_t block_rows, int64_t block_cols, char text[64]);

#endif
