# Sourced by the command line tests: $distill, a scratch directory that is removed at the end, and a small world to work in.
set -euo pipefail
distill=$(realpath "$1")
source_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
world=$(mktemp -d)
trap 'rm -rf "$world"' EXIT
cd "$world"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}   # tests share the machine: a thread that spins while its partner waits for a core costs whole time slices
failures=0

fail() { echo "FAILED: $*"; failures=$((failures + 1)); }
# need_device: the test ends here, SKIPPED, where device cuda is not to be had; what a GPU that does not do its work says is for the test
need_device() {
    "$distill" check "$source_root/tests/golden/widths16" --device cuda --precision fp32 >device.txt 2>&1 && return
    local why
    why=$(grep -o 'device cuda: .*' device.txt) && { echo "SKIPPED: $why"; exit 77; }
    fail "check with device cuda: $(tail -1 device.txt)"
}
finish() { [ "$failures" -eq 0 ] && echo "all good" || { echo "$failures failures"; exit 1; }; }
# expect_exit CODE PATTERN command...: exit code, one line on stderr that matches, and no core
expect_exit() {
    local code=$1 pattern=$2 got=0
    shift 2
    "$@" >out.txt 2>err.txt || got=$?
    [ "$got" = "$code" ] || fail "exit $got instead of $code: $* ($(head -c 300 err.txt))"
    grep -qE -- "$pattern" err.txt || fail "no message matching '$pattern': $* said: $(head -c 400 err.txt)"
    [ "$(grep -c . err.txt)" -le 1 ] || fail "more than one line of error: $* said: $(cat err.txt)"
}

# 48 documents of English-like sentences with a grammar to learn, the same every time
make_text() {
    awk 'BEGIN {
        srand(7); split("cat dog bird fish horse mouse", noun); split("sees hears follows likes finds", verb); split("small old red quiet quick", adj);
        for (d = 0; d < 48; d++) {
            for (s = 0; s < 12; s++)
                printf "the %s %s %s the %s %s. ", adj[1+int(rand()*5)], noun[1+int(rand()*6)], verb[1+int(rand()*5)], adj[1+int(rand()*5)], noun[1+int(rand()*6)];
            printf "\n\n";
        }
    }' >text.txt
}

# model_config FILE LAYERS WIDTH
model_config() {
    cat >"$1" <<EOF
{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": $3, "intermediate_size": $((3 * $3)), "num_hidden_layers": $2,
 "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320, "tie_word_embeddings": true, "max_position_embeddings": 128,
 "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "initializer_range": 0.05}
EOF
}

# make_world [LAYERS WIDTH of the teacher, LAYERS WIDTH of the student, STEPS of the teacher]: a tokenizer, a teacher trained for a few steps, and config.yaml for distilling it
make_world() {
    make_text
    mkdir -p teacher-shape student-shape
    model_config teacher-shape/config.json "${1:-2}" "${2:-32}"
    model_config student-shape/config.json "${3:-1}" "${4:-16}"
    cat >base.yaml <<EOF
run: {threads: 2, seed: 3}
tokenizer: {path: tokenizer, vocab_size: 300}
corpus: {files: [text.txt], document: paragraph, row_length: 48, heldout_fraction: 0.2}
EOF
    { cat base.yaml; cat <<EOF
student: {init: scratch, config: teacher-shape/config.json}
objective: {kd_weight: 0, ce_weight: 1}
optimizer: {lr: 0.01}
train: {source: corpus, steps: ${5:-12}, batch_rows: 8, micro_rows: 4}
EOF
    } >teacher.yaml
    { cat base.yaml; cat <<EOF
teacher: {path: teacher}
student: {init: scratch, config: student-shape/config.json}
shards: {path: logits, kind: topk, k: 8, rows_per_shard: 8, temperatures: [1.0, 2.0]}
optimizer: {lr: 0.01}
schedule: {kind: constant}
dump: {batch_rows: 2, chunk_tokens: 64}
train: {steps: 12, batch_rows: 4, micro_rows: 2, chunk_tokens: 40, checkpoint_every: 3, eval_every: 6, log_every: 1}
EOF
    } >config.yaml
    "$distill" tokenizer-train base.yaml >tokenizer.log
    "$distill" train teacher.yaml --set run.dir=teacher-run >teacher.log
    cp -r "teacher-run/checkpoints/$(printf step-%08d "${5:-12}")" teacher
    rm teacher/optimizer.safetensors teacher/state.json teacher/run.yaml teacher/files.json
}
