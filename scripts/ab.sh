#!/usr/bin/env bash
# What the kinds of shards are worth, on one GPU: one teacher, its targets stored in full, as hybrid, sampled and topk, and students from each (topk twice: bucket and
# renormalise) beside cross entropy alone, with several seeds. scripts/gpu_ab.sh [DISTILL [SEEDS]]; needs quickstart/text and quickstart/tokenizer; 7 GB of disk, three minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
distill=${1:-build/train/distill}
config=configs/gpu/distill.yaml
last() { ls -d "$1/checkpoints"/step-* | tail -1; }
shards() {  # the settings of a variant's shards
    case $1 in
        full | sampled) echo --set shards.kind=$1 --set shards.path=quickstart/ab-logits-$1 ;;
        hybrid) echo --set shards.path=quickstart/ab-logits-hybrid ;;
        *) echo --set shards.kind=topk --set shards.k=64 --set shards.path=quickstart/ab-logits-topk ;;
    esac
}
objective() {
    case $1 in
        renormalise) echo --set objective.tail=renormalise ;;
        ce) echo --set objective.kd_weight=0 --set objective.ce_weight=1 ;;
    esac
}
[ -e quickstart/gpu-teacher ] || {
    "$distill" train configs/gpu/teacher.yaml
    ln -sfn "$PWD/$(last quickstart/gpu-teacher-run)" quickstart/gpu-teacher
}
for kind in full hybrid sampled topk; do "$distill" teacher-dump $config $(shards $kind); done
for seed in ${2:-1 2 3}; do
    models=()
    for variant in full hybrid sampled topk renormalise ce; do
        "$distill" train $config $(shards $variant) $(objective $variant) --set run.seed=$seed --set run.dir=quickstart/ab-$variant-$seed --set train.epochs=3 --set train.eval_every=0
        models+=(--model "$variant=$(last quickstart/ab-$variant-$seed)")
    done
    "$distill" eval $config $(shards topk) "${models[@]}"
done
