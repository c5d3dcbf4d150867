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
# killed at any moment, nothing has the final name; the next export takes away what the dead one left
for point in export.written export.checked; do
    for format in safetensors gguf; do
        { DISTILL_FAIL=$point:kill "$distill" export config.yaml --set export.model=teacher --set export.format=$format --set export.path=new >/dev/null; } 2>/dev/null && fail "$point did not kill"
        [ ! -e new ] || fail "killed at $point, $format has its final name"
    done
done
"$distill" export config.yaml --set export.model=teacher --set export.format=gguf --set export.path=new >/dev/null || fail "export after kills"
[ "$(echo new*)" = new ] || fail "leftovers of killed exports: $(echo new*)"
cmp new f32.gguf || fail "the same export twice gives other bytes"
rm new
mkdir new && expect_exit 2 'not overwritten' "$distill" export config.yaml --set export.model=teacher --set export.path=new && rmdir new
# a run's newest checkpoint, named after the run; without a tokenizer a file for ids only
"$distill" export teacher.yaml --set run.dir=teacher-run --set export.format=gguf --set export.path=run.gguf >/dev/null || fail "newest checkpoint"
head -c 400 run.gguf | grep -qa 'general.name.*teacher-run' || fail "general.name is not the run's"
cp -r teacher bare && rm bare/tokenizer*.json
"$distill" export config.yaml --set "tokenizer.path=''" --set export.model=bare --set export.format=gguf --set export.path=bare.gguf >export.log || fail "model without a tokenizer"
grep -q 'no tokenizer.json' export.log || fail "a missing vocabulary is not mentioned: $(cat export.log)"
"$distill" inspect out-bf16 >/dev/null || fail "an export does not pass inspect"
if python3 -c 'import gguf' 2>/dev/null; then
    cat >read.py <<'PYTHON'
import sys, gguf
for path in sys.argv[1:]:
    r = gguf.GGUFReader(path)
    assert r.fields["general.architecture"].contents() == "qwen2" and len(r.tensors) == 26, (path, len(r.tensors))
    for t in r.tensors: gguf.quants.dequantize(t.data, t.tensor_type)
PYTHON
    python3 read.py ./*.gguf || fail "gguf-py does not read an export"
else
    echo "SKIPPED: reading with gguf-py, which is not installed"
fi
ls -d new* 2>/dev/null && fail "a refused export left something behind"
finish
