#!/usr/bin/env bash
# Every format and type loads back; nothing is overwritten; what a type cannot hold is refused and leaves nothing behind.
source "$(dirname "$0")/common.sh"
make_world
for dtype in f32 bf16 f16; do
    "$distill" export config.yaml --set export.model=teacher --set export.path=out-$dtype --set export.dtype=$dtype >export.log || fail "safetensors $dtype"
    grep -q 'loaded back' export.log || fail "safetensors $dtype: no load-back check: $(cat export.log)"
done
cmp teacher/model.safetensors out-f32/model.safetensors || fail "f32 weights changed on the way"
"$distill" export config.yaml --set export.model=out-f32 --set export.path=again >/dev/null
cmp out-f32/model.safetensors again/model.safetensors && cmp out-f32/config.json again/config.json || fail "exporting an export changes it"
grep -q '"eos_token_id"' out-f32/config.json || fail "the tokenizer's end of text is not in config.json"
for dtype in f32 bf16 f16 q8_0; do
    "$distill" export config.yaml --set export.model=teacher --set export.format=gguf --set export.path=$dtype.gguf --set export.dtype=$dtype >export.log || fail "gguf $dtype"
    [ "$(head -c 4 $dtype.gguf)" = GGUF ] || fail "$dtype.gguf is no GGUF"
done
expect_exit 2 'exists' "$distill" export config.yaml --set export.model=teacher --set export.path=out-f32
expect_exit 2 'q8_0' "$distill" export config.yaml --set export.model=teacher --set export.path=new --set export.dtype=q8_0
expect_exit 4 'nowhere' "$distill" export config.yaml --set export.model=nowhere --set export.path=new
cp -r teacher broken
printf '\x00\x00\xc0\x7f' | dd of=broken/model.safetensors bs=1 seek=6000 conv=notrunc 2>/dev/null
expect_exit 5 'NaN' "$distill" export config.yaml --set export.model=broken --set export.path=new
printf '\x00\x00\x80\x48' | dd of=broken/model.safetensors bs=1 seek=6000 conv=notrunc 2>/dev/null
expect_exit 5 'bf16' "$distill" export config.yaml --set export.model=broken --set export.path=new --set export.dtype=f16
ls -d new* 2>/dev/null && fail "a refused export left something behind"
finish
