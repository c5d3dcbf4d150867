/* THE table of configuration keys: name, type, default, range, help and the commands that read it.
 * Also what is printed from it alone: a command's --help and the Markdown reference. It reads and stores no value (config.c does).
 * A new key is one row here and one member of struct config. */
#include "train/options.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "data/shard.h"

/* commands, one letter each, so that a row stays a row */
enum { D = 1 << CMD_TEACHER_DUMP, T = 1 << CMD_TRAIN, E = 1 << CMD_EVAL, G = 1 << CMD_GENERATE, X = 1 << CMD_EXPORT, B = 1 << CMD_BENCH, V = 1 << CMD_TOKENIZER_TRAIN,
       I = 1 << CMD_IMPORT_LOGITS };

#define EXACT_MAX 9007199254740992.0   /* 2^53: every whole number up to it is a double, so JSON and YAML readers keep it */
#define MANY 1e12                      /* more rows, steps or tokens than any run has */

#define TEXT(name, member, value, commands, help)            {name, OPTION_TEXT, offsetof(struct config, member), value, 0, 0, false, false, NULL, commands, help}
#define TEXTS(name, member, value, commands, help)           {name, OPTION_TEXTS, offsetof(struct config, member), value, 0, 0, false, false, NULL, commands, help}
#define SWITCH(name, member, value, commands, help)          {name, OPTION_SWITCH, offsetof(struct config, member), value, 0, 0, false, false, NULL, commands, help}
#define WHOLE(name, member, value, low, high, commands, help) {name, OPTION_WHOLE, offsetof(struct config, member), value, low, high, false, false, NULL, commands, help}
#define REAL(name, member, value, low, high, commands, help)  {name, OPTION_REAL, offsetof(struct config, member), value, low, high, false, false, NULL, commands, help}
#define ABOVE(name, member, value, low, high, commands, help) {name, OPTION_REAL, offsetof(struct config, member), value, low, high, true, false, NULL, commands, help}
#define BELOW(name, member, value, low, high, commands, help) {name, OPTION_REAL, offsetof(struct config, member), value, low, high, false, true, NULL, commands, help}
#define INSIDE(name, member, value, low, high, commands, help) {name, OPTION_REAL, offsetof(struct config, member), value, low, high, true, true, NULL, commands, help}
#define REALS(name, member, value, low, high, commands, help) {name, OPTION_REALS, offsetof(struct config, member), value, low, high, false, false, NULL, commands, help}
#define CHOICE(name, member, value, choices, commands, help) {name, OPTION_CHOICE, offsetof(struct config, member), value, 0, 0, false, false, choices, commands, help}

const struct option options[] = {
    TEXT  ("run.dir", run_dir, "run", T | E | G | X | B, "directory of this run: checkpoints, metrics, the resolved configuration; bench: where its temporary files are"),
    CHOICE("run.device", run_device, "cpu", "cpu|cuda", D | T | E | G | X | B, "where the arithmetic runs"),
    WHOLE ("run.threads", run_threads, "0", 0, 4096, D | T | E | G | X | B | V, "CPU threads; 0: all cores"),
    WHOLE ("run.seed", run_seed, "1", 0, EXACT_MAX, D | T | E | I, "seed of everything random: order of documents and rows, initial weights"),
    SWITCH("run.resume", run_resume, "false", T, "go on from the last checkpoint in run.dir, as --resume does"),

    TEXT  ("teacher.path", teacher_path, "", D | T | E | B | I, "Hugging Face directory of the teacher"),
    CHOICE("teacher.weights", teacher_weights, "auto", "auto|resident|streamed", D | E | B,
           "streamed: blocks wait in host memory and come onto the device one after another while it computes; auto: streamed where the device cannot hold them all"),
    CHOICE("teacher.precision", teacher_precision, "native", "native|fp8", D | B,
           "fp8: the matrices of the blocks, and what they multiply, are rounded to e4m3 with a scale per row; native: the device's type (cpu fp32, cuda bf16)"),
    WHOLE ("teacher.fp8_native_first", teacher_fp8_native_first, "1", 0, 4096, D | B, "teacher.precision fp8: so many blocks at the front stay native; the first alone makes a third to two thirds of the error"),
    WHOLE ("teacher.fp8_native_last", teacher_fp8_native_last, "0", 0, 4096, D | B, "teacher.precision fp8: so many blocks at the end stay native"),

    CHOICE("student.init", student_init, "hf", "hf|checkpoint|scratch|teacher", D | T,
           "first weights: a Hugging Face directory, a checkpoint, random by student.config, or layers of the teacher"),
    TEXT  ("student.path", student_path, "", D | T | B, "the directory for student.init hf and checkpoint"),
    TEXT  ("student.config", student_config, "", T | B, "config.json of the student for student.init scratch"),
    WHOLE ("student.keep_every", student_keep_every, "2", 1, 1000, T, "student.init teacher: keep every n-th layer"),

    TEXT  ("tokenizer.path", tokenizer_path, "", D | T | E | G | X | V | I, "tokenizer.json or its directory; empty: the model's own (tokenizer-train: where to write it)"),
    WHOLE ("tokenizer.vocab_size", tokenizer_vocab_size, "4096", 257, 262144, V, "tokens of a new tokenizer, special tokens included"),

    TEXTS ("corpus.files", corpus_files, "", D | T | E | V, "list of paths, globs and directories (searched for *.txt *.md *.jsonl)"),
    CHOICE("corpus.format", corpus_format, "auto", "auto|text|jsonl|ids", D | T | E | V, "auto: .jsonl and .json by their fields, everything else is text"),
    CHOICE("corpus.document", corpus_document, "file", "file|line|paragraph", D | T | E | V, "what one document of a text file is; blank lines part paragraphs"),
    TEXT  ("corpus.text_field", corpus_text_field, "text", D | T | E | V, "JSONL: the field that holds the text"),
    TEXT  ("corpus.ids_field", corpus_ids_field, "ids", D | T | E, "JSONL: the field that holds token ids"),
    TEXT  ("corpus.mask_field", corpus_mask_field, "mask", D | T | E | I, "JSONL with ids: the optional field that marks the tokens to learn with 1"),
    WHOLE ("corpus.row_length", corpus_row_length, "512", 2, 65535, D | T | E | B | I, "tokens of a row; documents fill rows end to end"),
    SWITCH("corpus.append_eos", corpus_append_eos, "true", D | T | E, "end every text with the tokenizer's end-of-text token, which is learnt"),
    SWITCH("corpus.prepend_bos", corpus_prepend_bos, "false", D | T | E, "begin every text with the tokenizer's begin-of-text token"),
    REAL  ("corpus.heldout_fraction", corpus_heldout_fraction, "0.02", 0, 0.5, D | T | E, "share of the documents kept for evaluation, chosen by a hash of their content"),
    SWITCH("corpus.shuffle", corpus_shuffle, "true", D | T | E, "shuffle documents (by run.seed) before they are packed"),
    WHOLE ("corpus.max_rows", corpus_max_rows, "0", 0, MANY, D | T | E | I, "use at most this many rows; 0: all"),
    WHOLE ("corpus.max_document_tokens", corpus_max_document_tokens, "0", 0, MANY, D | T | E, "cut longer documents; 0: never"),

    TEXT  ("shards.path", shards_path, "logits", D | T | E | I, "directory of the teacher's logits, written by teacher-dump and read by train"),
    TEXT  ("shards.heldout_path", shards_heldout_path, "", D | T | E, "the same for held-out rows; empty: shards.path with -heldout added"),
    CHOICE("shards.kind", shards_kind, "hybrid", "hybrid|topk|sampled|full", D | T | B,
           "what is stored per position: the K best and m draws from the rest, the K best alone, N draws from everything, all logits; train: shards must be of the kind, k, m and draws set here, where these are not the defaults"),
    WHOLE ("shards.k", shards_k, "32", 1, SHARD_MAX_K, D | T | B | I, "hybrid, topk: how many of the teacher's best tokens are stored"),
    WHOLE ("shards.m", shards_m, "32", 1, SHARD_MAX_DRAWS, D | T | B, "hybrid: how many tokens are drawn from those outside the K best"),
    WHOLE ("shards.draws", shards_draws, "50", 1, SHARD_MAX_DRAWS, D | T | B, "sampled: how many tokens are drawn; those drawn twice are stored once"),
    REALS ("shards.temperatures", shards_temperatures, "1.0", 0.01, 100, D | B | I, "temperatures a student may train at (sampled: one); log-probabilities are stored at the first, draws are made at it"),
    WHOLE ("shards.rows_per_shard", shards_rows_per_shard, "64", 1, 1e6, D | B | I, "rows of one shard file"),
    SWITCH("shards.follow", shards_follow, "false", T, "train while the dump is still running: wait for shards that are not there yet"),
    REAL  ("shards.wait_s", shards_wait_s, "0", 0, 1e9, T, "shards.follow: give up after this many seconds without a new shard; 0: never"),
    SWITCH("shards.allow_missing", shards_allow_missing, "false", T, "train without the shards that are missing, as --allow-missing does; otherwise a missing shard stops the run"),

    WHOLE ("dump.batch_rows", dump_batch_rows, "0", 0, 65536, D | B, "rows of one forward pass of the teacher; 0: what the device's memory and the streaming of weights ask for"),
    WHOLE ("dump.chunk_tokens", dump_chunk_tokens, "1024", 1, 1048576, D | B, "positions whose logits exist at one time"),
    WHOLE ("dump.error_rows", dump_error_rows, "4", 1, 65536, D, "teacher.precision fp8: a new dump first measures on so many rows what the rounding changes; they pass through the native teacher together"),
    REAL  ("dump.max_error", dump_max_error, "0.02", 0, 1e6, D, "teacher.precision fp8: a dump does not begin when fp8 is farther from native than this, in nats per token (mean KL); 0: no bound"),

    TEXT  ("objective.divergence", objective_divergence, "forward_kl", T, "distance from teacher to student: forward_kl, reverse_kl, jsd, skew_kl, tvd, or a weighted sum such as 0.7 forward_kl + 0.3 reverse_kl"),
    CHOICE("objective.tail", objective_tail, "auto", "auto|unbiased|bucket|renormalise|drop", T,
           "teacher mass outside the K: estimated by draws (unbiased), one extra outcome, spread over the K (biased), dropped (biased); auto: bucket for topk, else unbiased"),
    INSIDE("objective.beta", objective_beta, "0.5", 0, 1, T, "jsd: weight of the teacher in the mixture"),
    BELOW ("objective.alpha", objective_alpha, "0.1", 0, 1, T, "skew_kl: share of the teacher in the mixture; 0 is forward_kl"),
    BELOW ("objective.floor", objective_floor, "0", 0, 1, T, "reverse_kl: share of the uniform distribution over the valid ids that is mixed into the teacher's, so that nothing is impossible"),
    REAL  ("objective.temperature", objective_temperature, "1", 0.01, 100, T, "T: both models' logits are divided by it, the loss is multiplied by T^2; must be among shards.temperatures"),
    REAL  ("objective.kd_weight", objective_kd_weight, "1", 0, 1e6, T, "weight of the teacher's term"),
    REAL  ("objective.ce_weight", objective_ce_weight, "0", 0, 1e6, T, "weight of cross entropy with the text itself"),

    ABOVE ("optimizer.lr", optimizer_lr, "3e-4", 0, 10, T, "peak learning rate of AdamW"),
    BELOW ("optimizer.beta1", optimizer_beta1, "0.9", 0, 1, T, "decay of the mean of gradients"),
    BELOW ("optimizer.beta2", optimizer_beta2, "0.95", 0, 1, T, "decay of the mean of squared gradients"),
    ABOVE ("optimizer.eps", optimizer_eps, "1e-8", 0, 1, T, "added to the root of the mean of squares"),
    REAL  ("optimizer.weight_decay", optimizer_weight_decay, "0.1", 0, 10, T, "decoupled decay of every matrix (embeddings included) and of no vector"),
    REAL  ("optimizer.clip", optimizer_clip, "1.0", 0, 1e6, T, "largest global norm of the gradient; 0: no clipping"),

    CHOICE("schedule.kind", schedule_kind, "cosine", "cosine|linear|constant|wsd", T, "learning rate after warm-up; wsd: constant, then linear over the last part"),
    WHOLE ("schedule.warmup_steps", schedule_warmup_steps, "0", 0, MANY, T, "steps over which the learning rate rises to optimizer.lr"),
    REAL  ("schedule.final_ratio", schedule_final_ratio, "0.1", 0, 1, T, "learning rate of the last step as a share of optimizer.lr"),
    ABOVE ("schedule.decay_fraction", schedule_decay_fraction, "0.2", 0, 1, T, "wsd: share of the steps in which the learning rate falls"),

    CHOICE("train.source", train_source, "shards", "shards|corpus", T, "learn from the teacher's logits, or (corpus) from hard labels of the text, without a teacher"),
    WHOLE ("train.steps", train_steps, "0", 0, MANY, T, "optimizer steps; 0: as many as train.epochs needs"),
    ABOVE ("train.epochs", train_epochs, "1", 0, 1e6, T, "passes over the rows when train.steps is 0"),
    WHOLE ("train.batch_rows", train_batch_rows, "16", 1, 1048576, T | B, "rows of one optimizer step"),
    WHOLE ("train.micro_rows", train_micro_rows, "4", 1, 65536, T | B, "rows of one forward and backward pass; gradients accumulate over batch_rows / micro_rows of them"),
    WHOLE ("train.chunk_tokens", train_chunk_tokens, "1024", 1, 1048576, T | E | B, "positions whose logits exist at one time"),
    CHOICE("train.recompute", train_recompute, "none", "none|swiglu_norm|ffn|block", T | B, "activations computed again in backward to save memory; the result is the same to the bit"),
    CHOICE("train.matmul", train_matmul, "native", "native|fp8", T | B,
           "fp8: the products of the blocks, forward and backward, of factors rounded to e4m3 with a scale per row; weights and moments stay what they are"),
    WHOLE ("train.fp8_native_first", train_fp8_native_first, "1", 0, 4096, T | B, "train.matmul fp8: so many blocks at the front stay native"),
    WHOLE ("train.fp8_native_last", train_fp8_native_last, "0", 0, 4096, T | B, "train.matmul fp8: so many blocks at the end stay native"),
    CHOICE("train.recipe", train_recipe, "compact", "compact|exact", T | B,
           "cuda, bytes per parameter: compact (8) keeps weights, gradients and moments in bf16 and rounds each update stochastically; exact (18) keeps gradients, moments and a master copy of the weights in fp32, the weights being the master rounded to bf16. cpu: everything is fp32, no effect"),
    WHOLE ("train.eval_every", train_eval_every, "0", 0, MANY, T, "steps between evaluations on held-out rows; 0: none"),
    WHOLE ("train.checkpoint_every", train_checkpoint_every, "0", 0, MANY, T, "steps between checkpoints; 0: only at the end"),
    WHOLE ("train.keep_checkpoints", train_keep_checkpoints, "2", 1, 1e6, T, "older checkpoints are removed"),
    WHOLE ("train.log_every", train_log_every, "0", 0, MANY, T, "steps between progress lines; 0: every step on a terminal, every few seconds elsewhere; metrics.jsonl has every step"),
    WHOLE ("train.measure_every", train_measure_every, "10", 1, MANY, T, "steps between measurements of KD's and CE's shares of the gradient, which take a slower loss kernel; the first and the last step are measured too"),
    SWITCH("train.deterministic", train_deterministic, "false", T | B, "cuda: a run repeated on the same card is the same to the bit; attention's backward is then many times slower. cpu: always so"),
    SWITCH("train.check_alignment", train_check_alignment, "true", T, "before the first step: the targets must make the next token likelier than the one before it and the one after it"),
    CHOICE("train.spike", train_spike, "off", "off|skip|stop", T, "a step whose loss or gradient norm is far above that of the 64 steps before it: an update as any other, one that is left out, or the end of the run"),
    ABOVE ("train.spike_threshold", train_spike_threshold, "10", 0, 1e6, T, "train.spike: how far above the median, in standard deviations as the median absolute deviation estimates them"),
    WHOLE ("train.spike_most", train_spike_most, "3", 0, 1e6, T, "train.spike skip: stop when more than this many steps in a row would be left out"),

    REAL  ("memory.limit_gib", memory_limit_gib, "0", 0, 1e6, D | T | E | B, "most memory the plan may take; 0: what the machine has"),

    TEXT  ("eval.model", eval_model, "", E, "model to evaluate; empty: the run's last checkpoint"),
    TEXT  ("eval.json", eval_json, "", E, "also write the result to this file; empty: no"),
    WHOLE ("eval.max_rows", eval_max_rows, "0", 0, MANY, T | E, "evaluate on at most this many held-out rows; 0: all"),
    WHOLE ("eval.batch_rows", eval_batch_rows, "4", 1, 65536, E, "rows of one forward pass"),

    TEXT  ("generate.model", generate_model, "", G, "model that writes; empty: the run's last checkpoint"),
    TEXT  ("generate.prompt", generate_prompt, "", G, "text to go on from, used as it is"),
    WHOLE ("generate.max_tokens", generate_max_tokens, "64", 1, 1048576, G, "most tokens to write"),
    WHOLE ("generate.seed", generate_seed, "1", 0, EXACT_MAX, G, "seed of sampling"),
    REAL  ("generate.temperature", generate_temperature, "0", 0, 100, G, "0: always the most likely token"),
    ABOVE ("generate.top_p", generate_top_p, "1", 0, 1, G, "sample from the smallest set of tokens that holds this much probability"),

    TEXT  ("export.model", export_model, "", X, "model to export; empty: the run's last checkpoint"),
    TEXT  ("export.path", export_path, "", X, "where to write: a directory for safetensors, a file for gguf"),
    CHOICE("export.format", export_format, "safetensors", "safetensors|gguf", X, "file format"),
    CHOICE("export.dtype", export_dtype, "f32", "f32|f16|bf16|q8_0", X, "type of the weights; q8_0 in gguf only"),
    WHOLE ("export.max_file_mib", export_max_file_mib, "5000", 1, 1e9, X, "safetensors: larger models are split into files of this size"),

    WHOLE ("bench.steps", bench_steps, "20", 1, 1e6, B, "run at least this many steps"),
    REAL  ("bench.seconds", bench_seconds, "20", 0, 86400, B, "and at least this long; kernels: an op gets a fortieth of it, a product a tenth"),
    REAL  ("bench.checkpoint_gib", bench_checkpoint_gib, "0", 0, 1000, B, "io: size of the checkpoint that is loaded, rounded down to whole layers; 0: what bench.seconds allows"),
    WHOLE ("bench.layers", bench_layers, "0", 0, 1000, B, "measure the shape with this many layers, where all of them do not fit; 0: as many as it has"),
};
const int option_count = sizeof options / sizeof *options;

bool option_lists(const char *choices, const char *text)
{
    size_t n = strlen(text);
    for (const char *c = choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (strcspn(c, "|") == n && !strncmp(c, text, n)) return true;
    return false;
}

char *option_range(const struct option *o)
{
    switch (o->type) {
    case OPTION_TEXT:   return xstrdup("text");
    case OPTION_TEXTS:  return xstrdup("list of texts");
    case OPTION_SWITCH: return xstrdup("true|false");
    case OPTION_CHOICE: return xstrdup(o->choices);
    case OPTION_WHOLE:  return o->high >= MANY ? xasprintf("%.0f or more", o->low) : xasprintf("%.0f to %.0f", o->low, o->high);
    case OPTION_REALS:  return xasprintf("1 to %d of %.15g to %.15g", OPTION_MAX_ITEMS, o->low, o->high);
    case OPTION_REAL:   break;
    }
    return xasprintf("%s%.15g %s %.15g", o->above ? "above " : "", o->low, o->below ? "to below" : "to", o->high);
}

bool option_has_range(const struct option *o) { return o->type != OPTION_TEXT && o->type != OPTION_TEXTS && o->type != OPTION_SWITCH; }

static size_t section_length(const struct option *o) { return (size_t)(strchr(o->key, '.') - o->key); }

static bool begins_section(const struct option *o, const struct option *previous)
{
    return !previous || section_length(previous) != section_length(o) || strncmp(previous->key, o->key, section_length(o));
}

static const char *shown_default(const struct option *o) { return *o->fallback ? o->fallback : "-"; }

/* Words of `text` from column `indent` on, broken before column 100. */
static void print_wrapped(FILE *f, const char *text, int indent)
{
    int column = indent;
    for (const char *word = text; *word;) {
        int n = (int)strcspn(word, " ");
        if (column > indent && column + 1 + n > 99) { fprintf(f, "\n%*s", indent, ""); column = indent; }
        column += fprintf(f, "%s%.*s", column > indent ? " " : "", n, word);
        word += n + strspn(word + n, " ");
    }
    fputc('\n', f);
}

void config_print_help(FILE *f, enum command_id command)
{
    int widest = 0;
    for (int i = 0; i < option_count; i++) if (options[i].commands >> command & 1 && (int)strlen(options[i].key) > widest) widest = (int)strlen(options[i].key);
    fprintf(f, "  %-*s  %-11s  what it does (what it accepts)\n", widest, "key", "default");
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        if (!(o->commands >> command & 1)) continue;
        char *range = option_range(o), *text = option_has_range(o) ? xasprintf("%s (%s)", o->help, range) : xstrdup(o->help);
        fprintf(f, "  %-*s  %-11s  ", widest, o->key, shown_default(o));
        print_wrapped(f, text, 2 + widest + 2 + 11 + 2);
        free(text);
        free(range);
    }
}

void config_print_markdown(FILE *f)
{
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        if (begins_section(o, i ? o - 1 : NULL))
            fprintf(f, "%s**%.*s**\n\n| key | default | range | what it does |\n|---|---|---|---|\n", i ? "\n" : "", (int)section_length(o), o->key);
        char *range = option_range(o);
        fprintf(f, *o->fallback ? "| `%s` | `%s` | " : "| `%s` | %s | ", o->key, shown_default(o));
        for (const char *c = range; *c; c++) *c == '|' ? fputs(", ", f) : fputc(*c, f);
        fputs(" | ", f);
        for (const char *h = o->help; *h; h++) fprintf(f, *h == '*' ? "\\%c" : "%c", *h);
        fputs(" |\n", f);
        free(range);
    }
}
