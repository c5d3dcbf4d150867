/* libFuzzer target: config.json. What is accepted must be usable (finite frequencies, a positive count of parameters) and must
 * read back as the same model from what model_config_to_json() writes. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "data/model_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_t *json = NULL, *written = NULL;
    struct model_config *c = NULL, *again = NULL;
    char hex[65], hex_again[65];
    int rc = OK;
    TRY(json_read_text((const char *)data, size, "input", &json));
    TRY(model_config_from_json(&c, json, "input"));
    double *w = xmalloc((size_t)c->head_dim / 2 * sizeof *w), factor;
    rope_inverse_frequencies(c, w, &factor);
    for (int i = 0; i < c->head_dim / 2; i++) CHECK(isfinite(w[i]) && w[i] >= 0, "frequency %d is %g", i, w[i]);
    CHECK(isfinite(factor) && factor > 0, "attention factor %g", factor);
    free(w);
    CHECK(model_config_parameters(c) > 0 && model_config_forward_flops(c, 4096) > 0, "counts");
    written = model_config_to_json(c, "bfloat16");
    CHECK(model_config_from_json(&again, written, "written") == OK, "what was written is refused: %s", fail_message());
    model_config_hash(c, hex);
    model_config_hash(again, hex_again);
    CHECK(!strcmp(hex, hex_again), "what was written is another model");
out:
    model_config_free(c);
    model_config_free(again);
    json_decref(json);
    json_decref(written);
    return 0;
}
