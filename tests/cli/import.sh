#!/usr/bin/env bash
# import-logits: captures of both shapes become the same shards, position by position what they said; what is no capture is refused by name.
source "$(dirname "$0")/common.sh"
command -v python3 >/dev/null || { echo "SKIPPED: no python3"; exit 77; }
make_world
cat >make.py <<'PY'
import json, math, random
random.seed(5)
V, docs = 300, []
for d in range(14):
    n = random.choice([1, 2, 17, 48, 49, 90])
    ids = [random.randrange(V) for _ in range(n)]
    positions = []
    for t in range(n):
        z = [random.gauss(0, 2.5) for _ in range(V)]
        m = max(z); s = sum(math.exp(x - m) for x in z)
        lp = [x - m - math.log(s) for x in z]
        order = sorted(range(V), key=lambda v: -lp[v])
        keep = order[: random.choice([6, 6, 6, 9, 3])]
        if t + 1 < n and random.random() < 0.7 and ids[t + 1] not in keep: keep.append(ids[t + 1])    # vLLM adds the token of the text, whatever its rank
        random.shuffle(keep)
        positions.append([[v, lp[v]] for v in keep])
    if d == 4: positions[3] = None
    docs.append((ids, positions))
json.dump(docs, open("truth.json", "w"))
with open("plain.jsonl", "w") as f:
    for d, (ids, p) in enumerate(docs): f.write(json.dumps({"ids": ids, "logprobs": p if d % 2 else p[:-1]}) + "\n")
with open("vllm.jsonl", "w") as f:
    for ids, p in docs: f.write(json.dumps({"prompt_token_ids": ids, "prompt_logprobs": [None] + [e and {str(v): {"logprob": x, "rank": 1} for v, x in e} for e in p[:-1]]}) + "\n")
PY
python3 make.py
common=(--set shards.k=6 --set 'shards.temperatures=[1.0]' --set shards.rows_per_shard=3)
"$distill" import-logits config.yaml "${common[@]}" --set shards.path=plain --input plain.jsonl >plain.log || fail "import: $(cat plain.log)"
"$distill" import-logits config.yaml "${common[@]}" --set shards.path=vllm --input vllm.jsonl >vllm.log || fail "import of vLLM's: $(cat vllm.log)"
diff -r plain vllm >diff.log || fail "two shapes of one capture give different shards: $(head -3 diff.log)"
"$distill" inspect plain --verify >out.txt || fail "imported shards: $(cat out.txt)"
cat >check.py <<'PY'
import json, math
docs, L, K = json.load(open("truth.json")), 48, 6
flat = [(ids[t], ids[t + 1] if t + 1 < len(ids) else None, p[t]) for ids, p in docs for t in range(len(ids))]
rows, learnt, short = [json.loads(l) for l in open("rows.jsonl")], 0, 0
assert len(rows) == -(-len(flat) // L)
for i, (token, label, entries) in enumerate(flat):
    row, t = rows[i // L], i % L
    assert row["ids"][t] == token
    want = label is not None and t + 1 < L and entries is not None and len(entries) >= K
    short += label is not None and t + 1 < L and not want
    assert row["loss_mask"][t] == want, (i, want)
    if not want: continue
    learnt += 1
    best = sorted(entries, key=lambda e: -e[1])[:K]
    assert [v for v, _ in row["logprobs"][t]] == [v for v, _ in best]
    for (_, a), (_, b) in zip(row["logprobs"][t], best): assert abs(a - b) <= 2 ** -11 * abs(b) + 1e-7
    tail = 1 - math.fsum(math.exp(x) for _, x in best)
    assert abs(math.exp(row["tail"][t][0]) - tail) < 1e-6
    assert row["lse"][t] == [0.0]
    known = dict(map(tuple, entries))
    x = known.get(label)
    if x is None: assert row["label_logprob"][t] <= min(best[-1][1], math.log(tail)) + 0.01
    else: assert abs(row["label_logprob"][t] - x) <= 2 ** -11 * abs(x) + 1e-7
print(learnt, short)
assert learnt > 200 and short > 50
PY
"$distill" inspect plain --rows 0:$(awk '/^done/ {print $2}' plain.log) --jsonl >rows.jsonl && python3 check.py >check.log || fail "rows differ from the capture: $(tail -3 check.log)"
"$distill" train config.yaml --set shards.k=6 --set shards.path=plain --set run.dir=run --set train.steps=2 --set train.eval_every=0 --set student.config=student-shape/config.json >train.log 2>&1 || fail "train on imported shards: $(tail -1 train.log)"

# again: nothing to do; killed on the way: gone on with; another capture: refused
cp -r plain before
"$distill" import-logits config.yaml "${common[@]}" --set shards.path=plain --input plain.jsonl >/dev/null && diff -r before plain >/dev/null || fail "a second import changed something"
(DISTILL_FAIL="shard.after_write:kill@2" "$distill" import-logits config.yaml "${common[@]}" --set shards.path=killed --input plain.jsonl >/dev/null 2>&1; exit $?) 2>/dev/null && fail "the import did not die"
"$distill" import-logits config.yaml "${common[@]}" --set shards.path=killed --input plain.jsonl >/dev/null && diff -r before killed >diff.log || fail "an import that was killed: $(head -3 diff.log)"
head -5 plain.jsonl >other.jsonl
expect_exit 6 'was made with' "$distill" import-logits config.yaml "${common[@]}" --set shards.path=plain --input other.jsonl

# what is no capture
refuse() { printf '%s\n' "$2" >bad.jsonl; expect_exit 3 "$1" "$distill" import-logits config.yaml --set shards.k=1 --set 'shards.temperatures=[1.0]' --set shards.path=bad --input bad.jsonl; }
refuse 'bad.jsonl:1: position 0: the probabilities add up to 1.2' '{"ids": [1, 2], "logprobs": [[[1, -0.5], [2, -0.5]]]}'
refuse 'position 0: id 2 is there twice' '{"ids": [1, 2], "logprobs": [[[2, -3.0], [5, -2.5], [2, -3.5]]]}'
refuse 'is no log-probability' '{"ids": [1, 2], "logprobs": [[[1, 0.5]]]}'
refuse 'id 300 is not one of the 300 valid ids' '{"ids": [1, 2], "logprobs": [[[300, -1.0]]]}'
refuse 'id 1 of the text' '{"ids": [1, 9999], "logprobs": [[[3, -1.0]]]}'
refuse 'not \[id, log-probability\]' '{"ids": [1, 2], "logprobs": [[[3, -1.0, 4]]]}'
refuse 'no number' '{"ids": [1, 2], "logprobs": [[[3, "x"]]]}'
refuse '3 ids and 1 lists' '{"ids": [1, 2, 3], "logprobs": [[[3, -1.0]]]}'
refuse 'first of prompt_logprobs is not null' '{"prompt_token_ids": [1, 2], "prompt_logprobs": [{"3": {"logprob": -1.0}}, {"3": {"logprob": -1.0}}]}'
refuse 'not a token id' '{"ids": [1, 2], "prompt_logprobs": [null, {"cat": {"logprob": -1.0}}]}'
refuse 'has no lists' '{"tokens": [1, 2]}'
refuse 'bad.jsonl:1' '{"ids": [1, 2'
refuse 'no position has 1 entries' '{"ids": [1, 2], "logprobs": [[]]}'
refuse 'mask is not 0 or 1' '{"ids": [1, 2], "mask": [1, 2], "logprobs": [[[3, -1.0]]]}'
expect_exit 2 'one temperature' "$distill" import-logits config.yaml --set shards.path=bad --input plain.jsonl
expect_exit 2 '--input' "$distill" import-logits config.yaml
[ ! -e bad ] || fail "a refused capture left a directory"

# the plan of a dump, while the world is there
"$distill" teacher-dump config.yaml --dry-run --set shards.path=plan >plan.log || fail "dry run: $(tail -1 plan.log)"
grep -qE '^disk .* free' plan.log && grep -qE '^rate +[0-9]+ tok/s' plan.log && grep -qE '^ +128 +0\.[0-9]+ \|' plan.log && grep -q 'a stand-in' plan.log || fail "the plan: $(cat plan.log)"
"$distill" teacher-dump config.yaml --dry-run --set shards.path=plan --set student.init=hf --set student.path=teacher >plan.log || fail "dry run with a student: $(tail -1 plan.log)"
grep -q 'student: teacher' plan.log || fail "the plan does not use the student: $(cat plan.log)"
"$distill" teacher-dump config.yaml --dry-run --no-measure --set shards.path=plan >plan.log && ! grep -q '^rate' plan.log || fail "--no-measure"
[ ! -e plan ] || fail "a dry run made a directory"
finish
