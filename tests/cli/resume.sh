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

# a broken newest checkpoint: the one before it is used, and says so
"$distill" train config.yaml --set run.dir=broken --set train.steps=9 >broken.log
printf 'x' | dd of=broken/checkpoints/step-00000009/model.safetensors bs=1 seek=2000 conv=notrunc 2>/dev/null
"$distill" train config.yaml --set run.dir=broken --resume >>broken.log 2>broken.err
grep -q 'falling back' broken.err || fail "a broken checkpoint is not reported: $(cat broken.err)"
cmp straight/checkpoints/step-00000012/model.safetensors broken/checkpoints/step-00000012/model.safetensors || fail "weights differ after falling back"

# a run that exists is neither overwritten nor continued unasked
expect_exit 2 'already holds a run' "$distill" train config.yaml --set run.dir=straight

# SIGTERM: finish the step, save, 75
"$distill" train config.yaml --set run.dir=signal --set train.steps=100000 --set train.checkpoint_every=0 >signal.log 2>signal.err &
pid=$!
while [ "$(grep -c step signal.log || true)" -lt 8 ]; do sleep 0.1; done
kill -TERM $pid
code=0
wait $pid || code=$?
[ $code = 75 ] || fail "exit $code after SIGTERM"
ls -d signal/checkpoints/step-* >/dev/null || fail "no checkpoint after SIGTERM"
steps=$(ls signal/checkpoints | tail -1 | tr -dc 0-9 | sed 's/^0*//')
"$distill" train config.yaml --set run.dir=signal --set train.steps=$((steps + 2)) --set train.checkpoint_every=0 --set schedule.kind=constant --resume >signal2.log || fail "resume after SIGTERM"

# the student may start while the dump still runs, and sees the same rows in the same order
"$distill" train config.yaml --set run.dir=follow --set shards.path=later --set shards.follow=true --set train.eval_every=0 >follow.log 2>&1 &
pid=$!
"$distill" teacher-dump config.yaml --set shards.path=later >later.log
wait $pid || fail "train --follow: $(tail -2 follow.log)"
cmp straight/checkpoints/step-00000012/model.safetensors follow/checkpoints/step-00000012/model.safetensors || fail "following a growing dataset gave other weights"
finish
