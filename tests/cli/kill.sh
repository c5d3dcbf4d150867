#!/usr/bin/env bash
# kill -9 at any moment of dump and train, start again, until done: the same shards, weights, moments and losses as without a kill.
# DISTILL_LONG_TESTS=1: a thousand kills.
source "$(dirname "$0")/common.sh"
long=${DISTILL_LONG_TESTS:-0}
rounds=$([ $long = 1 ] && echo 100 || echo 12)
datasets=$([ $long = 1 ] && echo 15 || echo 1)      # each is killed about 34 times
cycles=$([ $long = 1 ] && echo 72 || echo 4)        # of 7 kills of one train
straight=straight last=step-00000040
make_world
# a schedule that depends on where the run is, and on how long it will be
sed -e 's/steps: 12/steps: 40/' -e 's/{kind: constant}/{kind: cosine, warmup_steps: 5}/' config.yaml >killed.yaml
"$distill" teacher-dump killed.yaml >dump.log
"$distill" train killed.yaml --set run.dir=straight >straight.log
[ "$(grep -o '"train/lr": [0-9.e-]*' straight/metrics.jsonl | sed -n '1p;5p;$p' | grep -o '[0-9.e-]*$' | tr '\n' ' ')" = '0.002 0.01 0.001 ' ] || fail "the learning rate does not rise to 0.01 in 5 steps and end at a tenth"

# runs a command quietly; its exit code is in $code
run() { code=0; ("$@" >>killed.log 2>&1; exit $?) 2>/dev/null || code=$?; }

# --foreground: timeout(1) would die of the signal itself, and not wait until its child is gone
# runs a command again and again, killed after a random time that grows, until it ends by itself
until_done() {
    local i
    for ((i = 0; i < rounds; i++)); do
        run timeout --foreground -s KILL "$(awk -v s="$RANDOM" -v i="$i" 'BEGIN { printf "%.3f", 0.02 + (s / 32768) * (0.15 + 0.05 * i) }')" "$@"
        [ $code = 0 ] && return
        [ $code = 124 ] && continue                 # timeout(1)'s word for a command that ended by itself just as the clock struck
        [ $code = 137 ] || { fail "exit $code after a kill: $(tail -2 killed.log)"; return; }
    done
    run "$@"
    [ $code = 0 ] || fail "does not end after $rounds kills: $(tail -2 killed.log)"
}

# one run that is killed once at every "point@pass" of $moments, one process each, and by the clock in every third of them as well, whichever comes first; then it may
# end. No process can come past its moment, so that none of these kills depends on how fast this machine is. Counts in $kills
killed_at() {
    local i=0 moment
    kills=0
    for moment in $moments; do
        local clock=()
        [ $((i++ % 3)) = 2 ] && clock=(timeout --foreground -s KILL "$(awk -v s="$RANDOM" 'BEGIN { printf "%.3f", 0.02 + 0.2 * s / 32768 }')")
        DISTILL_FAIL="${moment/@/:kill@}" run "${clock[@]}" "$@"
        [ $code = 137 ] || { fail "process $i was not killed at $moment but ended with $code: $(tail -2 killed.log)"; return; }
        kills=$((kills + 1))
    done
    run "$@"
    [ $code = 0 ] || fail "does not end after $kills kills: $(tail -2 killed.log)"
}

same_dataset() { for f in manifest.json journal.jsonl $(cd "$1" && ls shards/*.h5); do cmp "$1/$f" "$2/$f" || fail "$2/$f differs $3"; done; }
# losses, norms and learning rates of every step, once each: what stands behind them is time
losses() { sed 's/, "train\/tokens_per_second.*//' "$1/metrics.jsonl"; }
same_run() {
    for f in model.safetensors optimizer.safetensors state.json; do cmp "$straight/checkpoints/$last/$f" "$1/checkpoints/$last/$f" || fail "$1: $f differs $2"; done
    [ "$(losses $straight)" = "$(losses "$1")" ] || fail "$1: metrics.jsonl differs $2: $(diff <(losses $straight) <(losses "$1") | head -5)"
    [ -z "$(find "$1" -name '*.tmp*')" ] || fail "$1: left behind $2: $(find "$1" -name '*.tmp*')"
}

# dump: at every named point of a seal and of a journal line, more than once, in one dataset
points=$(grep -rhoE 'FAILPOINT(_FIRES)?\("[a-z_.]+"\)' "$source_root"/data/{journal,shard_write}.c | grep -oE '"[a-z_.]+"' | tr -d '"' | grep -v '^writer' | sort -u)
moments=
for pass in 1 3; do for point in $points; do moments+=" $point@$pass"; done; done
"$distill" teacher-dump killed.yaml --set shards.path=small --set shards.rows_per_shard=2 >dump.log
dump_kills=0
for ((d = 0; d < datasets; d++)); do
    rm -rf killed killed-heldout
    killed_at "$distill" teacher-dump killed.yaml --set shards.path=killed --set shards.rows_per_shard=2
    dump_kills=$((dump_kills + kills))
    same_dataset small killed "after $kills kills"
    same_dataset small-heldout killed-heldout "after $kills kills"
    "$distill" inspect killed >inspect.log || fail "inspect after kills: $(cat inspect.log)"
done
# train: before and after an update, between steps, around a checkpoint
moments=
for ((c = 0; c < cycles; c++)); do moments+=" train.before_update@3 train.after_update@4 train.step_done@2 checkpoint.before_rename@2 train.before_update@4 checkpoint.after_rename@1 train.step_done@5"; done
steps=$((16 * cycles + 36))                         # a cycle gets 14 steps forward
often=(--set train.steps=$steps --set train.checkpoint_every=2)
"$distill" train killed.yaml --set run.dir=straight-long "${often[@]}" >straight.log
killed_at "$distill" train killed.yaml --set run.dir=killed-run "${often[@]}" --resume
straight=straight-long last=$(printf 'step-%08d' $steps)
same_run killed-run "after $kills kills"
straight=straight last=step-00000040
echo "killed: teacher-dump of $datasets datasets $dump_kills times, one train $kills times; the same bytes as never"
[ $dump_kills -ge $((20 * datasets)) ] && [ $kills -ge 20 ] || fail "too few kills: $dump_kills of the dump, $kills of train"

# the points that are not passed again and again: a manifest, a writer's start, a checkpoint; the others, each alone, in the long version
for point in $(grep -rhoE 'FAILPOINT(_FIRES)?\("[a-z_.]+"\)' "$source_root"/data/{journal,manifest,shard,shard_write}.c "$source_root"/train/checkpoint.c | grep -oE '"[a-z_.]+"' | tr -d '"' | sort -u); do
    for pass in 1 3; do
        case $point in
        checkpoint.*)
            rm -rf point-run
            DISTILL_FAIL="$point:kill@$pass" run "$distill" train killed.yaml --set run.dir=point-run
            [ $code = 137 ] || fail "train does not come by $point: exit $code"
            run "$distill" train killed.yaml --set run.dir=point-run --resume
            [ $code = 0 ] || fail "train after a kill at $point: $(tail -1 killed.log)"
            same_run point-run "after a kill at $point@$pass" ;;
        shard.read_*) ;;                             # of the reader: tests/data/test_shard_faults.c
        *)
            [[ $point = manifest.* || $point = writer.* ]] || [ $long = 1 ] || continue
            rm -rf point point-heldout
            DISTILL_FAIL="$point:kill@$pass" run "$distill" teacher-dump killed.yaml --set shards.path=point
            # the manifest is written once a dataset, and there are two
            [ $code = 137 ] || [[ $point = manifest.* && $pass = 3 ]] || [[ $point = writer.* && $pass = 3 ]] || fail "teacher-dump does not come by $point: exit $code"
            run "$distill" teacher-dump killed.yaml --set shards.path=point
            [ $code = 0 ] || fail "teacher-dump after a kill at $point: $(tail -1 killed.log)"
            same_dataset logits point "after a kill at $point@$pass" ;;
        esac
    done
done

# no space for a checkpoint: says so, and the run goes on from the one before
DISTILL_FAIL="checkpoint.before_rename:enospc@3" expect_exit 4 'checkpoint of step 9.*No space' "$distill" train killed.yaml --set run.dir=full
run "$distill" train killed.yaml --set run.dir=full --resume
[ $code = 0 ] || fail "resume after a full disk: $(tail -1 killed.log)"
same_run full "after a full disk"

# the student follows a dump that is killed over and over
"$distill" train killed.yaml --set run.dir=follow --set shards.path=later --set shards.follow=true --set train.eval_every=0 >follow.log 2>&1 &
pid=$!
until_done "$distill" teacher-dump killed.yaml --set shards.path=later
wait $pid || fail "train that follows a killed dump: $(tail -2 follow.log)"
cmp "straight/checkpoints/$last/model.safetensors" "follow/checkpoints/$last/model.safetensors" || fail "following a killed dump gave other weights"
finish
