#!/usr/bin/env bash
# What fp8 products do to a student of over 100M parameters: the same start, rows and schedule twice, train.matmul native and fp8, 400 steps on the shards of configs/gpu;
# held-out loss every 40 steps, the curves as an SVG.
#
#   scripts/fp8_run.sh [DISTILL [SETTING...]]     SETTING as in distill's --set; e.g. train.steps=300 run.seed=2
#
# Needs quickstart/text, quickstart/tokenizer and what scripts/gpu_run.sh leaves: quickstart/gpu-teacher and quickstart/gpu-logits (made here where they are missing).
# Run again it goes on where it stopped; everything is in quickstart/fp8-run, rm -r it to start over. Exit code 1: more than 0.5 % apart.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=${1:-build/train/distill}
settings=()
for s in "${@:2}"; do settings+=(--set "$s"); done
out=quickstart/fp8-run
[ -e quickstart/gpu-teacher ] || {
    "$distill" train configs/gpu/teacher.yaml
    ln -sfn "$PWD/$(ls -d quickstart/gpu-teacher-run/checkpoints/step-* | tail -1)" quickstart/gpu-teacher
}
[ -e quickstart/gpu-logits/manifest.json ] || "$distill" teacher-dump configs/gpu/distill.yaml "${settings[@]}"
mkdir -p "$out"
for matmul in native fp8; do
    "$distill" train configs/gpu/distill.yaml --set student.config=configs/gpu/teacher.json --set optimizer.lr=6e-4 --set train.steps=400 --set train.eval_every=40 --set train.log_every=40 \
        --set train.matmul=$matmul --set run.dir="$out/$matmul" "${settings[@]}" --resume
done
scripts/plot_curves.sh '' native="$out/native" fp8="$out/fp8" >"$out/curves.svg"
heldout() { grep -o "\"heldout/$2\": [0-9.]*" "$out/$1/metrics.jsonl" | tail -1 | grep -o '[0-9.]*$'; }
awk -v n="$(heldout native loss)" -v f="$(heldout fp8 loss)" -v nc="$(heldout native ce)" -v fc="$(heldout fp8 ce)" 'BEGIN {
    d = 100 * (f - n) / n
    printf "held-out loss: native %.4f, fp8 %.4f (%+.2f %%); cross entropy %.4f, %.4f (%+.2f %%)\n", n, f, d, nc, fc, 100 * (fc - nc) / nc
    exit !(d <= 0.5 && d >= -0.5) }'
