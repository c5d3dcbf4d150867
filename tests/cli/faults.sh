#!/usr/bin/env bash
# Faults that the whole program meets: a disk that is full, slow, read-only or lies, while it dumps, trains, saves and reads; signals at bad moments. After
# each, going on ends in the bytes of a run that met none. faults.sh DISTILL SHIM
shim=$(realpath "$2")
source "$(dirname "$0")/common.sh"
long=${DISTILL_LONG_TESTS:-0}
make_world
# 2 threads of a small model: the arithmetic is deterministic whatever happens around it
"$distill" teacher-dump config.yaml >dump.log
steps=(--set train.steps=4 --set train.checkpoint_every=2 --set train.eval_every=0)
"$distill" train config.yaml --set run.dir=straight "${steps[@]}" >straight.log
last=checkpoints/step-00000004
tried=0
# shimmed RULE DIRECTORY command...: exit code in $code; $fired says whether the rule did
shimmed() {
    local rule=$1 where=$2
    shift 2
    rm -f fired
    code=0
    (LD_PRELOAD="$shim" DISTILL_SHIM="$rule" DISTILL_SHIM_DIR="$world/$where" DISTILL_SHIM_LOG="$world/fired" "$@" >fault.log 2>fault.err; exit $?) 2>/dev/null || code=$?
    fired=0
    [ -e fired ] && fired=1 && tried=$((tried + 1))
    return 0
}
same_run() { for f in model.safetensors optimizer.safetensors state.json; do cmp "straight/$last/$f" "$1/$last/$f" || fail "$1: $f differs $2"; done; }

# F6, F7, F9: checkpoints on a full or failing disk. The run ends with 4 and names the file; it goes on from the last whole checkpoint
for rule in write:ENOSPC fsync:EIO rename:EIO mkdir:ENOSPC open:EACCES close:EIO change:power change:power-data change:power-names; do
    for ((n = 1; ; n += long ? 1 : 1 + n / 2)); do
        rm -rf run
        shimmed "$rule@$n" run/checkpoints "$distill" train config.yaml --set run.dir=run "${steps[@]}"
        [ $fired = 1 ] || break
        [ $code = 4 ] || [ $code = 0 ] || [[ $rule = change:* && $code = 137 ]] || fail "train under $rule@$n: exit $code: $(cat fault.err)"
        [ $code = 4 ] && { grep -q 'run/checkpoints' fault.err || fail "train under $rule@$n names no file: $(cat fault.err)"; }
        code=0
        "$distill" train config.yaml --set run.dir=run "${steps[@]}" --resume >resume.log 2>&1 || code=$?
        [ $code = 0 ] || fail "resume after $rule@$n: $(tail -2 resume.log)"
        same_run run "after $rule@$n"
    done
    [ $n -gt 1 ] || fail "$rule never fired"
done
echo "checkpoints: $tried faults, none lost"

# F8: short and interrupted calls change nothing, wherever they happen
for rule in read:short@1+ write:short@1+ read:EINTR@3 write:EINTR@5; do
    rm -rf d d-heldout run
    shimmed "$rule" d "$distill" teacher-dump config.yaml --set shards.path=d
    [ $code = 0 ] && [ $fired = 1 ] || fail "dump under $rule: exit $code: $(cat fault.err)"
    diff -r logits d >diff.log || fail "dump under $rule differs: $(head -2 diff.log)"
    shimmed "$rule" "" "$distill" train config.yaml --set run.dir=run "${steps[@]}"
    [ $code = 0 ] && [ $fired = 1 ] || fail "train under $rule: exit $code: $(cat fault.err)"
    same_run run "under $rule"
done
# F7, F44: a disk that cannot be read: 4, and nothing half done; every file that is read
for where in teacher tokenizer logits config.yaml text.txt student-shape; do
    command=train
    case $where in teacher | text.txt) command=teacher-dump ;; esac
    rm -rf run d d-heldout
    shimmed read:EIO@1+ $where "$distill" $command config.yaml --set run.dir=run --set shards.path=$([ $command = train ] && echo logits || echo d) "${steps[@]}"
    [ $fired = 0 ] && continue                                    # mapped, not read
    [ $code = 4 ] || fail "$command when $where cannot be read: exit $code: $(cat fault.err)"
    grep -q "$where" fault.err || fail "$command when $where cannot be read names it not: $(cat fault.err)"
done

# F6: no room: said before the teacher runs, with both numbers; insisting is possible
rm -rf d d-heldout
code=0
(export LD_PRELOAD="$shim" DISTILL_SHIM_DIR="$world" DISTILL_SHIM=open:EIO@999999 DISTILL_SHIM_FREE=1000; "$distill" teacher-dump config.yaml --set shards.path=d >fault.log 2>fault.err) || code=$?
[ $code = 4 ] && grep -q '1000 are free' fault.err || fail "a disk without room: exit $code: $(cat fault.err)"
(export LD_PRELOAD="$shim" DISTILL_SHIM_DIR="$world" DISTILL_SHIM=open:EIO@999999 DISTILL_SHIM_FREE=1000; "$distill" teacher-dump config.yaml --set shards.path=d --no-space-check >fault.log 2>fault.err) || fail "--no-space-check: $(cat fault.err)"
diff -r logits d >diff.log || fail "--no-space-check: $(head -2 diff.log)"

# F10: a slow disk: the same dump and the same student, and the waiting is shown: in the progress line and in the metrics
rm -rf d d-heldout run
shimmed 'write:delay=20@1+' d "$distill" teacher-dump config.yaml --set shards.path=d --set corpus.max_rows=8
[ $code = 0 ] && [ $fired = 1 ] || fail "dump to a slow disk: exit $code: $(cat fault.err)"
shimmed 'read:delay=25@1+' logits/shards "$distill" train config.yaml --set run.dir=run "${steps[@]}"
[ $code = 0 ] && [ $fired = 1 ] || fail "train from a slow disk: exit $code: $(cat fault.err)"
same_run run "from a slow disk"
grep '^step 4/' fault.log | grep -oE 'waited [0-9.]+s' | awk '{ exit !($2 + 0 > 0.5) }' || fail "the progress line does not show the waiting: $(grep '^step' fault.log)"
grep -o '"train/loader_wait_seconds": [0-9.]*' run/metrics.jsonl | tail -1 | awk '{ exit !($2 > 0.5) }' || fail "metrics.jsonl does not show the waiting"

# F4: signals: twice, in the middle of a checkpoint on a slow disk
rm -rf run
code=0
LD_PRELOAD="$shim" DISTILL_SHIM='write:delay=30@1+' DISTILL_SHIM_DIR="$world/run/checkpoints" DISTILL_FAIL=checkpoint.before_rename:term@1,checkpoint.after_rename:term@1 \
    "$distill" train config.yaml --set run.dir=run "${steps[@]}" >signal.log 2>&1 || code=$?
[ $code = 75 ] || fail "exit $code after signals during a checkpoint: $(tail -2 signal.log)"
"$distill" train config.yaml --set run.dir=run "${steps[@]}" --resume >resume.log || fail "resume after signals"
same_run run "after signals during a checkpoint"

# F43: whatever lies in the directory of checkpoints, the newest whole one is used
mkdir run/checkpoints/step-00000099 run/checkpoints/.tmp-step-00000005 && echo '{' >run/checkpoints/step-00000099/files.json && touch run/checkpoints/LATEST run/checkpoints/step-x
"$distill" train config.yaml --set run.dir=run "${steps[@]}" --set train.steps=5 --resume >resume.log 2>resume.err || fail "resume beside garbage: $(tail -1 resume.err)"
grep -q 'step-00000099 is broken' resume.err && [ -d run/checkpoints/step-00000005 ] || fail "garbage among checkpoints: $(cat resume.err)"

# F41: time zone, locale and host are no part of any byte
rm -rf d d-heldout
TZ=Pacific/Kiritimati LC_ALL=C.UTF-8 "$distill" teacher-dump config.yaml --set shards.path=d >/dev/null && diff -r logits d >diff.log || fail "another time zone: $(head -2 diff.log)"
# F46: nothing is loaded from HDF5_PLUGIN_PATH
mkdir -p plugins && printf 'not a library' >plugins/libevil.so
rm -rf d d-heldout
HDF5_PLUGIN_PATH="$world/plugins" "$distill" teacher-dump config.yaml --set shards.path=d >/dev/null && diff -r logits d >diff.log || fail "HDF5_PLUGIN_PATH: $(head -2 diff.log)"
# F30: the teacher changed while its dump was stopped
cp -r teacher changed && printf '\x01' | dd of=changed/model.safetensors bs=1 seek=9000 conv=notrunc 2>/dev/null
expect_exit 6 'teacher_weights_hash' "$distill" teacher-dump config.yaml --set teacher.path=changed
cp teacher/model.safetensors changed/ && sed -i 's/"rms_norm_eps": 1e-0*6/"rms_norm_eps": 1e-05/' changed/config.json
expect_exit 6 'teacher_config_hash' "$distill" teacher-dump config.yaml --set teacher.path=changed

# streaming: stopped while it follows, gone on with while the dump still runs, killed once more: the same student
rm -rf d d-heldout run
LD_PRELOAD="$shim" DISTILL_SHIM='fsync:delay=40@1+' DISTILL_SHIM_DIR="$world/d" "$distill" teacher-dump config.yaml --set shards.path=d --set shards.rows_per_shard=2 >follow-dump.log 2>&1 &
dump=$!
"$distill" teacher-dump config.yaml --set shards.path=whole --set shards.rows_per_shard=2 >/dev/null
"$distill" train config.yaml --set shards.path=whole --set run.dir=whole-run --set train.steps=12 --set train.checkpoint_every=1 --set train.eval_every=0 >whole.log
for signal in TERM KILL; do
    "$distill" train config.yaml --set shards.path=d --set shards.follow=true --set run.dir=run --set train.steps=12 --set train.checkpoint_every=1 --set train.eval_every=0 --resume >follow.log 2>&1 &
    pid=$! done=$({ cat run/metrics.jsonl 2>/dev/null || true; } | wc -l)
    for ((i = 0; i < 600; i++)); do kill -0 $pid 2>/dev/null && [ "$(cat run/metrics.jsonl 2>/dev/null | wc -l)" -lt $((done + 3)) ] || break; sleep 0.02; done
    kill -$signal $pid 2>/dev/null || true
    wait $pid 2>/dev/null || true
done
"$distill" train config.yaml --set shards.path=d --set shards.follow=true --set run.dir=run --set train.steps=12 --set train.checkpoint_every=1 --set train.eval_every=0 --resume >follow.log 2>&1 || fail "following after two stops: $(tail -1 follow.log)"
wait $dump || fail "the dump that was followed: $(tail -1 follow-dump.log)"
for f in model.safetensors optimizer.safetensors state.json; do cmp whole-run/checkpoints/step-00000012/$f run/checkpoints/step-00000012/$f || fail "$f differs after following with two stops"; done
echo "$tried faults of the whole program"
finish
