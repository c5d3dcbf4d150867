#!/usr/bin/env bash
# The whole path: tokenizer, teacher, shards, student, evaluation, text, export.
source "$(dirname "$0")/common.sh"
make_world
# into a file a progress line goes every few seconds, and the last; the shares are measured in the first step, every tenth and the last
[ "$(grep -c '^step' teacher.log)" -lt 12 ] && grep -qE '^step 12/12 .* ce [0-9.]+ \(100 %\)' teacher.log || fail "progress lines: $(grep '^step' teacher.log)"
[ "$(grep -c '"train/loss"' teacher-run/metrics.jsonl)" = 12 ] && [ "$(grep -c '"train/ce_share"' teacher-run/metrics.jsonl)" = 3 ] || fail "metrics: $(cat teacher-run/metrics.jsonl)"

"$distill" teacher-dump config.yaml >dump.log
grep -q 'of the mass' dump.log || fail "teacher-dump does not report the kept mass: $(tail -1 dump.log)"
[ -s logits/journal.jsonl ] && [ -s logits-heldout/journal.jsonl ] || fail "no journals"
before=$(find logits -type f | sort | xargs sha256sum)
"$distill" teacher-dump config.yaml >again.log
[ "$before" = "$(find logits -type f | sort | xargs sha256sum)" ] || fail "a second teacher-dump changed the dataset"
grep -q 'all .* shards are sealed' again.log || fail "a second teacher-dump does not say that all is done"

"$distill" train config.yaml --set run.dir=run >train.log
grep -q 'held-out at step 12' train.log || fail "no held-out evaluation: $(tail -3 train.log)"
[ "$(wc -l <run/metrics.jsonl)" -ge 12 ] || fail "metrics.jsonl has $(wc -l <run/metrics.jsonl) lines"
ls run/events.out.tfevents.* >/dev/null || fail "no TensorBoard events"
first=$(grep -m1 -o '"train/kd": *[0-9.]*' run/metrics.jsonl | grep -o '[0-9.]*$') last=$(grep '"train/kd"' run/metrics.jsonl | tail -1 | grep -o '"train/kd": *[0-9.]*' | grep -o '[0-9.]*$')
awk -v a="$first" -v b="$last" 'BEGIN { exit !(b < a) }' || fail "the KD loss did not fall: $first to $last"

"$distill" eval config.yaml --set run.dir=run --set eval.json=eval.json >eval.log
grep -qi 'retained' eval.log && grep -q '"' eval.json || fail "eval: $(cat eval.log)"
"$distill" generate config.yaml --set run.dir=run --set generate.max_tokens=8 --prompt 'the small' >text.log 2>/dev/null
[ -s text.log ] || fail "generate wrote nothing"
"$distill" export config.yaml --set run.dir=run --set export.path=exported >export.log
[ -s exported/model.safetensors ] && [ -s exported/tokenizer.json ] || fail "export: $(cat export.log)"
"$distill" inspect exported >inspect.log && grep -q Qwen2ForCausalLM inspect.log || fail "inspect: $(cat inspect.log)"
"$distill" inspect logits --row 0 >row.log || fail "inspect --row"

# other ways to begin: from the teacher's layers, from a directory; hard labels; full logits at another listed temperature
"$distill" train config.yaml --set run.dir=run2 --set student.init=teacher --set student.keep_every=2 --set train.steps=3 --set train.recompute=block >run2.log || fail "student from the teacher"
"$distill" train config.yaml --set run.dir=run3 --set student.init=hf --set student.path=exported --set train.steps=3 --set objective.temperature=2 --set objective.tail=renormalise >run3.log 2>run3.err || fail "student from a directory"
grep -q 'is biased' run3.err || fail "renormalise does not warn"
"$distill" teacher-dump config.yaml --set shards.path=full --set shards.kind=full >full.log || fail "full dump"
for divergence in forward_kl reverse_kl jsd skew_kl tvd; do
    "$distill" train config.yaml --set run.dir=run-$divergence --set shards.path=full --set shards.kind=full --set objective.divergence=$divergence --set train.steps=3 >$divergence.log || fail "$divergence on full targets"
done
for kind in hybrid sampled; do                                # draws: forward KL, right on average
    [ $kind = sampled ] && list='[1.0]' || list='[1.0, 2.0]'
    settings=(--set shards.path=$kind --set shards.kind=$kind --set shards.m=12 --set shards.draws=20 --set "shards.temperatures=$list")
    "$distill" teacher-dump config.yaml "${settings[@]}" >$kind.log || fail "$kind dump"
    "$distill" train config.yaml "${settings[@]}" --set run.dir=run-$kind --set train.steps=6 >$kind.log || fail "training from $kind: $(tail -1 $kind.log)"
    grep -q "tail unbiased of $kind targets" $kind.log && grep -q 'held-out at step 6' $kind.log && grep -q '^alignment next token' $kind.log || fail "$kind: $(cat $kind.log)"
    expect_exit 6 'only forward_kl is linear' "$distill" train config.yaml "${settings[@]}" --set run.dir=x --set objective.divergence=jsd
done
"$distill" train config.yaml --set shards.path=hybrid --set shards.kind=hybrid --set run.dir=head --set objective.tail=bucket --set objective.divergence=jsd --set objective.temperature=2 --set train.steps=3 >head.log ||
    fail "the head of hybrid with a bucket"
expect_exit 6 'shards.kind is full, hybrid holds hybrid' "$distill" train config.yaml --set shards.path=hybrid --set shards.kind=full --set run.dir=x
expect_exit 6 'there is no head' "$distill" train config.yaml --set shards.path=sampled --set shards.kind=sampled --set run.dir=x --set objective.tail=bucket
expect_exit 6 'nothing is missing' "$distill" train config.yaml --set shards.path=full --set shards.kind=full --set run.dir=x --set objective.tail=drop
for objective in 'reverse_kl' '0.7 forward_kl + 0.3 reverse_kl' 'jsd' '0.5 skew_kl + 0.5 tvd'; do       # of the top 8 and one outcome for the rest
    rm -rf bucket
    "$distill" train config.yaml --set run.dir=bucket --set "objective.divergence=$objective" --set train.steps=3 --set objective.ce_weight=0.1 >bucket.log || fail "$objective on top-k targets"
    grep -q "objective 1 x .*, tail bucket of topk targets; 0.1 x cross entropy" bucket.log || fail "the plan does not name the objective: $(grep objective bucket.log)"
done
"$distill" train config.yaml --set run.dir=floor --set objective.divergence=reverse_kl --set objective.tail=renormalise --set objective.floor=0.01 --set train.steps=2 >floor.log 2>&1 || fail "reverse_kl with a floor"
# both parts' shares of the gradient: in the progress line, and adding up to 1 in the metrics
grep -qE 'step 3/3 .* kd [0-9.]+ \([0-9]+ %\)  ce [0-9.]+ \([0-9]+ %\)' bucket.log || fail "no shares in: $(tail -2 bucket.log)"
tail -1 bucket/metrics.jsonl | grep -oE '"train/(kd|ce)_share": [0-9.e-]+' | awk '{ n++; s += $2; bad += !($2 > 0 && $2 < 1) } END { exit bad || n != 2 || s < 0.999999 || s > 1.000001 }' ||
    fail "shares: $(tail -1 bucket/metrics.jsonl)"
grep -q '^alignment next token' bucket.log || fail "no word about the alignment of targets and tokens"
# at another listed temperature than the first: the same targets, however they are stored
"$distill" teacher-dump config.yaml --set shards.path=full2 --set shards.kind=full --set 'shards.temperatures=[2.0, 1.0]' >full2.log || fail "full dump at 2"
for path in full full2; do
    "$distill" train config.yaml --set run.dir=temperature-$path --set shards.path=$path --set shards.kind=full --set objective.temperature=2 --set train.steps=2 >temperature.log || fail "temperature 2 from $path"
done
kd() { grep -o '"train/kd": *[0-9.e-]*' $1/metrics.jsonl | tail -1 | grep -o '[0-9.e-]*$'; }
awk -v a="$(kd temperature-full)" -v b="$(kd temperature-full2)" 'BEGIN { d = a / b - 1; exit !(b > 0 && d < 2e-3 && d > -2e-3) }' ||
    fail "kd at temperature 2 is $(kd temperature-full) from logits over 1, $(kd temperature-full2) from logits over 2"
# and nearly the same as the 256 best of 300 with the rest in a bucket
"$distill" teacher-dump config.yaml --set shards.path=most --set shards.k=256 >most.log || fail "top 256"
"$distill" train config.yaml --set run.dir=temperature-most --set shards.path=most --set shards.k=256 --set objective.temperature=2 --set train.steps=2 >most.log || fail "temperature 2 from the top 256"
awk -v a="$(kd temperature-full)" -v b="$(kd temperature-most)" 'BEGIN { d = b / a - 1; exit !(a > 0 && d < 1e-3 && d > -0.03) }' || fail "kd is $(kd temperature-full) from full logits, $(kd temperature-most) from the top 256"
# how a step is cut into passes and chunks is no part of the objective; what is computed again is the same to the bit
for way in 'train.micro_rows=1 train.chunk_tokens=1000' 'train.micro_rows=4 train.chunk_tokens=7' 'train.recompute=block' 'train.recompute=ffn' 'train.recompute=swiglu_norm'; do
    rm -rf way
    "$distill" train config.yaml --set run.dir=way --set objective.ce_weight=0.5 --set train.steps=4 --set train.eval_every=2 $(printf -- '--set %s ' $way) >way.log || fail "$way: $(tail -1 way.log)"
    [ -d way0 ] || "$distill" train config.yaml --set run.dir=way0 --set objective.ce_weight=0.5 --set train.steps=4 --set train.eval_every=2 >way0.log
    case $way in
    train.recompute*) cmp way0/checkpoints/step-00000004/model.safetensors way/checkpoints/step-00000004/model.safetensors || fail "$way gives other weights" ;;
    *) paste <(grep -oE '"(train|heldout)/(loss|kd|ce|grad_norm)": [0-9.e-]+' way0/metrics.jsonl) <(grep -oE '"(train|heldout)/(loss|kd|ce|grad_norm)": [0-9.e-]+' way/metrics.jsonl) |
           awk '{ d = $2 / $4 - 1; n++; if ($1 != $3 || d > 2e-5 || d < -2e-5) { print; bad = 1 } } END { exit bad || n != 22 }' || fail "$way gives other losses" ;;
    esac
done
"$distill" train config.yaml --set run.dir=run4 --set objective.kd_weight=0 --set objective.ce_weight=1 --set train.steps=3 >run4.log || fail "hard labels from shards"
# a tokenizer by its file, wherever that lies, goes with the model; a file of another name cannot
cp tokenizer/tokenizer.json .
for path in tokenizer.json ./tokenizer.json tokenizer/tokenizer.json; do
    rm -rf named; "$distill" train config.yaml --set run.dir=named --set train.steps=1 --set tokenizer.path=$path >named.log || fail "tokenizer.path=$path: $(tail -1 named.log)"
    [ -e named/checkpoints/step-00000001/tokenizer.json ] || fail "tokenizer.path=$path: the checkpoint has no tokenizer"
done
mv tokenizer.json vocabulary.json
expect_exit 2 'a directory or a file named tokenizer.json' "$distill" train config.yaml --set run.dir=other-name --set train.steps=1 --set tokenizer.path=vocabulary.json
[ ! -e other-name ] || fail "a run that cannot be written in the end has begun"
"$distill" bench config.yaml --set bench.steps=1 --set bench.seconds=0 --set "teacher.path=''" >bench.log || fail "bench"
grep -q 'share_of_composed_limit' bench.log && grep -q '"figure":"phase_host"' bench.log || fail "bench does not say what it should"
"$distill" bench kernels config.yaml --set bench.seconds=0 rmsnorm distill_loss sample_targets >kernels.log || fail "bench kernels"
grep -q 'rmsnorm_backward' kernels.log && grep -q 'distill_loss' kernels.log && grep -q 'sample_targets 50 draws' kernels.log && ! grep -q swiglu kernels.log || fail "bench kernels takes other ops than it was asked for"
"$distill" bench io config.yaml --set bench.seconds=0 --set run.dir=io >io.log || fail "bench io"
grep -q '"topk seal"' io.log && grep -q '"full read warm"' io.log && grep -q '"hybrid read cold"' io.log && grep -q '"sampled seal"' io.log && grep -q '"checkpoint load cold"' io.log || fail "bench io leaves something out"
[ ! -e io ] || fail "bench io leaves files behind"
finish
