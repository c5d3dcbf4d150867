#!/usr/bin/env bash
# generate: the continuation alone on standard output, the same for the same seed; every way to give a prompt; what is refused.
source "$(dirname "$0")/common.sh"
make_world
g() { "$distill" generate config.yaml --set generate.model=teacher --set generate.max_tokens=12 "$@" 2>stats.txt; }

g --prompt 'the small' >a.txt || fail "generate: $(cat stats.txt)"
grep -qE '^prompt [0-9]+ tokens, .* written [0-9]+ tokens, .*; stopped at ' stats.txt || fail "no statistics: $(cat stats.txt)"
printf 'the small' >prompt.txt
g --prompt-file prompt.txt >b.txt && cmp a.txt b.txt || fail "--prompt-file differs from --prompt"
g <prompt.txt >b.txt && cmp a.txt b.txt || fail "standard input differs from --prompt"
g --set 'generate.prompt=the small' </dev/null >b.txt && cmp a.txt b.txt || fail "generate.prompt differs from --prompt"
g --set run.threads=1 --prompt 'the small' >b.txt && cmp a.txt b.txt || fail "the number of threads changes the text"
g --set generate.top_p=0.0000001 --set generate.temperature=1 --prompt 'the small' >b.txt && cmp a.txt b.txt || fail "a tiny nucleus is not greedy"

# sampling: a function of the seed; a longer run begins with the shorter one
s() { g --prompt 'the small' --set generate.temperature=1.5 "$@"; }
s >a.txt
s >b.txt && cmp a.txt b.txt || fail "the same seed gives another text"
s --set generate.seed=2 >b.txt && cmp -s a.txt b.txt && fail "another seed gives the same text"
s --set generate.max_tokens=5 >b.txt
[ "$(wc -c <b.txt)" -lt "$(wc -c <a.txt)" ] && cmp -n "$(wc -c <b.txt)" a.txt b.txt || fail "five tokens are not the beginning of twelve"

# a prompt longer than one pass, up to the last position there is
head -c 4000 text.txt >long.txt
expect_exit 2 'together [0-9]+, but teacher has room for 128' "$distill" generate config.yaml --set generate.model=teacher --prompt-file long.txt
n=$(head -c 60 text.txt >short.txt; g --prompt-file short.txt >/dev/null; awk '{print $2}' stats.txt)
g --prompt-file short.txt --set generate.max_tokens=$((128 - n)) >/dev/null || fail "the last positions cannot be used: $(cat stats.txt)"
expect_exit 2 'together 129' "$distill" generate config.yaml --set generate.model=teacher --prompt-file short.txt --set generate.max_tokens=$((129 - n))

expect_exit 2 'prompt is empty' "$distill" generate config.yaml --set generate.model=teacher --prompt ''
expect_exit 2 'both given' "$distill" generate config.yaml --set generate.model=teacher --prompt a --prompt-file b
expect_exit 2 'generate.model' "$distill" generate config.yaml --set run.dir=nowhere --prompt a
expect_exit 4 'absent.txt' "$distill" generate config.yaml --set generate.model=teacher --prompt-file absent.txt
expect_exit 3 'UTF-8' "$distill" generate config.yaml --set generate.model=teacher --prompt "$(printf 'a\xff')"
cp -r teacher mute && rm mute/tokenizer.json
expect_exit 2 'no tokenizer.json' "$distill" generate config.yaml --set generate.model=mute --set "tokenizer.path=''" --prompt a
g --set generate.model=mute --prompt 'the small' >/dev/null || fail "tokenizer.path is not used: $(cat stats.txt)"
cp -r teacher bad && truncate -s -4 bad/model.safetensors && printf '\x00\x00\xc0\x7f' >>bad/model.safetensors
expect_exit 5 'logit' "$distill" generate config.yaml --set generate.model=bad --prompt 'the small'

# a model that ends its text at once writes nothing; every end-of-text token of generation_config.json counts
cp -r teacher done
seq 0 299 | paste -sd, | sed 's/.*/{"eos_token_id": [&]}/' >done/generation_config.json
g --set generate.model=done --prompt 'the small' >b.txt
[ ! -s b.txt ] && grep -q 'written 0 tokens.*stopped at' stats.txt || fail "generation_config.json is not read: $(cat b.txt stats.txt)"
finish
