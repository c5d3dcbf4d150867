#!/usr/bin/env bash
# Reference cases made by transformers and PyTorch: the small ones of this repository, and larger ones where they are found beside it.
source "$(dirname "$0")/common.sh"
n=0
for case in "$source_root"/tests/golden/*/ "$source_root"/../shared/golden/*/; do
    [ -e "$case/reference.json" ] || continue
    "$distill" check "$case" >check.log 2>&1 || fail "check $case: $(grep -E 'OUTSIDE|MISSING' check.log | head -5; tail -1 check.log)"
    "$distill" check "$case" --matmul fp8 >check.log 2>&1 || fail "check $case --matmul fp8: $(grep -E 'OUTSIDE|MISSING' check.log | head -5; tail -1 check.log)"
    n=$((n + 1))
done
[ $n -gt 0 ] || fail "no reference case was found"
echo "$n cases"

# a check that cannot fail is none: other weights, another loss, a kind this build lacks
cp -r "$source_root/tests/golden/yarn" case
printf '\x40\x40' | dd of=case/student/model.safetensors bs=1 seek=9001 conv=notrunc 2>/dev/null
expect_exit 5 'outside their bound' "$distill" check case
rm -rf case && cp -r "$source_root/tests/golden/yarn" case
sed -i 's/"reverse_kl"/"renyi_2"/' case/reference.json
expect_exit 5 '1 loss kinds are missing' "$distill" check case
"$distill" check case --allow-missing renyi_2 >check.log || fail "--allow-missing: $(tail -1 check.log)"
expect_exit 4 'reference.json' "$distill" check "$world"
finish
