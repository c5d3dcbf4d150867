#!/usr/bin/env bash
# What fp8 products do to a student of over 100M parameters: pairs of runs with the same start, rows and schedule, train.matmul native and fp8, on the shards of configs/gpu; held-out loss
# every 100 steps, the curves as an SVG, and all students measured by eval, which multiplies natively. Several seeds, because a run goes another way with every rounding: two native runs
# from scratch that only sum in another order (train.micro_rows) end 0.6 % apart in KL.
#
#   scripts/fp8_run.sh [DISTILL [SETTING...]]     DISTILL   default build-gpu/train/distill
#                                                  SETTING   as in distill's --set; e.g. train.steps=400
#   SEEDS="1 2 3"     of the pairs; default 1 2
#   START=trained     600 steps from one student that hard labels have trained for two epochs, as most distillations begin; a seed is an order of rows.
#                     Default scratch: 1200 steps, a seed is the first weights too
#
# Needs quickstart/text, quickstart/tokenizer and what scripts/gpu_run.sh leaves: quickstart/gpu-teacher and quickstart/gpu-logits (made here where they are missing).
# Run again it goes on where it stopped; everything is in quickstart/fp8-run, rm -r it to start over. Exit code 1: in one of the pairs fp8's held-out loss is more than 0.5 % from native's.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=${1:-build-gpu/train/distill}
settings=()
for s in "${@:2}"; do settings+=(--set "$s"); done
out=quickstart/fp8-run
[ -e quickstart/gpu-teacher ] || {
    "$distill" train configs/gpu/teacher.yaml
    ln -sfn "$PWD/$(ls -d quickstart/gpu-teacher-run/checkpoints/step-* | tail -1)" quickstart/gpu-teacher
}
[ -e quickstart/gpu-logits/manifest.json ] || "$distill" teacher-dump configs/gpu/distill.yaml "${settings[@]}"
case ${START:-scratch} in
scratch) run=(--set student.config=configs/gpu/teacher.json --set optimizer.lr=6e-4 --set train.steps=1200) prefix= ;;
trained)
    "$distill" train configs/gpu/teacher.yaml --set run.seed=11 --set train.epochs=2 --set run.dir="$out/start" --resume
    run=(--set student.init=checkpoint --set student.path="$(ls -d "$out/start/checkpoints"/step-* | tail -1)" --set optimizer.lr=2e-4 --set train.steps=600) prefix=trained- ;;
*) echo "fp8_run: START=$START: scratch or trained" >&2; exit 2 ;;
esac
mkdir -p "$out"
curves=() models=() pairs=
heldout() { grep -o "\"heldout/$2\": [0-9.]*" "$out/$1/metrics.jsonl" | tail -1 | grep -o '[0-9.]*$'; }
for seed in ${SEEDS:-1 2}; do
    for matmul in native fp8; do
        name=$prefix$matmul-$seed
        "$distill" train configs/gpu/distill.yaml "${run[@]}" --set train.batch_rows=16 --set train.micro_rows=16 \
            --set train.eval_every=100 --set train.log_every=100 "${settings[@]}" --set train.matmul=$matmul --set run.seed="$seed" --set run.dir="$out/$name" --resume
        curves+=("$name=$out/$name")
        models+=(--model "$name=$(ls -d "$out/$name/checkpoints"/step-* | tail -1)")
    done
    pairs+="$seed $(heldout "${prefix}native-$seed" loss) $(heldout "${prefix}fp8-$seed" loss) $(heldout "${prefix}native-$seed" ce) $(heldout "${prefix}fp8-$seed" ce)"$'\n'
done
CURVE=kd FROM=0.3 scripts/plot_curves.sh '' "${curves[@]}" >"$out/${prefix}curves.svg"
"$distill" eval configs/gpu/distill.yaml "${models[@]}" "${settings[@]}"
awk 'NF != 5 { print "fp8_run: seed " $1 ": a run left no held-out loss"; bad = 2; exit } {
    d = 100 * ($3 - $2) / $2; sum += d; squares += d * d; far += d > 0.5 || d < -0.5
    printf "seed %s: held-out loss native %.4f, fp8 %.4f (%+.2f %%); cross entropy %.4f, %.4f (%+.2f %%)\n", $1, $2, $3, d, $4, $5, 100 * ($5 - $4) / $4
} END { if (bad) exit bad; printf "mean %+.2f %%", sum / NR; if (NR > 1) printf ", standard error %.2f %%", sqrt((squares - sum * sum / NR > 0 ? squares - sum * sum / NR : 0) / (NR - 1) / NR); print ""; exit far > 0 }' <<<"${pairs%$'\n'}"
