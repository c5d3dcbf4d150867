#!/usr/bin/env bash
# eval: a model against itself, the two sources of rows, several models, and what is refused.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
"$distill" train config.yaml --set run.dir=run --set train.steps=3 >train.log
e() { "$distill" eval config.yaml --set run.dir=run "$@"; }
number() { awk -v key="\"$1\":" -v nth="${2:-1}" '$1 == key && ++n == nth {sub(",", "", $2); print $2}' "${3:-eval.json}"; }
near() { awk -v a="$1" -v b="$2" 'BEGIN {exit !(a != "" && b != "" && (a - b) ^ 2 < 1e-10)}' || fail "$3: $1 is not $2"; }

# against itself: no divergence, full agreement
e --set eval.model=teacher --set eval.json=eval.json >table.txt || fail "eval: $(cat table.txt)"
near "$(number forward_kl)" 0 'KL of a model to itself'
near "$(number reverse_kl)" 0 'reverse KL of a model to itself'
near "$(number agreement)" 1 'agreement of a model with itself'
near "$(number accuracy_retained 2)" 1 'accuracy retained by a model itself'
near "$(number loss 1)" "$(number loss 2)" 'loss of teacher and student'
near "$(number calibration_error 1)" "$(number calibration_error 2)" 'calibration error of teacher and student'
grep -qE 'accuracy retained, % +100.00 +100.00' table.txt || fail "no table: $(cat table.txt)"

# the newest checkpoint; rows of the corpus and rows of the dataset made of it; any batch and chunk
e --set eval.json=eval.json >table.txt
grep -q 'own precision here' table.txt && fail "eval speaks of precisions that nobody asked for"
e --set teacher.precision=fp8 --set eval.max_rows=2 >fp8.txt && grep -q '^Every model is multiplied at the device.s own precision here' fp8.txt || fail "eval does not say that it leaves teacher.precision aside: $(tail -2 fp8.txt)"
e --set eval.json=other.json --set 'corpus.files=[]' --set eval.batch_rows=1 --set train.chunk_tokens=7 >table.txt
for key in loss top1 top5 bits_per_byte perplexity confidence calibration_error forward_kl reverse_kl agreement positions rows; do
    near "$(number $key)" "$(number $key 1 other.json)" "$key from corpus and dataset"
done
e --set eval.json=- >stdout.json 2>table.txt
head -c 1 stdout.json | grep -q '{' && grep -q 'perplexity' table.txt || fail "eval.json=-: $(head -2 stdout.json)"
# a teacher whose blocks are streamed: the same numbers
e --set eval.json=resident.json >/dev/null && e --set eval.json=streamed.json --set teacher.weights=streamed >table.txt || fail "streamed: $(cat table.txt)"
cmp resident.json streamed.json || fail "a streamed teacher has other numbers"
e --set eval.max_rows=2 --set eval.json=eval.json >/dev/null && near "$(number rows)" 2 eval.max_rows
e --set corpus.heldout_fraction=0 --set eval.max_rows=2 | grep -q 'every row of corpus.files' || fail "evaluation on everything is not said"

# several models
e --model control=run/checkpoints/step-00000003 --model distilled=teacher --set eval.json=eval.json >table.txt
grep -q 'gap closed' table.txt || fail "no gap closed: $(cat table.txt)"
near "$(number loss 4)" 1 'share of the gap that the teacher itself closes'      # after the losses of three columns
e --set "teacher.path=''" >table.txt || fail "without a teacher: $(cat table.txt)"
grep -q 'KL' table.txt && fail "a KL without a teacher: $(cat table.txt)"

expect_exit 2 'name=path' "$distill" eval config.yaml --set run.dir=run --model teacher
expect_exit 2 'two models are named' "$distill" eval config.yaml --set run.dir=run --model a=teacher --model a=teacher
expect_exit 2 'eval.model' "$distill" eval config.yaml --set run.dir=nowhere
expect_exit 2 'held-out' "$distill" eval config.yaml --set run.dir=run --set 'corpus.files=[]' --set shards.path=nowhere
expect_exit 6 'rows are 129' "$distill" eval config.yaml --set run.dir=run --set corpus.row_length=129
cp -r teacher bad && truncate -s -4 bad/model.safetensors && printf '\x00\x00\xc0\x7f' >>bad/model.safetensors
expect_exit 5 'logits of bad' "$distill" eval config.yaml --set run.dir=run --set eval.model=bad
expect_exit 5 "teacher's logits" "$distill" eval config.yaml --set run.dir=run --set teacher.path=bad
"$distill" tokenizer-train base.yaml --set tokenizer.path=tokenizer2 --set tokenizer.vocab_size=270 >/dev/null
cp -r teacher foreign && cp tokenizer2/tokenizer.json foreign/
expect_exit 6 'different vocabularies: id' "$distill" eval config.yaml --set run.dir=run --model foreign=foreign
finish
