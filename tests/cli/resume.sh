#!/usr/bin/env bash
# Stopping and going on is the same as not stopping, bit for bit: weights, moments, and what happened on the way.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
"$distill" train config.yaml --set run.dir=straight >straight.log

"$distill" train config.yaml --set run.dir=stopped --set train.steps=5 >stopped.log
"$distill" train config.yaml --set run.dir=stopped --resume >>stopped.log
for f in model.safetensors optimizer.safetensors state.json; do
    cmp straight/checkpoints/step-00000012/$f stopped/checkpoints/step-00000012/$f || fail "$f differs after a resume at step 5"
done

# what changed since the checkpoint is said, with both values; a run that goes on as it was says nothing
grep '^changed' stopped.log | grep -q 'train.steps 5 -> 12$' || fail "a longer run is not said: $(grep '^changed' stopped.log)"
"$distill" train config.yaml --set run.dir=stopped --resume >same.log
grep -q '^changed' same.log && fail "nothing changed, but: $(grep '^changed' same.log)"
"$distill" train config.yaml --set run.dir=stopped --set train.steps=13 --set optimizer.lr=0.002 --set objective.divergence=reverse_kl --set objective.floor=0.01 --resume >other.log
grep -qx 'changed   since the checkpoint: objective.divergence forward_kl -> reverse_kl, objective.floor 0.0 -> 0.01, optimizer.lr 0.01 -> 0.002, train.steps 12 -> 13' other.log ||
    fail "what changed: $(grep '^changed' other.log)"
expect_exit 2 'beyond the 12 steps' "$distill" train config.yaml --set run.dir=stopped --resume

# a broken newest checkpoint: the one before it is used, and says so
"$distill" train config.yaml --set run.dir=broken --set train.steps=9 >broken.log
printf 'x' | dd of=broken/checkpoints/step-00000009/model.safetensors bs=1 seek=2000 conv=notrunc 2>/dev/null
"$distill" train config.yaml --set run.dir=broken --resume >>broken.log 2>broken.err
grep -q 'falling back' broken.err || fail "a broken checkpoint is not reported: $(cat broken.err)"
cmp straight/checkpoints/step-00000012/model.safetensors broken/checkpoints/step-00000012/model.safetensors || fail "weights differ after falling back"

# nothing intact: the run is not begun again behind the user's back
for d in broken/checkpoints/step-*; do printf 'x' | dd of="$d/optimizer.safetensors" bs=1 seek=2000 conv=notrunc 2>/dev/null; done
"$distill" train config.yaml --set run.dir=broken --resume >>broken.log 2>broken.err && fail "a run without an intact checkpoint was begun again"
grep -q 'none of its 2 checkpoints is intact' broken.err || fail "no word about checkpoints that are all broken: $(cat broken.err)"

# a run that exists is neither overwritten nor continued unasked
expect_exit 2 'already holds a run' "$distill" train config.yaml --set run.dir=straight

# a signal: finish the step, save, 75; going on ends where a run that was not stopped ends
for signal in TERM INT USR1; do
    rm -rf signal
    "$distill" train config.yaml --set run.dir=signal --set train.steps=100000 --set train.checkpoint_every=0 --set train.eval_every=0 >signal.log 2>signal.err &
    pid=$!
    for ((i = 0; i < 300; i++)); do [ "$(cat signal/metrics.jsonl 2>/dev/null | wc -l)" -ge 8 ] && break; sleep 0.1; done
    # one run a directory: a second one leaves it alone
    [ $signal != TERM ] || expect_exit 4 "signal is in use by pid $pid on" "$distill" train config.yaml --set run.dir=signal --resume
    kill -$signal $pid
    code=0
    wait $pid || code=$?
    [ $code = 75 ] || fail "exit $code after SIG$signal: $(cat signal.err)"
    grep -q -- '--resume' signal.err || fail "no word about how to go on after SIG$signal: $(cat signal.err)"
done
steps=$(ls signal/checkpoints | tail -1 | tr -dc 0-9 | sed 's/^0*//')
[ "$(grep -c '"train/loss"' signal/metrics.jsonl)" = "$steps" ] || fail "metrics.jsonl has $(wc -l <signal/metrics.jsonl) lines for $steps steps"
for run in signal unstopped; do
    "$distill" train config.yaml --set run.dir=$run --set train.steps=$((steps + 2)) --set train.checkpoint_every=0 --set train.eval_every=0 --resume >signal2.log || fail "$run: $(tail -1 signal2.log)"
done
for f in model.safetensors optimizer.safetensors state.json; do
    cmp signal/checkpoints/step-*$((steps + 2))/$f unstopped/checkpoints/step-*$((steps + 2))/$f || fail "$f differs after a signal"
done

# and a dump that was stopped by one
code=0
DISTILL_FAIL=shard.after_rename:term@5 "$distill" teacher-dump config.yaml --set shards.path=halted --set shards.rows_per_shard=1 --set dump.batch_rows=1 >halted.log 2>halted.err || code=$?
"$distill" teacher-dump config.yaml --set shards.path=unhalted --set shards.rows_per_shard=1 --set dump.batch_rows=1 >unhalted.log
[ $code = 75 ] || fail "exit $code of teacher-dump after SIGTERM: $(cat halted.err)"
"$distill" teacher-dump config.yaml --set shards.path=halted --set shards.rows_per_shard=1 --set dump.batch_rows=1 >>halted.log
diff -r halted unhalted >diff.log || fail "a dump stopped by SIGTERM and gone on with differs: $(head -3 diff.log)"

# a signal while the run waits for a dump that never comes
"$distill" train config.yaml --set run.dir=waiting --set shards.path=never --set shards.follow=true --set train.eval_every=0 >waiting.log 2>&1 &
pid=$!
for ((i = 0; i < 600; i++)); do grep -q '^waiting for' waiting.log && break; sleep 0.05; done
kill -TERM $pid
code=0
wait $pid || code=$?
[ $code = 75 ] || fail "exit $code after SIGTERM while waiting for a dataset: $(tail -2 waiting.log)"
expect_exit 7 'never/manifest.json did not appear' "$distill" train config.yaml --set run.dir=waiting --set shards.path=never --set shards.follow=true --set shards.wait_s=0.3 --set train.eval_every=0

# a signal while the run waits for the next shard of a dump that died: 7 shards are held-out rows, 4 of 14 are sealed then
(DISTILL_FAIL="shard.after_rename:kill@12" "$distill" teacher-dump config.yaml --set shards.path=half >half.log 2>&1; exit $?) 2>/dev/null && fail "the dump did not die"
"$distill" train config.yaml --set run.dir=half-run --set shards.path=half --set shards.follow=true >half-run.log 2>&1 &
pid=$!
for ((i = 0; i < 600; i++)); do [ "$(cat half-run/metrics.jsonl 2>/dev/null | wc -l)" -ge 6 ] && break; sleep 0.05; done
sleep 0.5
kill -TERM $pid
code=0
wait $pid || code=$?
[ $code = 75 ] || fail "exit $code after SIGTERM while waiting for a shard: $(tail -2 half-run.log)"
[ -e half-run/checkpoints/step-00000012 ] && fail "the run had nothing to wait for"
expect_exit 3 'shards are sealed' "$distill" train config.yaml --set run.dir=half-run --set shards.path=half --set train.eval_every=0 --resume
"$distill" teacher-dump config.yaml --set shards.path=half >half.log
"$distill" train config.yaml --set run.dir=half-run --set shards.path=half --resume >half-run.log || fail "resume after waiting: $(tail -1 half-run.log)"
cmp straight/checkpoints/step-00000012/model.safetensors half-run/checkpoints/step-00000012/model.safetensors || fail "weights differ after waiting for a dump that died"

# the student may start while the dump still runs, and sees the same rows in the same order
"$distill" train config.yaml --set run.dir=follow --set shards.path=later --set shards.follow=true --set train.eval_every=0 >follow.log 2>&1 &
pid=$!
"$distill" teacher-dump config.yaml --set shards.path=later >later.log
wait $pid || fail "train --follow: $(tail -2 follow.log)"
cmp straight/checkpoints/step-00000012/model.safetensors follow/checkpoints/step-00000012/model.safetensors || fail "following a growing dataset gave other weights"
finish
