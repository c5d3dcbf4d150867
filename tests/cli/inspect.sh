#!/usr/bin/env bash
# inspect: models, checkpoints, datasets, single files; what is broken is found and named.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
"$distill" train config.yaml --set run.dir=run --set train.steps=3 >train.log

# says COMMAND... -- PATTERN...: exit 0, and standard output matches every pattern
says() {
    local command=() pattern
    while [ "$1" != -- ]; do command+=("$1"); shift; done
    shift
    "${command[@]}" >out.txt 2>err.txt || { fail "exit $? of ${command[*]}: $(cat err.txt)"; return; }
    for pattern in "$@"; do grep -qE -- "$pattern" out.txt || fail "${command[*]} does not say '$pattern': $(head -c 1500 out.txt)"; done
}
# set_float FILE VALUE-BYTES: the last four bytes, which are the last element of the last tensor
set_float() { truncate -s -4 "$1" && printf "$2" >>"$1"; }

# a model: (embedding 320 x 32) + 2 layers of (32 + 64 x 32 + 64 + 32 x 32 + 32 + 2 x 96 x 32 + 32 x 96) + norm
says "$distill" inspect teacher -- 'Qwen2ForCausalLM' 'layers +2' 'total +35104 ' 'per layer +12416' 'q, k, v bias' 'tied' 'F32 in 26 tensors' 'NaN and Inf +none' 'padding columns +20'
says "$distill" inspect teacher --json -- '"total": 35104' '"padding_columns": 20' '"nan": 0' '"hash": "[0-9a-f]{64}"'
says "$distill" inspect teacher/model.safetensors -- 'model.norm.weight +F32 +\[32\]' 'elements +35104'
cp -r teacher bad
set_float bad/model.safetensors '\x00\x00\xc0\x7f'
expect_exit 5 '1 NaN and 0 Inf' "$distill" inspect bad
grep -qE '(model|lm_head)[a-z0-9_.]*: 1 NaN, 0 Inf' out.txt || fail "the tensor with the NaN is not named: $(tail -5 out.txt)"
set_float bad/model.safetensors '\x00\x00\x80\xff'
expect_exit 5 '0 NaN and 1 Inf' "$distill" inspect bad --json
grep -q '"inf": 1' out.txt || fail "a report in JSON is still whole after a failure: $(tail -5 out.txt)"
sed -i 's/"num_hidden_layers": 2/"num_hidden_layers": 3/' bad/config.json
expect_exit 3 'tensor model.layers.2.* is missing' "$distill" inspect bad
cp teacher/config.json bad/ && sed -i 's/"num_hidden_layers": 2/"num_hidden_layers": 1/' bad/config.json
expect_exit 3 'tensor model.layers.1.* belongs to no part' "$distill" inspect bad
cp teacher/config.json bad/ && cp teacher/model.safetensors bad/ && sed -i 's/"BPE"/"WordPiece"/' bad/tokenizer.json
expect_exit 3 'WordPiece' "$distill" inspect bad
grep -q 'NaN and Inf *none' out.txt || fail "the weights are read although the tokenizer is refused"

# a checkpoint
says "$distill" inspect run/checkpoints/step-00000003 -- 'optimizer steps +3' 'SHA-256 as listed' 'optimizer state +[0-9]+ tensors' 'trained on data +[0-9a-f]{64}'
cp -r run/checkpoints/step-00000003 torn && echo '# x' >>torn/run.yaml
expect_exit 3 'run.yaml: SHA-256 differs' "$distill" inspect torn
expect_exit 2 'checkpoints/step-' "$distill" inspect run

# a dataset, a shard, a row
says "$distill" inspect logits -- 'topk, 8 per position' 'temperatures +1, 2' 'valid ids +300 of the teacher.s 320' 'kept mass +p1 0\.[0-9]+ +p5' 'bytes per token +[0-9]'
rows=$(awk '/rows sealed/ {print $5}' out.txt)
says "$distill" inspect logits --json -- "\"rows_sealed\": $rows" '"p99": 0\.' '"label_logprob_mean": -'
says "$distill" inspect logits/shards/shard-000001.h5 -- 'rows +8 to 15' 'rows read +8'
(cd logits/shards && "$distill" inspect shard-000001.h5 >/dev/null) || fail "a shard from within its directory"
says "$distill" inspect logits --row 9 --tokenizer teacher --top 2 -- '^ +0 +0 +0  "' '\* +"' '" 0\.[0-9]{4}  "'
[ "$(wc -l <out.txt)" = 50 ] || fail "a row of 48 positions has $(wc -l <out.txt) lines"
says "$distill" inspect logits --row 9 -- '^ +0 +0 +0  [0-9]+ '
says "$distill" inspect logits --row 9 --json --tokenizer teacher -- '"supervised": true' '"next_logprob": -' '"text": "'
"$distill" teacher-dump config.yaml --set shards.path=whole --set shards.kind=full --set corpus.max_rows=4 --set shards.rows_per_shard=2 >/dev/null
says "$distill" inspect whole -- 'kind +full' 'kept mass +all of it'
# the best choice is the same, whether all logits or the top 8 are stored
"$distill" inspect logits --row 2 --top 1 | awk 'NR > 2 {print $1, $(NF-1)}' >a.txt
"$distill" inspect whole --row 2 --top 1 | awk 'NR > 2 {print $1, $(NF-1)}' >b.txt
cmp a.txt b.txt || fail "first choices differ between kinds: $(diff a.txt b.txt | head -4)"
expect_exit 2 'has rows 0 to' "$distill" inspect logits --row 100000
expect_exit 2 'is in shard 0' "$distill" inspect logits/shards/shard-000001.h5 --row 0
expect_exit 2 'needs a dataset' "$distill" inspect teacher --row 0
"$distill" tokenizer-train base.yaml --set tokenizer.path=other --set tokenizer.vocab_size=280 >/dev/null
expect_exit 6 'has hash' "$distill" inspect logits --row 0 --tokenizer other
cp -r logits flipped && printf '\x55' | dd of=flipped/shards/shard-000000.h5 bs=1 seek=20000 conv=notrunc 2>/dev/null
expect_exit 3 'shard-000000.*row' "$distill" inspect flipped
cp logits/shards/shard-000000.h5 flipped/shards/shard-000099.h5
expect_exit 3 'not 99' "$distill" inspect flipped/shards/shard-000099.h5

# GGUF, and what is nothing of the kind
"$distill" export config.yaml --set export.model=teacher --set export.format=gguf --set export.path=teacher.gguf >/dev/null
says "$distill" inspect teacher.gguf -- 'general.architecture +"qwen2"' 'token_embd.weight +f32 +\[320, 32\]' 'NaN and Inf +none'
truncate -s -100 teacher.gguf
expect_exit 3 'teacher.gguf' "$distill" inspect teacher.gguf
expect_exit 4 'no such file' "$distill" inspect nowhere
expect_exit 2 'none of what inspect reads' "$distill" inspect text.txt
expect_exit 2 'no path' "$distill" inspect
expect_exit 2 'whole number' "$distill" inspect logits --row 1x
expect_exit 2 'unknown' "$distill" inspect logits --columns 1
finish
