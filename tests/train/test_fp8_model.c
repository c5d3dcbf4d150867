/* Published fp8 checkpoints against PyTorch: scripts/make_fp8_model.py quantises a model in every known way and writes beside each what PyTorch's own
 * float8_e4m3fn says the weights are; both directories must load as the same weights, to the bit, both ways of loading. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"
#include "train/load.h"
#include "train/weights.h"

static char dir[200];
static struct backend *be;

static void open_all(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/fp8-model-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
    cr_assert_eq(backend_open(&be, &(struct backend_options){.device = "cpu"}), OK);
}

static void close_all(void) { backend_close(be); dir_remove_tree(dir); }
TestSuite(fp8_model, .init = open_all, .fini = close_all, .timeout = 300);

static const char *python_with_torch(void)
{
    const char *candidates[] = {getenv("DISTILL_PYTHON"), "python3", "/usr/bin/python3"}, *python = NULL;
    for (int i = 0; i < 3 && !python; i++) {
        char *probe = candidates[i] ? xasprintf("%s -c 'from importlib.util import find_spec as f; exit(not (f(\"torch\") and f(\"safetensors\")))' 2>/dev/null", candidates[i]) : NULL;
        if (probe && system(probe) == 0) python = candidates[i];
        free(probe);
    }
    if (!python) cr_skip_test("SKIPPED: no python3 with torch and safetensors; name one in DISTILL_PYTHON");
    return python;
}

static float *loaded(const char *path, struct params **t, bool threads)
{
    struct model_files *f;
    cr_assert_eq(model_files_open(&f, path), OK, "%s", fail_message());
    *t = params_new(f->config);
    float *w = new_poisoned((*t)->total);
    struct weight_home home = {.layout = weight_layout_new(*t, DTYPE_F32, 0, 0), .device = w};
    int rc = threads ? weights_load(*t, be, &home, f->tensors, path, NULL) : params_load(*t, be, (act *)w, f->tensors, path, NULL);
    cr_assert_eq(rc, OK, "%s", fail_message());
    weight_layout_free(&home.layout);
    model_files_close(f);
    return w;
}

static void compare(const char *kind)
{
    char *fp8 = xasprintf("%s/%s", dir, kind), *plain = xasprintf("%s-f32", fp8);
    struct params *t, *u;
    float *want = loaded(plain, &u, false);
    for (int threads = 0; threads < 2; threads++) {
        float *got = loaded(fp8, &t, threads);
        for (int i = 0; i < t->n; i++)
            for (int64_t k = t->p[i].offset; k < t->p[i].offset + t->p[i].count; k++)
                cr_assert_eq(memcmp(got + k, want + k, sizeof *got), 0, "%s, %s, element %lld: %.9g, PyTorch says %.9g", kind, t->p[i].part[0].name, (long long)(k - t->p[i].offset), (double)got[k],
                             (double)want[k]);
        free(got);
        params_free(t);
    }
    free(want);
    params_free(u);
    free(fp8);
    free(plain);
}

/* 24 x 40 divides nothing of the yarn case (32 wide, ffn 72), so that blocks are partial both ways. */
Test(fp8_model, every_kind_is_what_torch_dequantises)
{
    static const char *const kinds[] = {"fp8-block", "fp8-block-bf16", "fp8-tensor", "compressed-tensor", "compressed-channel", "compressed-block", "fbgemm", "modelopt"};
    char *command = xasprintf("%s %s/scripts/make_fp8_model.py %s/tests/golden/yarn/teacher -o %s --block 24 40 --dequantised%s >/dev/null", python_with_torch(), SOURCE_ROOT, SOURCE_ROOT, dir,
                             getenv("DISTILL_LONG_TESTS") ? " --libraries" : "");
    cr_assert_eq(system(command), 0, "%s", command);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) compare(kinds[i]);
    free(command);
}
