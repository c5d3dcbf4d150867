#!/usr/bin/env bash
# A real run on one GPU: a teacher of over 100M parameters from scratch on the quickstart's text, its logits into shards, a student with a tenth
# of its parameters, the same student on hard labels, and the table. scripts/gpu_run.sh [DISTILL]; needs quickstart/text and quickstart/tokenizer.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=${1:-build/train/distill}
run() { printf '$ %s\n' "$*"; "$@"; }
run "$distill" train configs/gpu/teacher.yaml
ln -sfn "$(ls -d "$PWD"/quickstart/gpu-teacher-run/checkpoints/step-* | tail -1)" quickstart/gpu-teacher
run "$distill" teacher-dump configs/gpu/distill.yaml | grep -v '  shard '
run "$distill" train configs/gpu/distill.yaml
run "$distill" train configs/gpu/distill.yaml --set run.dir=quickstart/gpu-control-run --set objective.kd_weight=0 --set objective.ce_weight=1
run "$distill" eval configs/gpu/distill.yaml --model distilled="$(ls -d quickstart/gpu-student-run/checkpoints/step-* | tail -1)" --model control="$(ls -d quickstart/gpu-control-run/checkpoints/step-* | tail -1)"
