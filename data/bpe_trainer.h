/* Learns a byte-level BPE tokenizer (Sennrich et al. 2016) from text: Qwen2's split pattern, NFC, three special tokens behind the vocabulary.
 * Deterministic: of the pairs with the highest count the one of smaller ids is merged first. */
#ifndef DATA_BPE_TRAINER_H
#define DATA_BPE_TRAINER_H

#include <stddef.h>
#include <stdint.h>

struct bpe_trainer;

struct bpe_trainer *bpe_trainer_new(void);
void bpe_trainer_free(struct bpe_trainer *t);             /* NULL-safe */
/* Counts the words of one document. ERR_INPUT: not UTF-8. */
int  bpe_trainer_add(struct bpe_trainer *t, const char *text, size_t bytes);
/* Merges until there are `vocab_size` tokens (256 bytes, merges, <|endoftext|>, <|im_start|>, <|im_end|>) or no pair occurs twice, then
 * writes tokenizer.json and tokenizer_config.json into `dir`. *tokens is what came out. ERR_USAGE: vocab_size below 259. */
int  bpe_trainer_write(struct bpe_trainer *t, int32_t vocab_size, const char *dir, int32_t *tokens);

#endif
