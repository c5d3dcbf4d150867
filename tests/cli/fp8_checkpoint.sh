#!/usr/bin/env bash
# Published fp8 checkpoints through the commands: tests/golden/fp8 has a teacher in e4m3 with block scales (as DeepSeek-V3 and Qwen3-FP8) and a student with a bf16
# scale per row (as llm-compressor writes); cli/check compares both with transformers on the dequantised weights. test_fp8_model has every kind.
source "$(dirname "$0")/common.sh"
golden=$source_root/tests/golden/fp8
"$distill" inspect "$golden/teacher" >out.txt || fail "inspect teacher"
grep -q 'quantised by .*fp8: e4m3, one scale per block of 24 x 40' out.txt && grep -q 'F8_E4M3 in 14 tensors' out.txt && grep -q 'for 14 F8_E4M3 tensors, from' out.txt || fail "inspect: $(cat out.txt)"
"$distill" inspect "$golden/student" >out.txt || fail "inspect student"
grep -q 'compressed-tensors: e4m3, one scale per row' out.txt || fail "inspect: $(cat out.txt)"

# a scale counts: another one, another model
cp -r "$golden" case
header=$(od -An -tu8 -N8 case/teacher/model.safetensors | tr -d ' ')
at=$(head -c $((8 + header)) case/teacher/model.safetensors | tail -c "$header" | grep -o '"model.layers.1.mlp.down_proj.weight_scale_inv":{[^}]*}' | grep -o 'data_offsets":\[[0-9]*' | grep -o '[0-9]*$')
poke() { printf "$1" | dd of=case/teacher/model.safetensors bs=1 seek=$((8 + header + at)) conv=notrunc 2>/dev/null; }
poke '\x00\x00\x00\x3f'
expect_exit 5 'outside their bound' "$distill" check case
poke '\x00\x00\x80\xff'
expect_exit 3 'down_proj.weight_scale_inv: element 0 is -inf; a scale is finite and above 0' "$distill" inspect case/teacher
poke '\x00\x00\x00\x00'
expect_exit 3 'down_proj.weight_scale_inv: element 0 is 0;' "$distill" check case
# a NaN among the numbers is one more weight that is not finite
rm -rf case && cp -r "$golden" case
at=$(head -c $((8 + header)) case/teacher/model.safetensors | tail -c "$header" | grep -o '"model.layers.1.mlp.down_proj.weight":{[^}]*}' | grep -o 'data_offsets":\[[0-9]*' | grep -o '[0-9]*$')
poke '\x7f'
expect_exit 5 'hold 1 NaN and 0 Inf' "$distill" inspect case/teacher
# without what says how the numbers are scaled, and with what says it in a way that is not known
rm -rf case && cp -r "$golden" case
sed -i 's/"quant_method": "fp8"/"quant_method": "gptq"/' case/teacher/config.json
expect_exit 3 'config.json: key "quantization_config.quant_method" is "gptq"; fp8, compressed-tensors, fbgemm_fp8 and modelopt' "$distill" check case
sed -i 's/"quantization_config": {/"task_specific_params": {/' case/teacher/config.json
expect_exit 3 'q_proj.weight has type F8_E4M3 and no scale that is understood' "$distill" check case

# teacher and student in fp8, all the way; what is written is plain
awk 'BEGIN { srand(3); for (d = 0; d < 60; d++) { printf "{\"ids\": ["; for (i = 0; i < 40; i++) printf "%s%d", i ? ", " : "", int(rand() * 131); print "]}" } }' >ids.jsonl
cat >config.yaml <<EOF
run: {threads: 2, seed: 3}
corpus: {files: [ids.jsonl], format: ids, row_length: 32, heldout_fraction: 0.2, append_eos: false}
teacher: {path: $golden/teacher}
student: {init: hf, path: $golden/student}
shards: {path: logits, kind: topk, k: 8, rows_per_shard: 16}
train: {steps: 2, batch_rows: 4, micro_rows: 2, check_alignment: false}
EOF
"$distill" teacher-dump config.yaml >dump.log || fail "teacher-dump: $(tail -3 dump.log)"
"$distill" train config.yaml >train.log || fail "train: $(tail -3 train.log)"
"$distill" eval config.yaml >eval.log || fail "eval: $(tail -3 eval.log)"
"$distill" inspect run/checkpoints/step-00000002 >out.txt || fail "inspect checkpoint"
for dtype in f32 bf16; do
    "$distill" export config.yaml --set export.model="$golden/teacher" --set export.path=$dtype --set export.dtype=$dtype >export.log || fail "export $dtype: $(tail -3 export.log)"
    "$distill" inspect $dtype >out.txt || fail "inspect $dtype"
done
"$distill" export config.yaml --set export.model="$golden/teacher" --set export.format=gguf --set export.path=f16.gguf --set export.dtype=f16 >export.log || fail "export gguf: $(tail -3 export.log)"
grep -l quantization_config run/checkpoints/*/config.json f32/config.json bf16/config.json && fail "a plain model says that it is quantised"
# the dequantised teacher has the same logits to the bit
"$distill" teacher-dump config.yaml --set teacher.path=f32 --set shards.path=logits-f32 >dump.log || fail "teacher-dump f32: $(tail -3 dump.log)"
for logits in logits logits-f32; do "$distill" inspect $logits --rows 0:40 --jsonl >$logits.jsonl || fail "inspect $logits"; done
[ "$(wc -l <logits.jsonl)" -ge 40 ] && cmp -s logits.jsonl logits-f32.jsonl || fail "the dequantised teacher dumps other rows"
finish
