#!/usr/bin/env bash
# Bad input of every kind: one sentence that names the object, and the exit code that says of what kind it is.
source "$(dirname "$0")/common.sh"
make_world
"$distill" teacher-dump config.yaml >dump.log
"$distill" train config.yaml --set run.dir=run --set train.steps=2 >train.log

# 2: usage and configuration
expect_exit 2 'no configuration file' "$distill" train
expect_exit 2 'second one' "$distill" train config.yaml teacher.yaml
expect_exit 2 '--frobnicate' "$distill" train config.yaml --frobnicate
expect_exit 2 'objective.temperature' "$distill" train config.yaml --set objective.temprature=2
expect_exit 2 'optimizer.lr' "$distill" train config.yaml --set optimizer.lr=fast
expect_exit 2 'train.batch_rows' "$distill" train config.yaml --set train.batch_rows=5 --set run.dir=x
expect_exit 2 'nothing to learn' "$distill" train config.yaml --set objective.kd_weight=0 --set run.dir=x
expect_exit 2 'has no teacher' "$distill" train config.yaml --set train.source=corpus --set run.dir=x
expect_exit 2 'student.config' "$distill" train config.yaml --set "student.config=''" --set run.dir=x
expect_exit 2 'CUDA|cuda' "$distill" train config.yaml --set run.device=cuda --set run.dir=x
expect_exit 2 'teacher.path' "$distill" teacher-dump config.yaml --set "teacher.path=''"
printf 'run:\n  dri: x\n' >bad.yaml
expect_exit 2 'bad.yaml:2.*run.dir' "$distill" train bad.yaml
expect_exit 4 'absent.yaml' "$distill" train absent.yaml

# 3: broken input
cp -r teacher broken && truncate -s -7 broken/model.safetensors
expect_exit 3 'model.safetensors' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/model.safetensors broken/ && sed -i 's/"num_hidden_layers": 2/"num_hidden_layers": 3/' broken/config.json
expect_exit 3 'model.layers.2' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/config.json broken/ && sed -i 's/"num_hidden_layers": 2/"num_hidden_layers": 1/' broken/config.json
expect_exit 3 'model.layers.1' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/config.json broken/ && sed -i 's/"intermediate_size": 96/"intermediate_size": 64/' broken/config.json
expect_exit 3 'shape' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/config.json broken/ && sed -i 's/Qwen2ForCausalLM/GPT2LMHeadModel/' broken/config.json
expect_exit 3 'GPT2LMHeadModel' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/config.json broken/ && sed -i 's/"hidden_act"/"logits_scaling": 4.0, "hidden_act"/' broken/config.json
expect_exit 3 'logits_scaling' "$distill" teacher-dump config.yaml --set teacher.path=broken --set shards.path=b
cp teacher/config.json broken/ && sed -i 's/"BPE"/"Unigram"/' broken/tokenizer.json
expect_exit 3 'Unigram' "$distill" teacher-dump config.yaml --set teacher.path=broken --set tokenizer.path=broken --set shards.path=b
printf 'good\n\xff\xfe bad\n' >latin.txt
expect_exit 3 'latin.txt' "$distill" teacher-dump config.yaml --set 'corpus.files=[latin.txt]' --set shards.path=b
printf '{"text": "a"}\n{"txt": "b"}\n' >field.jsonl
expect_exit 3 'field.jsonl:2' "$distill" teacher-dump config.yaml --set 'corpus.files=[field.jsonl]' --set shards.path=b
cp -r logits flipped && printf '\x55' | dd of=flipped/shards/shard-000000.h5 bs=1 seek=20000 conv=notrunc 2>/dev/null
expect_exit 3 'shard-000000' "$distill" train config.yaml --set shards.path=flipped --set run.dir=x --set train.eval_every=0
rm -rf x

# 4: files that are not there or cannot be written
expect_exit 4 'nowhere' "$distill" teacher-dump config.yaml --set teacher.path=nowhere
expect_exit 2 'nothing.*txt' "$distill" teacher-dump config.yaml --set 'corpus.files=[nothing*.txt]'
touch file && expect_exit 4 'file' "$distill" train config.yaml --set run.dir=file/run

# a full standard output, a limit on the size of files: said, with nothing left half-written
if [ -w /dev/full ]; then
    expect_exit 4 'standard output' bash -c "'$distill' --help >/dev/full"
    expect_exit 4 'standard output' bash -c "'$distill' inspect teacher >/dev/full"
fi
expect_exit 4 'too large' bash -c "ulimit -f 8; '$distill' teacher-dump config.yaml --set shards.path=limited"
expect_exit 4 'too large' bash -c "ulimit -f 8; '$distill' export config.yaml --set export.model=teacher --set export.path=limited-export"
expect_exit 4 'checkpoint of step 2.*too large' bash -c "ulimit -f 24; '$distill' train config.yaml --set run.dir=limited-run --set train.steps=2 --set train.eval_every=0"
[ -z "$(find limited* -name '*tmp*')" ] || fail "left behind under a limit on file sizes: $(find limited* -name '*tmp*')"

expect_exit 4 'may use 0.00 GiB; the largest part is .*make .* smaller' "$distill" train config.yaml --set memory.limit_gib=0.0001 --set run.dir=x

# 5: numbers that are none, before they are stored or change a weight
cp -r teacher sick && printf '\x00\x00\xc0\x7f' | dd of=sick/model.safetensors bs=1 seek=9000 conv=notrunc 2>/dev/null
expect_exit 5 'not finite' "$distill" teacher-dump config.yaml --set teacher.path=sick --set shards.path=sick-logits
expect_exit 5 'no weight was changed' "$distill" train config.yaml --set student.init=hf --set student.path=sick --set run.dir=sick-run
[ -e sick-run/checkpoints ] && fail "a checkpoint of NaN"
cat >one.yaml <<EOF
run: {threads: 1}
corpus: {files: [one.jsonl], row_length: 16, heldout_fraction: 0}
train: {steps: 8, batch_rows: 2, micro_rows: 2}
EOF
for i in 1 2 3 4 5 6; do echo '{"ids": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]}'; done >one.jsonl
mkdir one && sed 's/"vocab_size": 320/"vocab_size": 1/' student-shape/config.json >one/config.json
"$distill" train one.yaml --set run.dir=one-teacher --set student.init=scratch --set student.config=one/config.json --set train.source=corpus --set objective.kd_weight=0 --set objective.ce_weight=1 >one.log
"$distill" teacher-dump one.yaml --set teacher.path=one-teacher/checkpoints/step-00000008 --set shards.path=one-logits --set shards.kind=topk --set shards.k=1 >one.log
expect_exit 5 'step 3: the KD loss and its gradient have been exactly 0 for 3 steps' "$distill" train one.yaml --set shards.path=one-logits --set run.dir=one-run --set student.init=scratch --set student.config=one/config.json
[ -e one-run/checkpoints ] && fail "a checkpoint without a teacher"
expect_exit 5 'step 1: loss' "$distill" train config.yaml --set objective.kd_weight=1e6 --set objective.ce_weight=1e6 --set student.init=hf --set student.path=sick --set run.dir=sick-run

# 6: inputs that do not belong together
expect_exit 6 'was made with rows' "$distill" teacher-dump config.yaml --set corpus.row_length=40
expect_exit 6 'temperature' "$distill" train config.yaml --set objective.temperature=3 --set run.dir=y
expect_exit 2 'none of forward_kl' "$distill" train config.yaml --set 'objective.divergence=0.5 forward_kl + 0.5 reverse' --set run.dir=y
expect_exit 2 'objective.floor' "$distill" train config.yaml --set objective.floor=0.01 --set run.dir=y
expect_exit 6 'nothing was drawn' "$distill" train config.yaml --set objective.tail=unbiased --set run.dir=y
expect_exit 6 'reverse_kl is infinite.*objective.floor' "$distill" train config.yaml --set objective.tail=renormalise --set objective.divergence=reverse_kl --set run.dir=y
expect_exit 6 'no distribution' "$distill" train config.yaml --set objective.tail=drop --set objective.divergence=jsd --set run.dir=y
expect_exit 6 'shards.k is 9, .*top 8' "$distill" train config.yaml --set shards.k=9 --set run.dir=y
expect_exit 6 'corpus.row_length is 40, .* 48 tokens' "$distill" train config.yaml --set corpus.row_length=40 --set run.dir=y
mkdir other && sed 's/"vocab_size": 320/"vocab_size": 200/' student-shape/config.json >other/config.json
expect_exit 6 'valid ids' "$distill" train config.yaml --set student.config=other/config.json --set run.dir=y
"$distill" tokenizer-train base.yaml --set tokenizer.path=tokenizer2 --set tokenizer.vocab_size=280 >/dev/null
expect_exit 6 'tokenizer2 has hash [0-9a-f]{16}, logits was dumped with [0-9a-f]{16}' "$distill" train config.yaml --set tokenizer.path=tokenizer2 --set run.dir=y
cp -r tokenizer tokenizer3 && sed -i 's/"q": /"swap": /; s/"z": /"q": /; s/"swap": /"z": /' tokenizer3/tokenizer.json
expect_exit 6 'id [0-9]+ is "[qz]" here and "[qz]" there' "$distill" train config.yaml --set tokenizer.path=tokenizer3 --set run.dir=y
sed 's/"vocab_size": 320/"vocab_size": 336/' student-shape/config.json >other/config.json      # more padding, the same ids: fine where the tokenizers say so
"$distill" train config.yaml --set student.config=other/config.json --set run.dir=padded --set train.steps=1 >padded.log || fail "a head with more padding: $(cat padded.log)"
grep -q "head has 320 columns, the student's 336; the 300 valid ids are the same" padded.log || fail "no word about other padding: $(cat padded.log)"
"$distill" teacher-dump config.yaml --set shards.path=seed --set run.seed=4 >/dev/null
expect_exit 6 'data' "$distill" train config.yaml --set run.dir=run --set shards.path=seed --set train.eval_every=0 --resume
"$distill" train config.yaml --set run.dir=seeded --set train.steps=1 >/dev/null
expect_exit 6 'run.seed' "$distill" train config.yaml --set run.dir=seeded --set run.seed=4 --set corpus.shuffle=false --resume
cp -r teacher wide && sed -i 's/"max_position_embeddings": 128/"max_position_embeddings": 65536/' wide/config.json
expect_exit 2 'train.micro_rows' "$distill" train teacher.yaml --set student.config=wide --set corpus.row_length=65535 --set train.batch_rows=65536 --set train.micro_rows=65536 --set run.dir=y
expect_exit 2 'dump.batch_rows' "$distill" teacher-dump config.yaml --set teacher.path=wide --set corpus.row_length=65535 --set dump.batch_rows=65536 --set shards.path=b
finish
