/* distill generate: a prompt in, its continuation out, byte for byte as it comes. The prompt passes through the model in chunks, then one
 * token at a time; keys and values of what has passed stay in the cache. Choosing the token is sampler.c.
 *
 * Owns: the loop, where it stops, and text as a stream of whole UTF-8 characters. Chat templates are not applied: the prompt is used as it is. */
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/checkpoint.h"
#include "train/command.h"
#include "train/load.h"
#include "train/progress.h"
#include "train/sampler.h"
#include "train/student.h"

enum { PROMPT_CHUNK = 256, MAX_PROMPT_BYTES = 1 << 26 };

struct generation {
    const struct config *c;
    struct model_files *files;
    struct tokenizer *tokenizer;
    struct tokenizer_work *work;
    int32_t *stop; int n_stops;               /* tokens that end a text */
    int32_t *tokens; int64_t prompt, n, room; /* the sequence: prompt, then what was written */
    struct backend *be;
    struct memory_plan *plan;
    struct model *model;
    struct sampler *sampler;
    float *logits;                            /* [Vv] */
    char held[8]; size_t n_held;              /* the beginning of a character whose rest has not come yet */
};

/* ---- the prompt ---- */

struct prompt_flags { const char *text, *file; };

static int prompt_flag(void *context, int argc, char **argv, int *i)
{
    struct prompt_flags *f = context;
    const char **slot = !strcmp(argv[*i], "--prompt") ? &f->text : !strcmp(argv[*i], "--prompt-file") ? &f->file : NULL;
    if (!slot || *i + 1 >= argc) return 0;
    *slot = argv[++*i];
    return 1;
}

static int read_stdin(char **text, size_t *bytes)
{
    size_t room = 1 << 16, n = 0, got;
    char *data = xmalloc(room);
    if (isatty(STDIN_FILENO)) fprintf(stderr, "prompt, ended with Ctrl-D:\n");
    while ((got = fread(data + n, 1, room - n, stdin)) > 0)
        if ((n += got) == room) {
            if (room >= MAX_PROMPT_BYTES) { free(data); return fail(ERR_INPUT, "standard input: the prompt is larger than %d bytes", MAX_PROMPT_BYTES); }
            data = xrealloc(data, room *= 2);
        }
    if (ferror(stdin)) { free(data); return fail_errno(ERR_IO, "standard input: cannot be read"); }
    *text = data;
    *bytes = n;
    return OK;
}

static int read_prompt(const struct config *c, const struct prompt_flags *f, char **text, size_t *bytes)
{
    if (f->text && f->file) return fail(ERR_USAGE, "--prompt and --prompt-file are both given; give one");
    if (f->file) return file_read(f->file, MAX_PROMPT_BYTES, text, bytes);
    const char *given = f->text ? f->text : *c->generate_prompt ? c->generate_prompt : NULL;
    if (!given) return read_stdin(text, bytes);
    *text = xstrdup(given);
    *bytes = strlen(given);
    return OK;
}

/* Text -> ids, with the tokenizer's bos where its configuration puts one. */
static int encode_prompt(struct generation *g, const char *text, size_t bytes)
{
    const int32_t *ids;
    size_t n;
    int64_t room = g->c->generate_max_tokens, limit = g->files->config->max_position, V = g->files->config->vocab_size;
    int rc = tokenizer_encode(g->tokenizer, g->work, text, bytes, &ids, &n);
    if (rc != OK) return fail_in(rc, "prompt");
    int32_t bos = tokenizer_bos(g->tokenizer);
    bool add = bos >= 0 && (tokenizer_add_bos(g->tokenizer) || n == 0) && !(n > 0 && ids[0] == bos);
    if (n == 0 && !add) return fail(ERR_USAGE, "the prompt is empty and the tokenizer has no token that begins a text; give a prompt");
    g->prompt = (int64_t)n + add;
    if (g->prompt + room > limit)
        return fail(ERR_USAGE, "the prompt has %lld tokens and generate.max_tokens is %lld, together %lld, but %s has room for %lld (max_position_embeddings): shorten one of them",
                    (long long)g->prompt, (long long)room, (long long)(g->prompt + room), g->files->path, (long long)limit);
    g->tokens = xmalloc((size_t)(g->prompt + room) * sizeof *g->tokens);
    if (add) g->tokens[0] = bos;
    memcpy(g->tokens + add, ids, n * sizeof *ids);
    for (int64_t i = 0; i < g->prompt; i++)
        if (g->tokens[i] >= V)
            return fail(ERR_MISMATCH, "the prompt's token %d is outside the model's vocabulary of %lld: this tokenizer does not belong to %s", g->tokens[i],
                        (long long)V, g->files->path);
    g->n = g->prompt;
    g->room = g->prompt + room;
    return OK;
}

/* ---- where it stops ---- */

static void add_stop(struct generation *g, int64_t id)
{
    if (id < 0 || id > INT32_MAX) return;
    for (int i = 0; i < g->n_stops; i++) if (g->stop[i] == id) return;
    g->stop = xrealloc(g->stop, (size_t)(g->n_stops + 1) * sizeof *g->stop);
    g->stop[g->n_stops++] = (int32_t)id;
}

/* Any end-of-text token of config.json, generation_config.json or the tokenizer. */
static int collect_stops(struct generation *g)
{
    int rc = OK;
    char *path = path_join(g->files->path, "generation_config.json");
    json_t *json = NULL;
    const int32_t *eos = g->files->config->eos;
    for (int i = 0; i < 8 && eos[i] >= 0; i++) add_stop(g, eos[i]);
    add_stop(g, tokenizer_eos(g->tokenizer));
    if (path_exists(path)) {
        TRY(json_read_file(path, 1 << 20, &json));
        const json_t *ids = json_object_get(json, "eos_token_id");
        if (json_is_integer(ids)) add_stop(g, json_integer_value(ids));
        for (size_t i = 0; i < json_array_size(ids); i++) if (json_is_integer(json_array_get(ids, i))) add_stop(g, json_integer_value(json_array_get(ids, i)));
    }
out:
    json_decref(json);
    free(path);
    return rc;
}

static bool is_stop(const struct generation *g, int32_t id)
{
    for (int i = 0; i < g->n_stops; i++) if (g->stop[i] == id) return true;
    return false;
}

/* ---- text, as a stream ---- */

/* Length of the incomplete character at the end of text[n] that later bytes may complete; 0 when there is none. */
static size_t incomplete_tail(const unsigned char *text, size_t n)
{
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        unsigned char c = text[n - back];
        if ((c & 0xc0) == 0x80) continue;
        size_t need = c >= 0xf0 && c < 0xf5 ? 4 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xc2 && c < 0xe0 ? 2 : 1;
        return need > back ? back : 0;
    }
    return 0;
}

/* Bytes of token i of the sequence: what decoding it adds after the token before it. A pair, because some decoders drop a text's first space. */
static int write_token(struct generation *g, int64_t i)
{
    const char *text;
    size_t before = 0, bytes;
    int64_t first = i > 0 ? i - 1 : i;
    int rc = OK;
    if (first < i) {
        TRY(tokenizer_decode(g->tokenizer, g->work, g->tokens + first, 1, false, &text, &bytes));
        before = bytes;
    }
    TRY(tokenizer_decode(g->tokenizer, g->work, g->tokens + first, (size_t)(i - first + 1), false, &text, &bytes));
    size_t n = g->n_held + bytes - before;
    char *line = xmalloc(n + 1);
    memcpy(line, g->held, g->n_held);
    memcpy(line + g->n_held, text + before, bytes - before);
    g->n_held = incomplete_tail((unsigned char *)line, n);
    memcpy(g->held, line + n - g->n_held, g->n_held);
    fwrite(line, 1, n - g->n_held, stdout);
    fflush(stdout);
    free(line);
out:
    return rc;
}

static int end_text(struct generation *g)
{
    fwrite(g->held, 1, g->n_held, stdout);
    if (isatty(STDOUT_FILENO)) putchar('\n');           /* a pipe gets the text alone */
    return fflush(stdout) || ferror(stdout) ? fail_errno(ERR_IO, "standard output: cannot be written") : OK;
}

/* ---- the model ---- */

static int open_model(struct generation *g, const char *path)
{
    int rc = OK;
    char *dir = NULL;
    TRY(model_files_open(&g->files, path));
    dir = find_tokenizer_dir(g->c, (const char *const[]){path, NULL});
    if (!dir) { rc = fail(ERR_USAGE, "%s has no tokenizer.json, and text needs one: set tokenizer.path", path); goto out; }
    TRY(tokenizer_open(&g->tokenizer, dir));
    g->work = tokenizer_work_new(g->tokenizer);
    TRY(collect_stops(g));
out:
    free(dir);
    return rc;
}

static int load_model(struct generation *g)
{
    const struct config *c = g->c;
    struct backend_options device = {.device = c->run_device, .threads = (int)c->run_threads};
    int rc = OK;
    TRY(backend_open(&g->be, &device));
    TRY(model_check_device(g->be, g->files->config, g->files->path));
    g->plan = memory_plan_new(g->be);
    struct model_options o = {.N = g->prompt < PROMPT_CHUNK ? g->prompt : PROMPT_CHUNK, .max_doc = g->room, .head_rows = 1, .cache = true};
    g->model = model_new(g->be, g->files->config, &o, g->plan);
    memory_add_scratch(g->plan, model_scratch_bytes(g->model, 0));
    TRY(memory_commit(g->plan, 0));
    model_ready(g->model);
    TRY(model_files_load(g->files, g->model));
    int64_t Vv = valid_vocab(g->files->config, g->tokenizer);
    g->logits = xmalloc((size_t)Vv * sizeof *g->logits);
    g->sampler = sampler_new(Vv, c->generate_temperature, c->generate_top_p, (uint64_t)c->generate_seed);
out:
    return rc;
}

/* Logits after the last token that passed; ids that stand for nothing cannot be chosen. */
static int read_logits(struct generation *g)
{
    struct model *m = g->model;
    model_logits(m, m->n - 1, 1);
    m->be->ops->download_act(m->be, g->logits, m->logits, g->sampler->V);
    for (int64_t i = 0; i < g->sampler->V; i++) {
        if (!isfinite(g->logits[i]))
            return fail(ERR_NUMERIC, "%s: the logit of token %lld after %lld tokens is %g; look for NaN and Inf with distill inspect", g->files->path, (long long)i,
                        (long long)g->n, (double)g->logits[i]);
        if (tokenizer_token_kind(g->tokenizer, (int32_t)i) == TOKEN_HOLE) g->logits[i] = -INFINITY;
    }
    return OK;
}

static int generate(struct generation *g)
{
    int rc = OK;
    int32_t stopped = -1;
    double start = now_seconds();
    for (int64_t at = 0; at < g->prompt; at += g->model->o.N)
        model_forward_cached(g->model, g->tokens + at, g->prompt - at < g->model->o.N ? g->prompt - at : g->model->o.N);
    TRY(read_logits(g));
    double prompted = now_seconds();
    while (true) {
        int32_t id = sampler_pick(g->sampler, g->logits, g->n);
        if (is_stop(g, id)) { stopped = id; break; }
        g->tokens[g->n++] = id;
        TRY(write_token(g, g->n - 1));
        if (g->n == g->room) break;
        model_forward_cached(g->model, &id, 1);
        TRY(read_logits(g));
    }
    TRY(end_text(g));
    double done = now_seconds(), written = (double)(g->n - g->prompt), read_rate = (double)g->prompt / fmax(prompted - start, 1e-9);
    const char *end = stopped >= 0 ? tokenizer_token_text(g->tokenizer, stopped) : "generate.max_tokens";
    fprintf(stderr, "prompt %lld tokens, %.1f tok/s; written %.0f tokens, %.1f tok/s; stopped at %s\n", (long long)g->prompt, read_rate, written,
            written / fmax(done - prompted, 1e-9), end ? end : "the end of the text");
out:
    return rc;
}

int command_generate(int argc, char **argv)
{
    struct generation g = {0};
    struct prompt_flags flags = {0};
    struct config *c = NULL;
    char *path = NULL, *text = NULL;
    size_t bytes;
    int rc = OK, help;
    TRY(command_config(argc, argv, CMD_GENERATE,
                       "Continues a prompt: the continuation goes to standard output as it is written, a line with counts and speed to standard error.\n"
                       "The prompt is --prompt, --prompt-file, generate.prompt or standard input, in this order, and is used as it is (no chat template).\n"
                       "The same seed, prompt and model give the same text.",
                       "distill generate run.yaml --prompt \"The licence\" --set generate.temperature=0.8 --set generate.top_p=0.95", prompt_flag, &flags,
                       "  --prompt TEXT        the prompt\n  --prompt-file FILE   the prompt is the file's content\n", &c, &help));
    if (help) goto out;
    g.c = c;
    TRY(checkpoint_or(c->generate_model, c->run_dir, "generate.model", &path));
    TRY(open_model(&g, path));
    TRY(read_prompt(c, &flags, &text, &bytes));
    TRY(encode_prompt(&g, text, bytes));
    TRY(load_model(&g));
    TRY(generate(&g));
out:
    sampler_free(g.sampler);
    free(g.logits);
    model_free(g.model);
    memory_plan_free(g.plan);
    backend_close(g.be);
    free(g.tokens);
    free(g.stop);
    tokenizer_work_free(g.work);
    tokenizer_close(g.tokenizer);
    model_files_close(g.files);
    config_free(c);
    free(path);
    free(text);
    return rc;
}
