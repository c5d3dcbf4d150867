#!/usr/bin/env bash
# A dump by a teacher in fp8: its error is measured before anything is written, is what two dumps of all logits say it is, and goes with the dataset; killed, shared and
# streamed dumps are the same bytes; other precisions and larger errors are refused.
source "$(dirname "$0")/common.sh"
make_world
fp8=(--set teacher.precision=fp8 --set dump.error_rows=3)
dump() { "$distill" teacher-dump config.yaml "${fp8[@]}" "$@"; }
# same PATH WHY: the dataset and the held-out one are those of logits, to the byte
same() { diff -r logits "$1" >diff.txt && diff -r logits-heldout "$1-heldout" >>diff.txt || fail "$1 differs $2: $(head -2 diff.txt)"; }
number() { grep -o "\"$2\": [0-9.e-]*" "$1" | grep -o '[0-9.e-]*$'; }

dump >dump.log || fail "dump: $(tail -1 dump.log)"
grep -q '^precision fp8_e4m3, measured: KL(native || fp8) [0-9.e-]* nats per token over [0-9]* positions of 3 rows' dump.log || fail "the error is not said: $(grep precision dump.log)"
for name in "" -heldout; do
    grep -q '"teacher_precision": "fp8_e4m3"' logits$name/manifest.json || fail "logits$name does not say how it was made"
    [ "$(number logits$name/manifest.json kl)" = "$(number logits/manifest.json kl)" ] && [ "$(sed -n '/precision_error/,/}/p' logits$name/manifest.json | wc -l)" = 8 ] || fail "logits$name has other figures"
done
awk -v kl="$(number logits/manifest.json kl)" 'BEGIN { exit !(kl > 1e-6 && kl < 0.02) }' || fail "KL of fp8 is $(number logits/manifest.json kl)"

# the first block stays native, which the dataset says; without that the error is larger
grep -A2 '"native_blocks"' logits/manifest.json | tr -d '\n ' | grep -q '"native_blocks":\[1,0' || fail "the manifest does not say which blocks were rounded: $(cat logits/manifest.json)"
dump --set shards.path=whole --set teacher.fp8_native_first=0 >whole.log || fail "all blocks in fp8: $(tail -1 whole.log)"
grep -q native_blocks whole/manifest.json && fail "a dump with every block in fp8 speaks of native ones"
awk -v all="$(number whole/manifest.json kl)" -v kl="$(number logits/manifest.json kl)" 'BEGIN { exit !(kl < all) }' || fail "KL $(number logits/manifest.json kl) with a native block, $(number whole/manifest.json kl) without"
expect_exit 6 'native_blocks \[1,0\], this run has \[0,1\]' dump --set teacher.fp8_native_first=0 --set teacher.fp8_native_last=1
expect_exit 6 'native_blocks \[0,0\], this run has \[1,0\]' dump --set shards.path=whole
expect_exit 2 'the model has 2: none is left; lower teacher.fp8_native_first' dump --set shards.path=none --set teacher.fp8_native_first=1 --set teacher.fp8_native_last=40
expect_exit 6 'not dumped with one teacher and one configuration' "$distill" train config.yaml --set run.dir=run --set shards.heldout_path=whole-heldout
expect_exit 6 'the teacher of whole kept 0 and 0 blocks native' "$distill" train config.yaml --set run.dir=run --set shards.path=whole --set teacher.fp8_native_first=2

# however the pass is cut
i=0
for way in 'dump.batch_rows=1 dump.chunk_tokens=1000 run.threads=1' 'dump.batch_rows=5 dump.chunk_tokens=7 teacher.weights=streamed' ; do
    dump --set shards.path=way$((++i)) $(printf -- '--set %s ' $way) >way.log || fail "$way: $(tail -1 way.log)"
    same way$i "with $way"
done

# killed around either manifest and in the midst of shards, started again with another number of rows: what was measured first stays
for point in manifest.before@1 manifest.after@1 manifest.before@2 manifest.after@2 shard.before_rename@3 journal.before@9; do
    rm -rf killed killed-heldout
    code=0; (DISTILL_FAIL="${point%@*}:kill@${point#*@}" dump --set shards.path=killed >killed.log 2>&1; exit $?) 2>/dev/null || code=$?
    [ $code = 137 ] || fail "the dump does not come by $point: exit $code"
    begun=; [ -e killed-heldout/manifest.json ] && begun="--set dump.error_rows=1"
    dump --set shards.path=killed $begun >killed.log || fail "after a kill at $point: $(tail -1 killed.log)"
    [ -z "$begun" ] || grep -q '^precision fp8_e4m3, as measured when the dataset was begun' killed.log || fail "measured again after a kill at $point: $(grep precision killed.log)"
    same killed "after a kill at $point"
done

# several at once
for i in 1 2 3; do dump --set shards.path=many --set dump.batch_rows=1 >many$i.log 2>&1 & pids[$i]=$!; done
for i in 1 2 3; do wait ${pids[$i]} || fail "writer $i: $(tail -1 many$i.log)"; done
cmp logits/manifest.json many/manifest.json && diff -r logits/shards many/shards >diff.txt || fail "three writers: $(head -2 diff.txt)"

# a bound: refused before anything is written, with and without a plan; a dataset that was begun is held to it too
expect_exit 5 'teacher: in fp8 it is [0-9.e-]+ nats per token .*dump.max_error allows 1e-07: ' dump --set shards.path=none --set dump.max_error=1e-7
[ ! -e none ] && [ ! -e none-heldout ] || fail "a dump above the bound left something"
expect_exit 5 'dump.max_error' dump --set shards.path=none --set dump.max_error=1e-7 --dry-run
grep -q '^precision fp8_e4m3, measured' out.txt && grep -q 'what a target costs' out.txt || fail "the plan of a dump above the bound: $(cat out.txt)"
expect_exit 5 'dump.max_error' dump --set dump.max_error=1e-7
dump --set shards.path=free --set dump.max_error=0 >free.log || fail "without a bound: $(tail -1 free.log)"
same free "without a bound"
dump --dry-run --no-measure >out.txt && ! grep -q '^precision' out.txt || fail "--no-measure measures"

# a weight that is no number
cp -r teacher broken
printf '\x00\x00\x80\x7f' | dd of=broken/model.safetensors bs=1 seek=$(($(stat -c %s broken/model.safetensors) - 4)) conv=notrunc 2>dd.log
expect_exit 5 'row [0-9]+, position [0-9]+: the teacher.s logits are not finite; check the model with distill inspect broken' dump --set teacher.path=broken --set shards.path=none
[ ! -e none ] || fail "a broken teacher left something"

# the other precision
"$distill" teacher-dump config.yaml --set shards.path=native >native.log
grep -q precision native/manifest.json native.log && fail "a native dump speaks of precision"
expect_exit 6 'was made with teacher_precision "fp8_e4m3", this run has "native"' "$distill" teacher-dump config.yaml
expect_exit 6 'was made with teacher_precision "native", this run has "fp8_e4m3"' dump --set shards.path=native
grep -q '^precision' out.txt && fail "measured for a dataset that is refused"
expect_exit 6 'not dumped with one teacher and one configuration' "$distill" train config.yaml --set run.dir=run --set shards.heldout_path=native-heldout
expect_exit 6 'teacher.precision is fp8, native was dumped with a teacher at its native precision' "$distill" train config.yaml --set run.dir=run --set shards.path=native --set teacher.precision=fp8
"$distill" train config.yaml "${fp8[@]}" --set run.dir=run >train.log 2>&1 || fail "train: $(tail -1 train.log)"

# a student's products in fp8: said, counted, and resumed to the bit
expect_exit 2 'the model has 1: none is left; lower train.fp8_native_first' "$distill" train config.yaml "${fp8[@]}" --set train.matmul=fp8 --set run.dir=none
model_config two.json 2 16
student=("$distill" train config.yaml "${fp8[@]}" --set student.config=two.json --set train.matmul=fp8 --set train.measure_every=4)
"${student[@]}" --set train.matmul=native --set run.dir=native-run >native-run.log
"${student[@]}" --set run.dir=straight >straight.log || fail "train.matmul fp8: $(tail -1 straight.log)"
grep -qE '^matmul +fp8 in [0-9]+ of [0-9]+ blocks; 1 at the front and 0 at the end stay native' straight.log || fail "not said: $(cat straight.log)"
for metric in activation_largest activation_zero_share gradient_largest gradient_zero_share gradient_rows_not_finite; do
    [ "$(grep -c "\"fp8/$metric\"" straight/metrics.jsonl)" = 4 ] || fail "metrics: fp8/$metric in $(grep -c "\"fp8/$metric\"" straight/metrics.jsonl) lines, not in those of steps 1, 4, 8 and 12"
done
"${student[@]}" --set run.dir=stopped --set train.steps=5 >stopped.log && "${student[@]}" --set run.dir=stopped --resume >>stopped.log || fail "resume: $(tail -1 stopped.log)"
"${student[@]}" --set run.dir=all --set train.fp8_native_first=0 >all.log
"${student[@]}" --set run.dir=ffn --set train.recompute=ffn >ffn.log
for f in model.safetensors optimizer.safetensors state.json; do
    cmp straight/checkpoints/step-00000012/$f stopped/checkpoints/step-00000012/$f || fail "$f differs after a resume at step 5"
    [ $f = state.json ] || cmp straight/checkpoints/step-00000012/$f ffn/checkpoints/step-00000012/$f || fail "$f differs where the ffn is recomputed"
done
cmp -s straight/checkpoints/step-00000012/model.safetensors native-run/checkpoints/step-00000012/model.safetensors && fail "train.matmul fp8 changes nothing"
cmp -s straight/checkpoints/step-00000012/model.safetensors all/checkpoints/step-00000012/model.safetensors && fail "train.fp8_native_first changes nothing"

# a student that becomes no number: the message says where it was seen
cp -r straight/checkpoints/step-00000012 sick
printf '\x00\x00\x80\x7f' | dd of=sick/model.safetensors bs=1 seek=$(($(stat -c %s sick/model.safetensors) - 4)) conv=notrunc 2>dd.log
expect_exit 5 'not finite in products in fp8: [0-9]+ rows of inputs, [1-9][0-9]* of gradients; no weight was changed' "${student[@]}" --set run.dir=none --set student.init=checkpoint --set student.path=sick

# inspect
"$distill" inspect logits >out.txt
for pattern in 'precision +fp8_e4m3' 'KL\(native \|\| it\) +[0-9.e-]+ nats per token' 'native blocks +1 at the front, 0 at the end' 'same first choice +[0-9.]+ %' 'measured on +[0-9]+ positions of 3 rows'; do
    grep -qE "$pattern" out.txt || fail "inspect does not say '$pattern': $(head -25 out.txt)"
done
"$distill" inspect logits --json >out.txt && [ "$(number out.txt precision_kl)" = "$(number logits/manifest.json kl)" ] || fail "inspect --json: KL $(number out.txt precision_kl)"
"$distill" inspect native | grep -qE 'precision +native' || fail "inspect of a native dump"
"$distill" inspect logits --verify >out.txt || fail "verify: $(cat out.txt)"
"$distill" inspect logits --against teacher --json >fp8.json
"$distill" inspect native --against teacher --json >native.json
# f16 log-probabilities are all that parts them: at the other precision it would be some 7e-5
for f in fp8 native; do awk -v kl="$(number $f.json kl_mean)" 'BEGIN { exit !(kl < 1e-6) }' || fail "$f against its own teacher: KL $(number $f.json kl_mean)"; done

# an independent word: all rows measured, and all logits of both teachers compared in NumPy
for python in "${DISTILL_PYTHON:-}" python3 /usr/bin/python3 ''; do [ -n "$python" ] && "$python" -c 'import h5py, numpy' 2>/dev/null && break; done
if [ -n "$python" ]; then
    all=(--set shards.kind=full --set shards.temperatures=[1.0])
    "$distill" teacher-dump config.yaml "${all[@]}" --set shards.path=full >full.log
    dump "${all[@]}" --set shards.path=full8 --set dump.error_rows=65536 >full8.log
    "$python" "$source_root/scripts/read_shards.py" full8 >read.log || fail "read_shards: $(cat read.log)"
    "$python" - full full8 <<'PY' || fail "the manifest's figures are not those of the logits"
import glob, json, sys
import h5py, numpy as np
def read(dataset, name):
    return np.concatenate([h5py.File(f)[name][:] for f in sorted(glob.glob(dataset + "/shards/*.h5"))])
def logp(dataset):
    t = read(dataset, "logits").astype(np.float64)
    return t - np.log(np.exp(t).sum(-1, keepdims=True))
e = json.load(open(sys.argv[2] + "/manifest.json"))["precision_error"]
p, q, on, tokens = logp(sys.argv[1]), logp(sys.argv[2]), read(sys.argv[1], "loss_mask") == 1, read(sys.argv[1], "tokens").astype(np.int64)
kl = (np.exp(p) * (p - q)).sum(-1)
label = np.abs(np.take_along_axis(p - q, np.roll(tokens, -1, 1)[..., None], -1))[..., 0]
want = {"rows": on.any(1).sum(), "positions": on.sum(), "kl": kl[on].mean(), "kl_row_max": max(kl[r][on[r]].mean() for r in range(len(on)) if on[r].any()),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1))[on].mean(), "label_logprob_difference": label[on].mean()}
for key, value in want.items():      # the dumps' logits are rounded to f16; the manifest's were not
    print(key, e[key], value)
    if abs(e[key] / value - 1) > (0 if key in ("rows", "positions") else 0.03):
        sys.exit(1)
PY
else echo "SKIPPED: the comparison with NumPy; no Python with h5py (DISTILL_PYTHON)"; fi
finish
