#!/usr/bin/env bash
# What a user may ask for instead of a stop: a teacher's rows without finite logits set aside (--quarantine), missing shards left out (--allow-missing), loss spikes
# skipped (train.spike). Each says how much it costs, and a run that was stopped and gone on with is still the run that was not.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
same_run() { for f in model.safetensors optimizer.safetensors state.json; do cmp "$1/checkpoints/$3/$f" "$2/checkpoints/$3/$f" || fail "$f of $1 and $2 differs"; done; }

# ---- F15: shards that are missing
cp -r logits holed && rm holed/shards/shard-000002.h5
expect_exit 3 'shard-000002.h5: .*missing' "$distill" train config.yaml --set shards.path=holed --set shards.heldout_path=logits-heldout --set run.dir=holed-run
"$distill" inspect holed --repair >repair.log
expect_exit 3 'allow-missing' "$distill" train config.yaml --set shards.path=holed --set shards.heldout_path=logits-heldout --set run.dir=holed-run
expect_exit 2 'shards.follow' "$distill" train config.yaml --set shards.path=holed --set shards.heldout_path=logits-heldout --set run.dir=holed-run --set shards.follow=true --allow-missing
holed=(config.yaml --set shards.path=holed --set shards.heldout_path=logits-heldout --set train.steps=40 --set train.eval_every=0 --allow-missing)
"$distill" train "${holed[@]}" --set run.dir=holed-straight >holed.log 2>holed.err || fail "--allow-missing: $(cat holed.err)"
[ "$(grep -c . holed.err)" = 1 ] && grep -qE 'holed: 1 of 14 shards are missing and left out, the first is shard 2: 8 of [0-9]+ rows' holed.err || fail "not said once what is left out: $(cat holed.err)"
grep -q '"left_out": \[' holed-straight/checkpoints/step-00000040/state.json || fail "the checkpoint does not say what was left out"
"$distill" train "${holed[@]}" --set run.dir=holed-run --set train.steps=23 >holed.log 2>holed.err
"$distill" train "${holed[@]}" --set run.dir=holed-run --resume >holed.log 2>holed.err
same_run holed-straight holed-run step-00000040
# the shard comes back while the run is stopped: it goes on without it, as it began
"$distill" train "${holed[@]}" --set run.dir=back-run --set train.steps=23 >holed.log 2>holed.err
"$distill" teacher-dump config.yaml --set shards.path=back --set shards.heldout_path=logits-heldout >dump.log
"$distill" train "${holed[@]}" --set shards.path=back --set run.dir=back-run --resume >back.log 2>&1 || fail "resume with a shard that came back: $(tail -1 back.log)"
grep -q '1 shards are there again' back.log || fail "no word about a shard that came back"
same_run holed-straight back-run step-00000040
# another one goes: the place among the rows would mean others
rm back/shards/shard-000005.h5
code=0
"$distill" train "${holed[@]}" --set shards.path=back --set run.dir=back-run --set train.steps=42 --resume >back.log 2>back.err || code=$?
[ $code = 6 ] && grep -q 'shard 5 is missing, but the run' back.err || fail "a shard that went during the run: exit $code: $(cat back.err)"
# repaired and dumped again: the whole dataset
"$distill" teacher-dump config.yaml --set shards.path=holed --set shards.heldout_path=logits-heldout >dump.log
for f in $(cd logits && ls shards/*.h5); do cmp "logits/$f" "holed/$f" || fail "holed/$f differs after repair"; done

# ---- F22: loss spikes. Every document but one is of the same few words
{ for i in $(seq 300); do printf 'the cat sees the dog. the dog sees the cat.\n\n'; done; awk 'BEGIN { srand(5); for (i = 0; i < 60; i++) printf "%c", 33 + int(rand() * 90); print "\n" }'
  for i in $(seq 300); do printf 'the cat sees the dog. the dog sees the cat.\n\n'; done; } >spike.txt
spiky=(teacher.yaml --set 'corpus.files=[spike.txt]' --set corpus.document=paragraph --set corpus.heldout_fraction=0 --set train.steps=120 --set train.batch_rows=2 --set train.micro_rows=1 --set optimizer.lr=0.01
       --set schedule.kind=constant --set train.keep_checkpoints=1000)
"$distill" train "${spiky[@]}" --set run.dir=spike-off >spike.log 2>spike.err
losses() { sed 's/, "train\/tokens_per_second.*//' "$1/metrics.jsonl"; }
[ ! -s spike.err ] && ! grep -q spike spike-off/checkpoints/step-00000120/state.json && ! grep -q steps_skipped spike-off/metrics.jsonl || fail "train.spike off says something of spikes"
# by the losses of the run that takes no notice: the first spike is a step with 10 times the loss of the 16 steps before it
first=$(grep -o '"train/loss": [0-9.]*' spike-off/metrics.jsonl | awk '{ v[NR] = $2; m = 0; for (i = NR - 16; i < NR; i++) if (i > 0 && v[i] > m) m = v[i]; if (NR > 16 && $2 > 10 * m) { print NR; exit } }')
[ "${first:-0}" -gt 20 ] || fail "no step of this text is a spike: the test tests nothing"
"$distill" train "${spiky[@]}" --set run.dir=spike-skip --set train.spike=skip >spike.log 2>spike.err || fail "train.spike skip: $(tail -1 spike.err)"
skipped=$(grep -c 'its update is left out' spike.err)
[ "$skipped" -ge 1 ] && grep -qE "step $first: the loss [0-9.]+ is [0-9.]+ deviations above the median of the [0-9]+ steps before it.*rows [0-9]+, [0-9]+:" spike.err || fail "step $first is not said to be a spike: $(cat spike.err)"
tail -1 spike-skip/metrics.jsonl | grep -qE "\"train/steps_skipped\": $skipped(\.0)?[,}]" || fail "metrics.jsonl does not count $skipped skipped steps: $(tail -1 spike-skip/metrics.jsonl)"
expect_exit 5 "step $first: the loss .*train.spike_most is 0" "$distill" train "${spiky[@]}" --set run.dir=spike-most --set train.spike=skip --set train.spike_most=0
[ -e spike-most/checkpoints ] && fail "a checkpoint after a spike that ended the run"
# the step itself: its update is not made, nothing else is changed; and a run in three pieces, one of them ending in the spike, is the run in one
before=$(printf 'step-%08d' $((first - 1))) at=$(printf 'step-%08d' $first)
for steps in $((first - 1)) $first 120; do
    "$distill" train "${spiky[@]}" --set run.dir=spike-pieces --set train.spike=skip --set train.steps=$steps --resume >spike.log 2>spike.err || fail "train.spike skip to step $steps: $(tail -1 spike.err)"
    "$distill" train "${spiky[@]}" --set run.dir=spike-through --set train.steps=$steps --resume >spike.log 2>spike.err || fail "train.spike off to step $steps: $(tail -1 spike.err)"
done
for f in model optimizer; do
    cmp spike-through/checkpoints/$before/$f.safetensors spike-pieces/checkpoints/$before/$f.safetensors || fail "$f differs before the first spike"
    cmp spike-pieces/checkpoints/$before/$f.safetensors spike-pieces/checkpoints/$at/$f.safetensors || fail "a skipped step changed the $f"
    cmp -s spike-through/checkpoints/$before/$f.safetensors spike-through/checkpoints/$at/$f.safetensors && fail "a step that was not skipped changed nothing"
done
same_run spike-skip spike-pieces step-00000120
same_run spike-off spike-through step-00000120
# stopped by the policy and gone on with another; killed between two spikes and gone on with: what steps are judged by is the checkpoint's
often=(--set train.checkpoint_every=15)
expect_exit 5 "step $first: the loss .*No weight was changed" "$distill" train "${spiky[@]}" "${often[@]}" --set run.dir=spike-stop --set train.spike=stop
"$distill" train "${spiky[@]}" "${often[@]}" --set run.dir=spike-stop --set train.spike=skip --resume >spike.log 2>spike.err || fail "going on with train.spike skip: $(tail -1 spike.err)"
same_run spike-skip spike-stop step-00000120
(DISTILL_FAIL="checkpoint.after_rename:kill@$((first / 15 + 1))" "$distill" train "${spiky[@]}" "${often[@]}" --set run.dir=spike-killed --set train.spike=skip >spike.log 2>&1; exit $?) 2>/dev/null && fail "the run was not killed"
"$distill" train "${spiky[@]}" "${often[@]}" --set run.dir=spike-killed --set train.spike=skip --resume >spike.log 2>spike.err || fail "resume after a kill: $(tail -1 spike.err)"
same_run spike-skip spike-killed step-00000120
[ "$(losses spike-skip)" = "$(losses spike-killed)" ] || fail "the losses of a killed run that skips spikes differ"

# F40: a bit that flips in a gradient makes a norm that is out of the way, unless it is one of the low bits: told by train.spike, as the loss it leads to may not be
DISTILL_FAIL=train.flip:error@40 expect_exit 5 'step 40: the gradient norm [0-9.e+]+ is .* deviations above the median' "$distill" train "${spiky[@]}" --set run.dir=flip-stop --set train.spike=stop
DISTILL_FAIL=train.flip:error@40 "$distill" train "${spiky[@]}" --set run.dir=flip-skip --set train.spike=skip --set train.steps=60 >spike.log 2>spike.err || fail "a flipped bit, skipped: $(tail -1 spike.err)"
[ "$(grep -c 'its update is left out' spike.err)" = 1 ] || fail "one flipped bit is not one skipped step: $(cat spike.err)"

# ---- F20: a teacher whose logits are not finite: positions of it (tests/train/test_train.c has them one by one), or all of them
cp -r teacher sick && printf '\x00\x00\xc0\x7f' | dd of=sick/model.safetensors bs=1 seek=9000 conv=notrunc 2>/dev/null
expect_exit 5 'not finite.*--quarantine' "$distill" teacher-dump config.yaml --set teacher.path=sick --set shards.path=sick-logits
code=0
"$distill" teacher-dump config.yaml --set teacher.path=sick --set shards.path=sick-logits --quarantine >sick.log 2>sick.err || code=$?
[ $code = 5 ] && grep -q 'it is the teacher, not some rows' sick.err || fail "a teacher that gives nothing but NaN: exit $code: $(tail -1 sick.err)"
[ "$(grep -c 'set aside, not learnt' sick.err)" = 8 ] || fail "$(grep -c 'set aside' sick.err) messages of rows set aside"
finish
