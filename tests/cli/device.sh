#!/usr/bin/env bash
# The commands with device cuda: what only there has a second stream, pinned buffers, threads that load through them, and moments in bf16. Dumps with weights resident, streamed and gone on with are
# the same bytes, and near the CPU's; a deterministic run that was stopped is the run that was not; a checkpoint is evaluated, continued and exported as on the CPU.
source "$(dirname "$0")/common.sh"
need_device
make_world 6 32 2 32 100                         # the teacher has more blocks than there are slots to stream into, and so has the large one below
# few rows and steps: in an emulation of the device a step takes seconds
sed -i 's/heldout_fraction: 0.2/heldout_fraction: 0.05, max_rows: 20/' teacher.yaml config.yaml
sed -i -e 's/rows_per_shard: 8/rows_per_shard: 4/' -e 's/steps: 12, batch_rows: 4, micro_rows: 2/steps: 6, batch_rows: 2, micro_rows: 1/' -e 's/checkpoint_every: 3, eval_every: 6/checkpoint_every: 2, eval_every: 5/' config.yaml
last=checkpoints/step-00000006
cuda=(--set run.device=cuda)
# number FILE KEY: of inspect --json, eval.json or a manifest, the first of that name
number() { grep -o "\"$2\": *[0-9.e+-]*" "$1" | head -1 | grep -o '[0-9.e+-]*$'; }
# below VALUE BOUND WHAT, from 0 on; near A B RELATIVE WHAT
below() { awk -v x="$1" -v b="$2" 'BEGIN { exit !(x != "" && x >= 0 && x <= b) }' || fail "$3 is $1, not at most $2"; }
near() { awk -v a="$1" -v b="$2" -v r="$3" 'BEGIN { d = a - b; exit !(a != "" && b != "" && d * d <= r * r * b * b) }' || fail "$4: $1 is not $2"; }
# same A B WHY: two datasets with their held-out ones, to the byte
same() { diff -r "$1" "$2" >diff.txt && diff -r "$1-heldout" "$2-heldout" >>diff.txt || fail "$2 differs from $1: $3: $(head -2 diff.txt)"; }

# ---- dumps ----
dump() { "$distill" teacher-dump config.yaml --set shards.path="$@" >dump.log 2>&1 || fail "teacher-dump $*: $(tail -1 dump.log)"; }
fp8=(--set teacher.precision=fp8 --set shards.kind=hybrid --set shards.m=12)
dump bf16 "${cuda[@]}" --set teacher.weights=resident
grep -q 'weights resident' dump.log || fail "resident: $(grep pass dump.log)"
dump bf16-streamed "${cuda[@]}" --set teacher.weights=streamed
grep -q 'weights streamed' dump.log || fail "streamed: $(grep pass dump.log)"
same bf16 bf16-streamed "weights streamed"
dump fp8 "${cuda[@]}" "${fp8[@]}" --set teacher.weights=resident
dump fp8-streamed "${cuda[@]}" "${fp8[@]}" --set teacher.weights=streamed
same fp8 fp8-streamed "weights streamed, in fp8"
# killed in its sixth shard, the third of the rows for training, gone on with the other way
(DISTILL_FAIL=shard.before_rename:kill@6 "$distill" teacher-dump config.yaml "${cuda[@]}" --set shards.path=killed >dump.log 2>&1; exit $?) 2>/dev/null && fail "the dump did not die"
dump killed "${cuda[@]}" --set teacher.weights=streamed
same bf16 killed "killed and gone on with"
# as the CPU has it
dump cpu
dump cpu8 "${fp8[@]}"
cmp -s bf16/shards/shard-000000.h5 cpu/shards/shard-000000.h5 && fail "cuda and cpu dump the same bytes: one of them was not asked"
against() { "$distill" inspect "$1" --against teacher --device "$2" --sample 64 --json >"$1-$2.json" 2>err.txt || fail "inspect $1 --against teacher --device $2: $(cat err.txt)"; }
against bf16 cuda
against bf16 cpu
against cpu cuda
against fp8 cpu
# what bf16 rounds, here and there or, where a product of another number of rows adds up in another order, on the same device. Seen in emulation: KL 2.2e-5 and at most 2.5e-4 in bf16, 3.9e-5 and 1.4e-3
# in fp8, log p 4.1e-3, the same first choice at 99.2 % (8 bits make some logits equal)
for f in bf16-cuda bf16-cpu cpu-cuda fp8-cpu; do
    below "$(number $f.json kl_mean)" 2e-4 "$f: KL"
    below "$(number $f.json kl_max)" 1e-2 "$f: the largest KL of a position"
    below "$(number $f.json label_difference)" 2e-2 "$f: difference of log p(next token)"
    for key in first_agreement best_agreement; do awk -v x="$(number $f.json $key)" 'BEGIN { exit !(x >= 0.95) }' || fail "$f: $key is $(number $f.json $key)"; done
done

# blocks of several MB: their copies take longer than their products, and a matrix is loaded in pieces, of which every thread has two under way
sed -e 's/"num_attention_heads": 2, "num_key_value_heads": 1/"num_attention_heads": 8, "num_key_value_heads": 4/' <(model_config /dev/stdout 6 384) >large.json
"$distill" train teacher.yaml --set student.config=large.json --set train.steps=1 --set train.batch_rows=1 --set train.micro_rows=1 --set run.dir=large-run >train.log || fail "a large model: $(tail -1 train.log)"
large=large-run/checkpoints/step-00000001
few=(--set teacher.path=$large --set corpus.heldout_fraction=0 --set corpus.max_rows=4)
dump large "${cuda[@]}" "${few[@]}" --set teacher.weights=resident
dump large-streamed "${cuda[@]}" "${few[@]}" --set teacher.weights=streamed
diff -r large large-streamed >diff.txt || fail "large-streamed differs from large: weights streamed: $(head -2 diff.txt)"
for device in cpu cuda; do "$distill" export config.yaml --set run.device=$device --set export.model=$large --set export.path=large-$device >export.log 2>&1 || fail "export of the large model on $device: $(tail -1 export.log)"; done
cmp large-cpu/model.safetensors large-cuda/model.safetensors || fail "a large model comes back from the device with other weights"

# ---- training ----
# follows A B RELATIVE: the losses of two runs, step by step. Seen in emulation: 0.3 %, with products in fp8 3.2 %
losses() { grep -o '"train/loss": *[0-9.e+-]*' "$1/metrics.jsonl" | grep -o '[0-9.e+-]*$'; }
follows() {
    paste <(losses "$1") <(losses "$2") | awk -v r="$3" '{ d = $2 / $1 - 1; n++; if (!(d * d <= r * r)) bad = 1 } END { exit bad || !n }' ||
        fail "losses of $2 leave those of $1: $(paste <(losses "$1") <(losses "$2") | tr '\n\t' ',/')"
}
text=(--set train.steps=4 --set train.batch_rows=2 --set train.micro_rows=1)
"$distill" train teacher.yaml "${text[@]}" --set run.dir=text-cpu >train.log || fail "train from the text on cpu: $(tail -1 train.log)"
"$distill" train teacher.yaml "${text[@]}" "${cuda[@]}" --set run.dir=text-cuda >train.log 2>&1 || fail "train from the text: $(tail -1 train.log)"
follows text-cpu text-cuda 0.02
"$distill" train config.yaml --set shards.path=bf16 --set run.dir=cpu-run >train.log || fail "train on cpu: $(tail -1 train.log)"
train() { "$distill" train config.yaml "${cuda[@]}" --set shards.path=bf16 "$@" >train.log 2>&1 || fail "train $*: $(tail -1 train.log)"; }
for recipe in compact exact; do
    for matmul in native fp8; do
        way=$recipe-$matmul settings=(--set train.deterministic=true --set train.recipe=$recipe --set train.matmul=$matmul)
        train --set run.dir=$way "${settings[@]}"
        follows cpu-run $way "$([ $matmul = fp8 ] && echo 0.1 || echo 0.02)"
        train --set run.dir=$way-stopped "${settings[@]}" --set train.steps=3
        train --set run.dir=$way-stopped "${settings[@]}" --resume
        for f in model.safetensors optimizer.safetensors state.json; do cmp $way/$last/$f $way-stopped/$last/$f || fail "$way: $f differs after a resume at step 3"; done
    done
done
for other in compact-fp8 exact-native exact-fp8; do cmp -s compact-native/$last/model.safetensors $other/$last/model.safetensors && fail "$other gives the weights of compact-native"; done
# killed in its second checkpoint, which the first is there for
(DISTILL_FAIL=checkpoint.before_rename:kill@2 "$distill" train config.yaml "${cuda[@]}" --set shards.path=bf16 --set run.dir=killed-run --set train.deterministic=true >train.log 2>&1; exit $?) 2>/dev/null &&
    fail "the run did not die"
train --set run.dir=killed-run --set train.deterministic=true --resume
for f in model.safetensors optimizer.safetensors state.json; do cmp compact-native/$last/$f killed-run/$last/$f || fail "$f differs after a kill"; done
train --set run.dir=fast                         # cuDNN's attention backward, whose last bit may be another every time
follows cpu-run fast 0.02

# ---- what takes a checkpoint ----
checkpoint=compact-native/$last
# a text that goes on in one way only: the next token has a probability of 0.7 and more, so that rounding does not choose it
awk 'BEGIN { for (d = 0; d < 24; d++) { for (i = 0; i < 8; i++) printf "one two three four five six seven eight nine ten "; print "\n" } }' >count.txt
"$distill" train teacher.yaml --set student.config=student-shape/config.json --set corpus.files=[count.txt] --set corpus.heldout_fraction=0 --set train.steps=60 --set run.dir=count >train.log ||
    fail "a model that counts: $(tail -1 train.log)"
for device in cpu cuda; do
    "$distill" eval config.yaml --set run.device=$device --set eval.model=$checkpoint --set eval.json=eval-$device.json >eval.log 2>&1 || fail "eval on $device: $(tail -1 eval.log)"
    "$distill" export config.yaml --set run.device=$device --set export.model=$checkpoint --set export.path=export-$device >export.log 2>&1 || fail "export on $device: $(tail -1 export.log)"
    "$distill" generate config.yaml --set run.device=$device --set generate.model=count/checkpoints/step-00000060 --set generate.max_tokens=40 --prompt 'one two' >said-$device 2>err.txt || fail "generate on $device: $(tail -1 err.txt)"
done
"$distill" eval config.yaml "${cuda[@]}" --set teacher.weights=streamed --set eval.model=$checkpoint --set eval.json=eval-streamed.json >eval.log 2>&1 || fail "eval by a streamed teacher: $(tail -1 eval.log)"
cmp eval-cuda.json eval-streamed.json || fail "a streamed teacher has other numbers"
for key in loss forward_kl; do near "$(number eval-cuda.json $key)" "$(number eval-cpu.json $key)" 0.02 "eval on cuda: $key"; done
cmp export-cpu/model.safetensors export-cuda/model.safetensors || fail "an export on cuda has other weights"
grep -q '^ three four five six seven' said-cuda && cmp said-cpu said-cuda || fail "generate: '$(cat said-cuda)' on cuda, '$(cat said-cpu)' on cpu"
"$distill" generate config.yaml "${cuda[@]}" --set generate.model=$checkpoint --set generate.max_tokens=8 --prompt 'the small' >said 2>err.txt && [ -s said ] || fail "generate from the checkpoint: $(tail -1 err.txt)"
finish
