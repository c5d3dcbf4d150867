#!/usr/bin/env bash
# A real run on one GPU: a teacher of over 100M parameters from scratch on the quickstart's text, its logits into shards of two kinds, a student with a twelfth of
# its parameters from each, the same student on hard labels, the table, and the curves (quickstart/gpu-curves.svg).
#
#   scripts/gpu_run.sh [DISTILL]     DISTILL   default build-gpu/train/distill
#
# Needs quickstart/text and quickstart/tokenizer, which scripts/quickstart.sh leaves. Run again it goes on where it stopped; rm -r quickstart/gpu-* to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=${1:-build-gpu/train/distill}
run() { printf '$ %s\n' "$*"; "$@"; }
last() { ls -d "quickstart/gpu-$1-run/checkpoints"/step-* | tail -1; }
topk=(--set shards.kind=topk --set shards.k=64 --set shards.path=quickstart/gpu-topk-logits)
run "$distill" train configs/gpu/teacher.yaml --resume
ln -sfn "$PWD/$(last teacher)" quickstart/gpu-teacher
run "$distill" teacher-dump configs/gpu/distill.yaml
run "$distill" teacher-dump configs/gpu/distill.yaml "${topk[@]}"
run "$distill" train configs/gpu/distill.yaml --resume
run "$distill" train configs/gpu/distill.yaml "${topk[@]}" --set run.dir=quickstart/gpu-topk-run --resume
run "$distill" train configs/gpu/distill.yaml --set run.dir=quickstart/gpu-control-run --set objective.kd_weight=0 --set objective.ce_weight=1 --resume
run "$distill" eval configs/gpu/distill.yaml --model topk="$(last topk)" --model hybrid="$(last student)" --model control="$(last control)"
scripts/plot_curves.sh quickstart/gpu-teacher-run topk=quickstart/gpu-topk-run hybrid=quickstart/gpu-student-run control=quickstart/gpu-control-run >quickstart/gpu-curves.svg
