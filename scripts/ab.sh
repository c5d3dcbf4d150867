#!/usr/bin/env bash
# What the kinds of shards are worth: one teacher, its targets stored in full, as hybrid, sampled and topk, and students from each (topk twice: bucket and renormalise)
# beside cross entropy alone, with several seeds; held-out KL to the teacher, loss, accuracy, agreement and calibration error, mean +- standard deviation over the seeds.
#
#   scripts/ab.sh cpu|gpu [DISTILL [SEED...]]     DISTILL   default build/train/distill, for gpu build-gpu/train/distill
#
# cpu   the quickstart's text, teacher and student (run scripts/quickstart.sh first) on 640 rows, 3 epochs; 15 to 30 minutes on two cores, 1.2 GB of disk
# gpu   a teacher of 118.6M parameters and students of 10M, configs/gpu/; needs quickstart/text and quickstart/tokenizer; three minutes on one H100, 7 GB of disk
# Seeds are 1 2 3 unless named. Run it again to go on after an interruption; everything is in quickstart/ab-cpu or
# quickstart/ab-gpu, rm -r it to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(1 2 3)
out=quickstart/ab-$device
last() { ls -d "$1/checkpoints"/step-* | tail -1; }
distill=${2:-build$([ "$device" = gpu ] && echo -gpu)/train/distill}
case $device in
    cpu) config=configs/quickstart/distill.yaml settings=(--set corpus.max_rows=640 --set objective.kd_weight=1 --set objective.ce_weight=0)
        [ -d quickstart/teacher ] || { echo "ab: there is no quickstart/teacher; run scripts/quickstart.sh first" >&2; exit 2; } ;;
    gpu) config=configs/gpu/distill.yaml settings=()
        [ -e quickstart/gpu-teacher ] || {
            "$distill" train configs/gpu/teacher.yaml
            ln -sfn "$PWD/$(last quickstart/gpu-teacher-run)" quickstart/gpu-teacher
        } ;;
    *) sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0" >&2; exit 2 ;;
esac
settings+=(--set train.epochs=3 --set train.eval_every=0)
shards() {  # the settings of a variant's shards
    case $1 in
        full | sampled | hybrid) echo --set shards.kind="$1" --set shards.path="$out/logits-$1" ;;
        *) echo --set shards.kind=topk --set shards.k=64 --set shards.path="$out/logits-topk" ;;
    esac
}
objective() {
    case $1 in
        renormalise) echo --set objective.tail=renormalise ;;
        ce) echo --set objective.kd_weight=0 --set objective.ce_weight=1 ;;
    esac
}
mkdir -p "$out"
for kind in full hybrid sampled topk; do "$distill" teacher-dump $config "${settings[@]}" $(shards $kind); done
for seed in "${seeds[@]}"; do
    [ -e "$out/eval-$seed.json" ] && continue
    models=()
    for variant in full hybrid sampled bucket renormalise ce; do
        "$distill" train $config "${settings[@]}" $(shards $variant) $(objective $variant) --set run.seed="$seed" --set run.dir="$out/$variant-$seed" --resume
        models+=(--model "$variant=$(last "$out/$variant-$seed")")
    done
    "$distill" eval $config "${settings[@]}" $(shards full) --set eval.max_rows=0 --set eval.json="$out/eval-$seed.json" "${models[@]}"
done

# eval.json has one key a line
for seed in "${seeds[@]}"; do cat "$out/eval-$seed.json"; done | awk '
    { key = $1; value = $2; gsub(/[":,]/, "", key); gsub(/[",]/, "", value) }
    key == "name" { name = value; if (!(name in seen)) { seen[name] = ++n; order[n] = name } }
    key ~ /^(forward_kl|loss|top1|agreement|confidence|calibration_error)$/ && name { scale = key ~ /kl|loss/ ? 1 : 100; v = value * scale; count[name, key]++; sum[name, key] += v; squares[name, key] += v * v }
    key == "gap_closed" { name = "" }
    function cell(name, key, digits,    k, mean, variance) {
        k = count[name, key]
        if (!k) return "-"
        mean = sum[name, key] / k
        variance = k > 1 ? (squares[name, key] - k * mean * mean) / (k - 1) : 0
        if (variance < 1e-10) return sprintf("%." digits "f", mean)      # the teacher, or one seed
        return sprintf("%." digits "f +- %." digits "f", mean, sqrt(variance))
    }
    END {
        printf "\n%-12s %18s %18s %16s %16s %16s %16s\n", "", "KL to the teacher", "loss, nats", "top-1, %", "agreement, %", "confidence, %", "calibration err, %"
        for (i = 1; i <= n; i++) {
            m = order[i]
            printf "%-12s %18s %18s %16s %16s %16s %16s\n", m, cell(m, "forward_kl", 4), cell(m, "loss", 4), cell(m, "top1", 2), cell(m, "agreement", 2), cell(m, "confidence", 2), cell(m, "calibration_error", 2)
        }
    }'
echo "mean +- standard deviation over seeds ${seeds[*]} of the students; there is one teacher"
