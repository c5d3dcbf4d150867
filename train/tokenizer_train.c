/* distill tokenizer-train: a byte-level BPE tokenizer learnt from the corpus, for models that begin from scratch. */
#include "base/error.h"
#include "data/bpe_trainer.h"
#include "train/command.h"
#include "train/load.h"
#include "train/progress.h"

struct count { struct bpe_trainer *trainer; int64_t documents, bytes; };

static int add_document(void *context, const char *text, size_t bytes)
{
    struct count *c = context;
    c->documents++;
    c->bytes += (int64_t)bytes;
    return bpe_trainer_add(c->trainer, text, bytes);
}

int command_tokenizer_train(int argc, char **argv)
{
    struct config *c = NULL;
    struct count count = {0};
    int help, rc = OK;
    int32_t tokens;
    TRY(command_config(argc, argv, CMD_TOKENIZER_TRAIN, "Learns a byte-level BPE tokenizer from the texts of the corpus and writes tokenizer.json into tokenizer.path.",
                       "distill tokenizer-train configs/quickstart/teacher.yaml", NULL, NULL, NULL, &c, &help));
    if (help) goto out;
    if (!*c->tokenizer_path) { rc = fail(ERR_USAGE, "tokenizer.path is not set: name the directory the tokenizer is written to"); goto out; }
    double start = now_seconds();
    count.trainer = bpe_trainer_new();
    struct corpus_options o = corpus_options_of(c);
    TRY(corpus_each_text(&o, add_document, &count));
    TRY(bpe_trainer_write(count.trainer, (int32_t)c->tokenizer_vocab_size, c->tokenizer_path, &tokens));
    printf("tokenizer of %d tokens in %s, from %lld documents and %.1f MB, in %s\n", tokens, c->tokenizer_path, (long long)count.documents, (double)count.bytes / 1e6, duration_text(now_seconds() - start));
    if (tokens < c->tokenizer_vocab_size) warn("the corpus gave %d tokens only, not %lld: no other pair occurs twice", tokens, (long long)c->tokenizer_vocab_size);
out:
    bpe_trainer_free(count.trainer);
    config_free(c);
    return rc;
}
