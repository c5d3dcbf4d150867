#!/usr/bin/env bash
# kill -9 at any moment of dump and train, start again, until done: the same shards and the same weights as without a kill.
# DISTILL_LONG_TESTS=1: many more rounds.
source "$(dirname "$0")/common.sh"
rounds=$([ "${DISTILL_LONG_TESTS:-0}" = 1 ] && echo 500 || echo 12)
make_world
"$distill" teacher-dump config.yaml >dump.log
"$distill" train config.yaml --set run.dir=straight >straight.log
cp config.yaml killed.yaml

# runs a command again and again, killed after a random time that grows, until it ends by itself
until_done() {
    local i code
    for ((i = 0; i < rounds; i++)); do
        code=0
        timeout -s KILL "$(awk -v s="$RANDOM" -v i="$i" 'BEGIN { printf "%.3f", 0.02 + (s / 32768) * (0.15 + 0.05 * i) }')" "$@" >>killed.log 2>&1 || code=$?
        [ $code = 0 ] && return
        [ $code = 137 ] || { fail "exit $code after a kill: $(tail -2 killed.log)"; return; }
    done
    "$@" >>killed.log 2>&1 || fail "does not end after $rounds kills: $(tail -2 killed.log)"
}

until_done "$distill" teacher-dump killed.yaml --set shards.path=killed
for f in manifest.json $(cd logits && ls shards/*.h5); do cmp "logits/$f" "killed/$f" || fail "$f differs after kills"; done
"$distill" inspect killed >inspect.log || fail "inspect after kills: $(cat inspect.log)"
until_done "$distill" train killed.yaml --set run.dir=killed-run --resume
for f in model.safetensors optimizer.safetensors; do
    cmp straight/checkpoints/step-00000012/$f killed-run/checkpoints/step-00000012/$f || fail "$f differs after kills"
done

# and at every named point of a checkpoint, a seal and a journal line
for point in $(grep -rhoE 'FAILPOINT(_FIRES)?\("[a-z_.]+"\)' "$source_root"/data/*.c "$source_root"/train/*.c | grep -oE '"[a-z_.]+"' | tr -d '"' | sort -u); do
    rm -rf point point-heldout point-run
    DISTILL_FAIL="$point:kill" "$distill" teacher-dump killed.yaml --set shards.path=point >point.log 2>&1 || true
    "$distill" teacher-dump killed.yaml --set shards.path=point >>point.log 2>&1 || fail "teacher-dump after a kill at $point: $(tail -1 point.log)"
    for f in manifest.json $(cd logits && ls shards/*.h5); do cmp "logits/$f" "point/$f" || fail "$f differs after a kill at $point"; done
    case $point in checkpoint.*) ;; *) continue ;; esac
    DISTILL_FAIL="$point:kill" "$distill" train killed.yaml --set run.dir=point-run >point.log 2>&1 || true
    "$distill" train killed.yaml --set run.dir=point-run --resume >>point.log 2>&1 || fail "train after a kill at $point: $(tail -1 point.log)"
    cmp straight/checkpoints/step-00000012/model.safetensors point-run/checkpoints/step-00000012/model.safetensors || fail "weights differ after a kill at $point"
done
finish
