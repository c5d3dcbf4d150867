#!/usr/bin/env bash
# Several teacher-dump processes on one dataset, one of them killed; ranges for job arrays; both end in the shards of one process alone.
# DISTILL_SHARED="A B", by hand: one directory through two mounts of a network file system, or two names of it; the writers are spread over both.
source "$(dirname "$0")/common.sh"
make_world
read -r one two <<<"${DISTILL_SHARED:-. .}"
rm -rf "$one"/many "$one"/many-heldout
small=(--set shards.rows_per_shard=2 --set dump.batch_rows=1)
"$distill" teacher-dump config.yaml "${small[@]}" >dump.log
entries() { sed 's/,"prev".*//' "$1/journal.jsonl" | sort; }
same() {
    for name in "" -heldout; do
        for f in manifest.json .lock $(cd logits$name && ls shards/*); do cmp "logits$name/$f" "$1$name/$f" || fail "$1$name/$f differs $2"; done
        [ "$(ls "logits$name/shards")" = "$(ls "$1$name/shards")" ] || fail "$1$name has other files $2: $(ls -A "$1$name/shards")"
        [ "$(entries logits$name)" = "$(entries "$1$name")" ] || fail "the journals of logits$name and $1$name list other shards $2"
    done
}

# the second dies holding a shard that it is about to seal; it begins first, for it can only die of a shard that the others have left it
for i in 2 1 3; do
    [ $i = 2 ] && where=$two moment=shard.before_rename:kill@2 || where=$one moment=
    DISTILL_FAIL=$moment "$distill" teacher-dump config.yaml "${small[@]}" --set shards.path="$where/many" >many$i.log 2>&1 &
    pids[$i]=$!
done
code=0
wait ${pids[2]} 2>/dev/null || code=$?
[ $code = 137 ] || [ $code = 0 ] || fail "the writer that was to be killed: exit $code: $(tail -1 many2.log)"
[ $code = 137 ] || echo "the others left the second writer fewer than two shards: nobody was killed this time"
for i in 1 3; do wait ${pids[$i]} || fail "writer $i: $(tail -1 many$i.log)"; done
"$distill" teacher-dump config.yaml "${small[@]}" --set shards.path="$one/many" >again.log || fail "after three writers: $(tail -1 again.log)"
grep -q 'many: all .* sealed' again.log || fail "the two that lived left something: $(cat again.log)"
same "$one/many" "after three writers, one killed"

# ranges: no journal until they are entered
shards=$(ls logits/shards | wc -l)
for range in 0:3 3:9 9:$shards; do "$distill" teacher-dump config.yaml "${small[@]}" --set shards.path=parts --shards $range >range.log || fail "range $range: $(tail -1 range.log)"; done
[ -e parts/journal.jsonl ] && fail "a range wrote the journal"
"$distill" inspect parts --repair >repair.log || fail "repair after ranges: $(cat repair.log)"
"$distill" inspect parts-heldout --repair >repair.log || fail "repair after ranges: $(cat repair.log)"
same parts "after ranges"
expect_exit 2 'is no range' "$distill" teacher-dump config.yaml "${small[@]}" --set shards.path=parts --shards 3:$((shards + 1))
expect_exit 2 'needs a range' "$distill" teacher-dump config.yaml --shards 3-5
expect_exit 6 'was made with' "$distill" teacher-dump config.yaml "${small[@]}" --set shards.path=parts --set shards.k=4
finish
