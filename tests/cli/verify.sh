#!/usr/bin/env bash
# inspect --verify, --repair, --against and --rows: what is broken is told and made again, byte for byte; rows as scripts read them.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
cp -r logits reference
says() { for p in "$@"; do grep -qE -- "$p" out.txt || fail "no '$p' in: $(head -c 1500 out.txt)"; done; }

"$distill" inspect logits --verify >out.txt || fail "a sound dataset: $(cat out.txt)"
says 'faults +none' 'sound +[0-9]+'
"$distill" inspect logits --repair >out.txt || fail "repair of a sound dataset"
diff -r reference logits >diff.log || fail "a repair with nothing to do changed something: $(cat diff.log)"

# three faults, all of them told; repaired; made again
flip() { printf '\x55' | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null; }
flip logits/shards/shard-000000.h5 20000
rm logits/shards/shard-000001.h5
truncate -s 9000 logits/shards/shard-000002.h5
expect_exit 3 '[0-9]+ faults.*--repair' "$distill" inspect logits --verify
says 'FAULT .*shard-000000.h5: its SHA-256' 'FAULT .*shard-000000.h5: row [0-9]+ of the shard' 'FAULT .*shard-000001.h5.*missing' 'FAULT .*shard-000002.h5: is 9000 bytes'
expect_exit 3 'faults' "$distill" inspect logits --verify --json
grep -q '"fault_count": [1-9]' out.txt || fail "JSON without the number of faults"
expect_exit 3 '--repair' "$distill" teacher-dump config.yaml
"$distill" inspect logits --repair >out.txt || fail "repair: $(cat out.txt)"
says 'set aside +2' 'shard-000000.h5: set aside as .*shard-000000.h5.quarantine$' 'run teacher-dump again'
"$distill" inspect logits --verify >out.txt || fail "after a repair: $(cat out.txt)"
says '3 of [0-9]+ shards are not made yet: 0-2'
"$distill" teacher-dump config.yaml >again.log || fail "dump after a repair"
for f in manifest.json .lock $(cd reference && ls shards/*); do cmp reference/$f logits/$f || fail "$f differs after a repair"; done
[ "$(sed 's/,"prev".*//' reference/journal.jsonl | sort)" = "$(sed 's/,"prev".*//' logits/journal.jsonl | sort)" ] || fail "the journals list other shards"
[ -e logits/journal.jsonl.quarantine ] || fail "the old journal was not kept"
"$distill" train config.yaml --set run.dir=run --set train.steps=2 >train.log || fail "train on a repaired dataset: $(tail -1 train.log)"

# another run's shard: 6
"$distill" teacher-dump config.yaml --set run.seed=4 --set shards.path=other >/dev/null
cp -r reference mixed && cp other/shards/shard-000001.h5 mixed/shards/shard-000099.h5
expect_exit 6 '1 faults' "$distill" inspect mixed --verify
expect_exit 2 'dataset' "$distill" inspect teacher --verify
expect_exit 2 'one at a time' "$distill" inspect logits --verify --row 1

# against the model it was made with: only what the format rounds; against another: not
"$distill" inspect reference --against teacher --sample 3 --json >out.txt || fail "--against"
value() { grep -o "\"$1\": [0-9.e-]*" out.txt | grep -o '[0-9.e-]*$'; }
awk -v kl="$(value kl_mean)" -v first="$(value first_agreement)" -v best="$(value best_agreement)" -v label="$(value label_difference)" \
    'BEGIN { exit !(kl >= 0 && kl < 1e-6 && first == 1 && best == 1 && label < 2e-3) }' || fail "against its own teacher: $(cat out.txt)"
grep -q '"same_model": true' out.txt && grep -q '"rows": 3' out.txt || fail "against its own teacher: $(cat out.txt)"
"$distill" inspect reference --against run/checkpoints/step-00000002 >out.txt || fail "--against a student"
says 'no: its hash differs' 'KL.stored .. now. +[0-9.]+e[+-]0[0-9] nats' 'same K best +[0-9]'
"$distill" teacher-dump config.yaml --set shards.path=full --set shards.kind=full --set corpus.max_rows=4 --set shards.rows_per_shard=2 >/dev/null
"$distill" inspect full --against teacher --sample 100 --json >out.txt || fail "--against of full logits"
awk -v kl="$(value kl_mean)" -v n="$(value rows)" 'BEGIN { exit !(kl < 1e-5 && n == 4) }' || fail "full logits against their teacher: $(cat out.txt)"

# rows for scripts
"$distill" inspect reference --rows 2:5 --jsonl >rows.jsonl || fail "--rows"
python3 - <<'PY' || fail "rows.jsonl is not what it should be"
import json, math
rows = [json.loads(l) for l in open("rows.jsonl")]
assert [r["row"] for r in rows] == [2, 3, 4]
for r in rows:
    assert len(r["ids"]) == len(r["logprobs"]) == len(r["tail"]) == 48
    for t in range(48):
        if r["loss_mask"][t]:
            tail = r["tail"][t][0]
            assert abs(sum(math.exp(p) for _, p in r["logprobs"][t]) + (0 if tail is None else math.exp(tail)) - 1) < 2e-3
            assert len({i for i, _ in r["logprobs"][t]}) == 8
PY
expect_exit 2 'has rows 0 to' "$distill" inspect reference --rows 0:100000 --jsonl
expect_exit 2 'no range|not a range' "$distill" inspect reference --rows 5 --jsonl
expect_exit 2 'go together' "$distill" inspect reference --rows 0:1
finish
