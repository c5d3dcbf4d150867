/* Configuration: one option table gives parsing, ranges, unknown-key errors, --help and the resolved file.
 *
 *     distill <command> CONFIG.yaml [--set section.key=value ...]
 *
 * A run is one YAML file of two levels, section.key. Relative paths are relative to the current directory. */
#ifndef TRAIN_CONFIG_H
#define TRAIN_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct string_list { char **item; int n; };
struct double_list { double *item; int n; };

/* One member per key; the name of the member is section_key. Defaults, ranges and help live in the table of options.c. */
struct config {
    /* run */
    char *run_dir; char *run_device; int64_t run_threads, run_seed; bool run_resume;
    /* teacher */
    char *teacher_path, *teacher_weights, *teacher_precision; int64_t teacher_fp8_native_first, teacher_fp8_native_last;
    /* student */
    char *student_init, *student_path, *student_config; int64_t student_keep_every;
    /* tokenizer */
    char *tokenizer_path; int64_t tokenizer_vocab_size;
    /* corpus */
    struct string_list corpus_files; char *corpus_format, *corpus_document, *corpus_text_field, *corpus_ids_field, *corpus_mask_field;
    int64_t corpus_row_length, corpus_max_rows, corpus_max_document_tokens; bool corpus_append_eos, corpus_prepend_bos, corpus_shuffle;
    double corpus_heldout_fraction;
    /* shards */
    char *shards_path, *shards_heldout_path, *shards_kind; int64_t shards_k, shards_m, shards_draws, shards_rows_per_shard; struct double_list shards_temperatures;
    bool shards_follow, shards_allow_missing; double shards_wait_s;
    /* dump */
    int64_t dump_batch_rows, dump_chunk_tokens, dump_error_rows; double dump_max_error;
    /* objective */
    char *objective_divergence, *objective_tail; double objective_beta, objective_alpha, objective_floor, objective_temperature, objective_kd_weight, objective_ce_weight;
    /* optimizer */
    double optimizer_lr, optimizer_beta1, optimizer_beta2, optimizer_eps, optimizer_weight_decay, optimizer_clip;
    /* schedule */
    char *schedule_kind; int64_t schedule_warmup_steps; double schedule_final_ratio, schedule_decay_fraction;
    /* train */
    char *train_source, *train_recompute, *train_matmul, *train_recipe; int64_t train_steps, train_batch_rows, train_micro_rows, train_chunk_tokens;
    int64_t train_eval_every, train_checkpoint_every, train_keep_checkpoints, train_log_every, train_measure_every; double train_epochs; bool train_check_alignment, train_deterministic;
    int64_t train_fp8_native_first, train_fp8_native_last;
    char *train_spike; double train_spike_threshold; int64_t train_spike_most;
    /* memory */
    double memory_limit_gib;
    /* eval */
    char *eval_model, *eval_json; int64_t eval_max_rows, eval_batch_rows;
    /* generate */
    char *generate_model, *generate_prompt; int64_t generate_max_tokens, generate_seed; double generate_temperature, generate_top_p;
    /* export */
    char *export_model, *export_path, *export_format, *export_dtype; int64_t export_max_file_mib;
    /* bench */
    int64_t bench_steps, bench_layers; double bench_seconds, bench_checkpoint_gib;
};

/* Which keys a command reads: shown by its --help. */
enum command_id { CMD_TEACHER_DUMP, CMD_TRAIN, CMD_EVAL, CMD_GENERATE, CMD_EXPORT, CMD_BENCH, CMD_TOKENIZER_TRAIN, CMD_IMPORT_LOGITS, CMD_CONFIG_COUNT };

/* The defaults. */
struct config *config_new(void);
void config_free(struct config *c);                      /* NULL-safe */
/* Reads a YAML file over the values of `c`. ERR_USAGE names file, line, key, the nearest known key, the range; ERR_IO when unreadable. */
int  config_read_file(struct config *c, const char *path);
/* The same from memory; `name` stands for the file in messages. */
int  config_read_text(struct config *c, const char *text, size_t bytes, const char *name);
/* "section.key=value", from --set; a text is taken as it is ('' is the empty one), lists are a,b or YAML's [a, b]. */
int  config_set(struct config *c, const char *assignment);
/* The whole configuration with comments, replayable as it is; written with file_replace(). */
int  config_write(const struct config *c, const char *path);
char *config_to_yaml(const struct config *c);            /* malloc'd */
/* "section.key a -> b, ...": the keys that `command` reads and that differ, with both values as config_write() has them; "": none. malloc'd */
char *config_differences(const struct config *was, const struct config *is, enum command_id command);
/* --help of a command: its keys with type, default, range and one line of help each. */
void config_print_help(FILE *f, enum command_id command);
/* The reference table of every key as Markdown, for the README. */
void config_print_markdown(FILE *f);

#endif
