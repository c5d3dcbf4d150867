#!/usr/bin/env bash
# Sets everything up and runs all tests: the optimised build, the CPU tests again under the address and undefined-behaviour sanitizers, and a short
# run of every fuzz target. Ends with a line "N passed, N failed, N skipped".
# Options: --fast (no sanitizers, no fuzzing), --long (the long versions: an hour of fuzzing per reader, a thousand kills; and the CUDA kernels on the CPU).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

fast=0 long=0
for a in "$@"; do
    case $a in
        --fast) fast=1 ;;
        --long) long=1 ;;
        *) echo "test.sh: unknown option $a" >&2; exit 2 ;;
    esac
done

install_packages "${packages[@]}" libcriterion-dev
[ $fast = 1 ] || install_packages clang llvm libomp-dev
export DISTILL_LONG_TESTS=$long

passed=0 failed=0 skipped=0 failures=()
fail_one() { failed=$((failed + 1)); failures+=("$1"); }
# Counts tests as Meson counts them; a test whose only answer was SKIPPED counts as skipped.
run_suite() {
    local dir=$1 log
    shift
    log=$dir/meson-logs/testlog.json
    rm -f "$log"
    meson test -C "$dir" --no-rebuild --print-errorlogs "$@" || true
    [ -f "$log" ] || { fail_one "$dir ran no test"; return; }
    passed=$((passed + $(grep -c '"result": "OK"' "$log" || true)))
    skipped=$((skipped + $(grep -c '"result": "SKIP"' "$log" || true)))
    local line
    while IFS= read -r line; do
        fail_one "$dir $(python3 -c 'import json, sys
t = json.load(sys.stdin)
print(t["name"], t["result"], "after %.1f s, exit code %s" % (t["duration"], t["returncode"]))
print("\n".join((t.get("stdout", "") + t.get("stderr", "")).splitlines()[-60:]))' <<<"$line")"
    done < <(grep -E '"result": "(FAIL|ERROR|TIMEOUT|INTERRUPT|UNEXPECTEDPASS)"' "$log" || true)
}
# Compilers' warnings go to a log: what is worth reading is at the end of the output, where a CI that keeps only that shows it.
build() { ninja -C "$@" >"$1/ninja.log" 2>&1 || { tail -60 "$1/ninja.log"; return 1; }; }

echo "== optimised build"
configure build -Dtests=true
build build
run_suite build

# Nothing here runs it without a GPU (scripts/gpu.sh does, with one), but it has to compile.
if [ $fast = 0 ] && command -v nvcc >/dev/null && (configure build-cuda -Dcuda=enabled -Dtests=false); then
    echo "== CUDA build"
    if build build-cuda kernels/libkernels.a; then passed=$((passed + 1)); else fail_one "the CUDA build"; fi
elif [ $fast = 0 ]; then
    echo "== CUDA build SKIPPED: no nvcc, cuBLASLt or cuDNN here"
    skipped=$((skipped + 1))
fi

if [ $fast = 0 ]; then
    echo "== address and undefined-behaviour sanitizers"
    configure build-sanitize -Dtests=true -Dcuda=disabled -Dbuildtype=debugoptimized -Db_sanitize=address,undefined -Db_lundef=false -Dc_args=-g1
    build build-sanitize
    ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        LSAN_OPTIONS=suppressions=$PWD/tests/leaks.txt run_suite build-sanitize --no-suite slow

    echo "== fuzz targets"
    seconds=$([ $long = 1 ] && echo 3600 || echo 5)
    if scripts/fuzz.sh "$seconds"; then passed=$((passed + 1)); else fail_one "a fuzz target"; fi
fi

if [ $long = 1 ]; then
    echo "== CUDA kernels on the CPU"
    status=0
    scripts/emulate.sh || status=$?
    case $status in 0) passed=$((passed + 1)) ;; 77) skipped=$((skipped + 1)) ;; *) fail_one "scripts/emulate.sh" ;; esac
fi

[ $failed -eq 0 ] || printf '== FAILED: %s\n' "${failures[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
