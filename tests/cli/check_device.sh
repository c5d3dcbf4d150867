#!/usr/bin/env bash
# check.sh with device cuda: every reference case in fp32 and bf16, native and with fp8 products. Widths that a GPU does not multiply in fp8 are refused, but not those of every case.
source "$(dirname "$0")/common.sh"
need_device
n=0 fp8=0
for case in "$source_root"/tests/golden/*/ "$source_root"/../shared/golden/*/; do
    [ -e "$case/reference.json" ] || continue
    for precision in fp32 bf16; do
        "$distill" check "$case" --device cuda --precision $precision >check.log 2>&1 || fail "check $case in $precision: $(grep -E 'OUTSIDE|MISSING' check.log | head -5; tail -1 check.log)"
        code=0
        "$distill" check "$case" --device cuda --precision $precision --matmul fp8 >check.log 2>&1 || code=$?
        if [ $code = 2 ] && grep -q 'multiplies in fp8 only widths that are multiples of' check.log; then continue; fi
        fp8=$((fp8 + 1))
        [ $code = 0 ] || fail "check $case in $precision --matmul fp8: $(grep -E 'OUTSIDE|MISSING' check.log | head -5; tail -1 check.log)"
    done
    n=$((n + 1))
done
[ $n -gt 0 ] || fail "no reference case was found"
[ $fp8 -gt 0 ] || fail "no case has widths that a GPU multiplies in fp8"
echo "$n cases, $fp8 checks in fp8"
finish
