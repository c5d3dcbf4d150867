#!/usr/bin/env bash
# Kinds of shards: each is dumped, the same to the byte however the batch is cut and by however many threads; inspect says what it is; train learns from it.
source "$(dirname "$0")/common.sh"
make_world

# dump PATH KIND BATCH_ROWS CHUNK_TOKENS THREADS
dump() {
    "$distill" teacher-dump config.yaml --set shards.path="$1" --set shards.kind="$2" --set shards.m=9 --set shards.draws=20 --set dump.batch_rows="$3" --set dump.chunk_tokens="$4" \
        --set run.threads="$5" $([ "$2" = sampled ] && echo "--set shards.temperatures=[1.0]") >"$1.log" || fail "dump of $2: $(tail -1 "$1.log")"
}
for kind in hybrid topk sampled full; do
    dump $kind $kind 2 64 2
    for way in '1 1000 1' '3 7 2' '5 1 1'; do
        rm -rf again again-heldout
        dump again $kind $way
        diff -r $kind again >diff.txt && diff -r $kind-heldout again-heldout >>diff.txt || fail "$kind dumped with batch rows, chunk tokens and threads $way: $(head -2 diff.txt)"
    done
done
grep -q '9 draws are [0-9.]* different tokens' hybrid.log || fail "hybrid does not say what it drew: $(tail -1 hybrid.log)"
grep -q 'sampled, 20 draws, at most' sampled.log || fail "the plan of sampled: $(grep shards sampled.log)"

"$distill" inspect hybrid >out.txt
for pattern in 'kind +hybrid, the best 8 per position and 9 draws from the rest' 'kept mass +p1 0\.' 'different ids +[0-9.]+ of 9 draws' 'bytes per token'; do
    grep -qE "$pattern" out.txt || fail "inspect of hybrid does not say '$pattern': $(head -c 1500 out.txt)"
done
"$distill" inspect sampled >out.txt
for pattern in 'kind +sampled, 20 draws per position' 'different ids +[0-9.]+ of 20 draws'; do grep -qE "$pattern" out.txt || fail "inspect of sampled does not say '$pattern': $(head -c 1500 out.txt)"; done
grep -q 'kept mass' out.txt && fail "a sampled dataset has no head whose mass could be kept"
"$distill" inspect hybrid --row 3 --tokenizer teacher --top 2 >out.txt && [ "$(grep -c 'drawn: ' out.txt)" = 48 ] || fail "the draws of a row are not shown: $(head -3 out.txt)"
"$distill" inspect hybrid --row 3 --json >out.txt && grep -q '"drawn": \[' out.txt || fail "no draws in JSON"
"$distill" inspect sampled --row 3 >out.txt && grep -qE '[0-9]+ 0\.[0-9]{2}00' out.txt || fail "shares of a sampled row: $(head -3 out.txt)"

# learning: from draws without bias, from the head alone, at the other temperature
for way in 'hybrid' 'hybrid objective.tail=bucket' 'hybrid objective.temperature=2' 'sampled'; do
    set -- $way
    rm -rf run
    "$distill" train config.yaml --set run.dir=run --set shards.path=$1 --set shards.kind=$1 --set shards.m=9 --set shards.draws=20 ${2:+--set $2} >run.log 2>run.err || fail "train from $way: $(tail -1 run.err)"
    [ -d run/checkpoints/step-00000012 ] || fail "train from $way left no checkpoint"
done
expect_exit 6 'temperature' "$distill" train config.yaml --set run.dir=run5 --set shards.path=sampled --set shards.kind=sampled --set shards.draws=20 --set objective.temperature=2
expect_exit 2 'serve only the temperature they are made at' "$distill" teacher-dump config.yaml --set shards.path=two --set shards.kind=sampled
expect_exit 6 'kind "hybrid", this run has "topk"' "$distill" teacher-dump config.yaml --set shards.path=hybrid
expect_exit 6 'm 9, this run has 8' "$distill" teacher-dump config.yaml --set shards.path=hybrid --set shards.kind=hybrid --set shards.m=8
finish
