#!/bin/bash
# On a machine with a Hopper GPU: builds with CUDA (or takes a finished build directory), runs the gpu suite (ops, optimizer steps of a whole model, the commands) and `distill check` of
# every golden case with device cuda, in fp32 and bf16, native and fp8, and prints one table last. Exit code 0 when every line of it passed, or was refused because a GPU does not multiply such widths in fp8;
# one case at least has to have widths that it does.
#
#   scripts/gpu.sh [BUILD_DIR [LIBRARY_DIR]]     BUILD_DIR     default build-gpu; configured and built here unless it holds a program already
#                                                LIBRARY_DIR   libraries the build needs and this machine lacks
#   SANITIZE=1    also compute-sanitizer memcheck and racecheck over every op test but true_sizes_*, at most SANITIZE_CASES cases of a list (default 12) and 120 s a line, times JOBS
#   BENCH=1       also distill bench at every shape of configs/bench/h200-*; or a list of PART:CONFIG[:SETTING...], as BENCH="kernels:h200-7b train:h200-7b:train.matmul=fp8". What it
#                 prints goes to BUILD_DIR/bench-PART-CONFIG-SETTING.txt, its figures, one JSON line each, to BUILD_DIR/bench.jsonl
#   GOLDEN="A B"  folders with golden cases; default tests/golden and ../shared/golden
#   JOBS=N        lines of the table at work at once, benches apart; default 4
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build-gpu}
[ $# -gt 1 ] && export LD_LIBRARY_PATH=$(cd "$2" && pwd)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
golden=${GOLDEN:-"$root/tests/golden $root/../shared/golden"}
log=$(mktemp -d) || exit 4
trap 'for j in $(jobs -p); do pkill -P $j; kill $j; done 2>/dev/null; rm -rf "$log"' EXIT
trap 'exit 130' INT TERM
jobs=${JOBS:-4}
case $jobs in '' | *[!0-9]* | 0) echo "scripts/gpu.sh: JOBS=$jobs: a number of 1 or more" >&2; exit 2 ;; esac

if ! nvidia-smi >/dev/null 2>&1; then echo "scripts/gpu.sh: no NVIDIA GPU here (nvidia-smi fails)" >&2; exit 2; fi
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
if [ ! -x "$build/train/distill" ] && [ ! -x "$build/distill" ]; then
    [ -f "$build/build.ninja" ] || meson setup "$build" "$root" -Dbuildtype=release -Dcuda=enabled || exit 2
    ninja -C "$build" || exit 2
fi
build=$(cd "$build" && pwd)
program=$build/distill
[ -x "$program" ] || program=$build/train/distill

limit=300 line=0
# note FILE NAME SECONDS STATUS: a line of the table, FILE.line; what a failed one printed, FILE, is shown when the table is
note() {
    local verdict=ok
    case $4 in
    0) ;;
    77) verdict=SKIPPED ;;
    *)
        verdict="FAILED ($4)"
        # some of the small models have widths that a GPU does not multiply in fp8: a usage error, which passes
        case $2:$4 in "check "*fp8:2) grep -qs 'multiplies in fp8 only widths that are multiples of' "$1" && verdict="refused: its widths" ;; esac ;;
    esac
    printf '%-44s %6ss  %s\n' "$2" "$3" "$verdict" > "$1.line"
}
next() { line=$((line + 1)); file=$log/$(printf %05d $line); }
run() {  # run NAME COMMAND...: in the background, $jobs at once
    local name=$1
    shift
    next
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    printf '%-44s %6s   FAILED: nothing came back\n' "$name" - > "$file.line"
    (
        begin=$SECONDS
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + jobs - 1) / jobs))} timeout $limit "$@" > "$file" 2>&1
        note "$file" "$name" $((SECONDS - begin)) $?
    ) &
}

gpu_parts() { "$1" --list | awk '/^gpu:/ { on = 1; next } /^[a-z_]+:/ { on = 0 } on { print $NF }'; }      # names of the tests in a program's suite gpu
for test in "$build"/tests/test_kernels_* "$build"/tests/test_train_steps; do
    [ -f "$test" ] && [ -x "$test" ] || continue
    for part in $(gpu_parts "$test"); do run "${test##*/test_} $part" "$test" --jobs 1 --filter "gpu/$part"; done
done
if [ "${SANITIZE:-0}" = 1 ] && ! command -v compute-sanitizer >/dev/null; then
    next
    note "$file" "memcheck, racecheck: no compute-sanitizer" 0 77
elif [ "${SANITIZE:-0}" = 1 ]; then
    export OPS_CASES=${SANITIZE_CASES:-12}
    limit=$((120 * jobs))
    for test in "$build"/tests/test_kernels_*; do
        [ -f "$test" ] && [ -x "$test" ] && [ -n "$(gpu_parts "$test")" ] || continue
        name=${test##*/test_kernels_}
        for tool in memcheck racecheck; do
            part='!(true_sizes_*)'                           # for a card at its own speed: tests/kernels/ops.h
            # in bf16, and in fp8 always, these run cuDNN's and cuBLASLt's kernels: how those share memory is not ours to check
            case $tool-$name in racecheck-attention | racecheck-linear) part=fp32 ;; racecheck-fp8) part="fused*" ;; esac
            run "kernels_$name $tool" compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all "$test" --jobs 1 --filter "gpu/$part"
        done
    done
    unset OPS_CASES
    limit=300
fi
for folder in $golden; do
    for case in "$folder"/*/reference.json; do
        [ -f "$case" ] || continue
        case=${case%/reference.json}
        for precision in fp32 bf16; do
            run "check ${case##*/} $precision" "$program" check "$case" --device cuda --precision "$precision"
            run "check ${case##*/} $precision fp8" "$program" check "$case" --device cuda --precision "$precision" --matmul fp8
        done
    done
done
run "commands" bash "$root/tests/cli/device.sh" "$program"
wait
refused=$(cat "$log"/*.line | grep '^check .* fp8 ')
if [ -n "$refused" ] && ! grep -qv 'refused' <<< "$refused"; then
    next
    printf '%-44s %6s   FAILED: refused for every case\n' "check fp8" - > "$file.line"
fi
benches=${BENCH:-0}
[ "$benches" = 1 ] && benches="kernels:h200-7b kernels:h200-72b train:h200-7b train:h200-7b:train.matmul=fp8 train:h200-7b-block train:h200-3b-exact teacher:h200-72b teacher:h200-72b:teacher.precision=fp8 teacher:h200-72b-streamed teacher:h200-72b-streamed:teacher.weights=resident teacher:h200-72b-streamed:teacher.precision=fp8 teacher:h200-72b-streamed:teacher.precision=fp8:teacher.weights=resident io:h200-7b:bench.checkpoint_gib=8"
if [ "$benches" != 0 ]; then
    : > "$build/bench.jsonl"
    for bench in $benches; do
        next
        begin=$SECONDS out=$build/bench-${bench//:/-}.txt settings=()
        IFS=: read -r -a words <<< "$bench"
        for setting in "${words[@]:2}"; do settings+=(--set "$setting"); done
        (cd "$root" && timeout 900 "$program" bench "${words[0]}" "configs/bench/${words[1]}.yaml" "${settings[@]}") > "$out" 2>&1
        note "$file" "bench ${bench//:/ }" $((SECONDS - begin)) $?
        grep '^{' "$out" >> "$build/bench.jsonl"
        grep -v '^{' "$out"
    done
fi
[ $line -gt 0 ] || { echo "scripts/gpu.sh: there was nothing to run: no tests in $build, no case in $golden" >&2; exit 1; }
for file in "$log"/*.line; do
    grep -q 'FAILED' "$file" && [ -f "${file%.line}" ] && { printf '\n== '; cat "$file"; tail -n 25 "${file%.line}"; }
done
echo
cat "$log"/*.line
! grep -qE 'FAILED|SKIPPED' "$log"/*.line
