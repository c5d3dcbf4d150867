#!/usr/bin/env bash
# The CUDA backend's tests on a CPU: builds the kernels as C++ (tests/emulator/README.md says how, and what it shows and cannot) and runs the gpu part of the op tests. One line a test, what went
# wrong below it; logs lie in build-emulate/. Exit code 0 when all passed, 77 where a compiler, Python or NVIDIA's headers are missing.
#
#   scripts/emulate.sh [OPTION...] [TEST...]     TEST: the name in tests/kernels/test_NAME.c, or steps (tests/train/test_steps.c; minutes). Without one: every op test
#   --race            no threads may touch the same memory without a barrier between, in place of the address and undefined-behaviour sanitizers
#   --order ORDER     of blocks, warps and lanes: forward (default), reverse, random:SEED
#   --sms N           multiprocessors of the device (132): with 1, kernels that size their grid by them loop
#   --noise           approximate instructions are off by up to 2^-22
#   --trace FILE      a hash of everything copied from the device: different orders must give the same file
#   --mutate          broken kernels (tests/emulator/mutate.py; with TEST, of these ops), each of which has to be caught
# The tests named true_sizes_* are left out: they are for a card (tests/kernels/ops.h).
# OPS_CASES=n in the environment: at most n cases of a test's list. The first build takes four to five minutes of one core; distill_loss and attention
# take longest.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { echo "emulate.sh: $1" >&2; exit 2; }
missing() { echo "emulate.sh: SKIPPED: $1"; exit 77; }

flavour=address mutate=0 tests=()
while [ $# -gt 0 ]; do
    case $1 in
        --race) flavour=race ;;
        --mutate) mutate=1 ;;
        --noise) export DISTILL_EMULATE_NOISE=1 ;;
        --order | --sms | --trace)
            [ $# -gt 1 ] || usage "$1 needs a value"
            case $1:$2 in --order:forward | --order:reverse | --order:random:[0-9]* | --sms:[1-9]* | --trace:*) ;; *) usage "$1 does not take $2" ;; esac
            option=${1#--}
            export "DISTILL_EMULATE_${option^^}=$2"
            shift ;;
        -*) usage "unknown option $1" ;;
        *)
            [ -f "tests/kernels/test_$1.c" ] || [ "$1" = steps ] || usage "there is no tests/kernels/test_$1.c"
            tests+=("$1") ;;
    esac
    shift
done
[ -z "${DISTILL_EMULATE_TRACE:-}" ] || rm -f "$DISTILL_EMULATE_TRACE"
if [ ${#tests[@]} -eq 0 ] && [ $mutate = 0 ]; then
    for file in tests/kernels/test_*.c; do
        name=${file#tests/kernels/test_}
        if grep -q '^Test(gpu,' "$file"; then tests+=("${name%.c}"); fi
    done
fi

[ "$(uname -m)" = x86_64 ] || missing "the threads of a block change places in x86-64 assembly"
for program in g++ python3 meson ninja; do command -v $program >/dev/null || missing "no $program here"; done
nvcc=$(command -v nvcc || true)
cuda=${CUDA_HOME:-${nvcc:+$(dirname "$(dirname "$(readlink -f "$nvcc")")")}}
[ -n "$cuda" ] || missing "no nvcc on PATH, and CUDA_HOME is not set: NVIDIA's headers are needed (of the CUDA toolkit, cuBLASLt and cuDNN)"
[ -d "$cuda/include" ] || missing "no $cuda/include"
for header in cuda_bf16.h cuda_fp8.h cublasLt.h cudnn.h; do
    echo "#include <$header>" | g++ -x c++ -fsyntax-only -isystem "$cuda/include" - 2>/dev/null || missing "no $header in $cuda/include or the compiler's own directories"
done

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
configure_flavour() { configure "build-emulate/$1" -Demulate="$1" -Dbuildtype=debugoptimized -Dtests=true -Dcuda=disabled -Dnvidia_include_dir="$cuda/include"; }
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive
if [ $mutate = 1 ]; then
    configure_flavour address
    configure_flavour race
    exec python3 tests/emulator/mutate.py build-emulate "${tests[@]}"
fi

build=build-emulate/$flavour programs=()
configure_flavour "$flavour"
for name in "${tests[@]}"; do [ "$name" = steps ] && programs+=(tests/test_train_steps) || programs+=("tests/test_kernels_$name"); done
ninja -C "$build" "${programs[@]}" >"$build/ninja.log" 2>&1 || { grep -E 'error:|undefined reference|FAILED' "$build/ninja.log" || tail -30 "$build/ninja.log"; exit 1; }
failed=0
for program in "${programs[@]}"; do
    name=${program#tests/test_} begin=$SECONDS status=0
    log=$build/$name.log
    # the op tests put 256 bytes behind every buffer, which no kernel may touch; the others allocate what they need
    case $name in kernels_timed | train_steps) guard=0 ;; *) guard=256 ;; esac
    DISTILL_EMULATE_GUARD=$guard "$build/$program" --jobs 1 --filter 'gpu/!(true_sizes_*)' >"$log" 2>&1 || status=$?
    if [ $status = 0 ]; then
        printf '%-26s %4ss  ok\n' "$name" $((SECONDS - begin))
    else
        failed=1
        printf '%-26s %4ss  FAILED, see %s\n' "$name" $((SECONDS - begin)) "$log"
        grep -aE 'emulator:|ERROR: AddressSanitizer|runtime error:|is off by|, not |was overwritten|FAIL|CRASH' "$log" | head -12 | sed 's/^/    /'
    fi
done
exit $failed
