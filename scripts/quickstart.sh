#!/usr/bin/env bash
# The whole path on a CPU, on real text, in minutes: builds distill, trains a small teacher, streams its logits into shards, distils a student with a
# tenth of its parameters from them, compares it with the same student trained on the text alone, and exports it.
# Needs Debian or Ubuntu; installs what is missing. Everything it makes is in quickstart/ (remove it to start over).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

say "1/7 build"
install_packages "${packages[@]}"
configure build
ninja -C build train/distill | tail -1
distill=build/train/distill

say "2/7 text: the Linux manual pages, one document each"
if [ ! -d quickstart/text ]; then
    rm -rf quickstart/package && mkdir -p quickstart/package
    # downloaded and unpacked here, not installed: small images leave manual pages out when they install
    (cd quickstart/package && { apt-get download -qq manpages manpages-dev || { apt-get update -qq && apt-get download -qq manpages manpages-dev; }; } && for f in *.deb; do dpkg-deb -x "$f" .; done)
    mkdir -p quickstart/text.part
    for page in quickstart/package/usr/share/man/man[1-9]/*.gz; do
        # troff to text: comments and requests go, the words of headings and font macros stay
        zcat "$page" | sed -E '/^\.so /Q; /^['"'"'.]\\"/d; s/^\.(SH|SS) +"?([^"]*)"?/\n\2/; s/^\.(B|I|BR|BI|IR|RB|RI|IB|TH|SM) +//; /^\.[A-Za-z]/d; s/\\f[A-Z]//g; s/\\f\([A-Z]*//g; s/\\-/-/g; s/\\(aq|\(aq)/'"'"'/g; s/\\[(][a-z]{2}//g; s/\\&//g; s/\\e/\\/g' \
            >"quickstart/text.part/$(basename "$page" .gz).txt"
    done
    find quickstart/text.part -size -400c -delete          # pages that only point to another one
    rm -rf quickstart/package && mv quickstart/text.part quickstart/text
fi
echo "$(find quickstart/text -name '*.txt' | wc -l) documents, $(du -sh --apparent-size quickstart/text | cut -f1)"

say "3/7 a tokenizer for it"
[ -e quickstart/tokenizer/tokenizer.json ] || run $distill tokenizer-train configs/quickstart/teacher.yaml

say "4/7 a teacher, trained from scratch on the text"
if [ ! -d quickstart/teacher ]; then
    run $distill train configs/quickstart/teacher.yaml --resume
    run $distill export configs/quickstart/teacher.yaml --set export.path=quickstart/teacher
fi

say "5/7 the teacher's logits into shards"
run $distill teacher-dump configs/quickstart/distill.yaml
run $distill inspect quickstart/logits

say "6/7 the student, from the shards; and the control, the same student from the text alone"
[ -d quickstart/student ] || run $distill train configs/quickstart/distill.yaml --resume
[ -d quickstart/control ] || {
    run $distill train configs/quickstart/distill.yaml --resume --set run.dir=quickstart/control-run --set objective.kd_weight=0 --set objective.ce_weight=1
    run $distill export configs/quickstart/distill.yaml --set run.dir=quickstart/control-run --set export.path=quickstart/control
}

say "7/7 the result"
[ -d quickstart/student ] || run $distill export configs/quickstart/distill.yaml
run $distill eval configs/quickstart/distill.yaml --set eval.model=quickstart/student --model control=quickstart/control
run $distill generate configs/quickstart/distill.yaml --set generate.model=quickstart/student --prompt "The file descriptor"
echo
echo "The student is in quickstart/student: a Hugging Face directory that transformers, vLLM and llama.cpp's converter read."
echo "As GGUF: $distill export configs/quickstart/distill.yaml --set export.model=quickstart/student --set export.format=gguf --set export.dtype=f16 --set export.path=quickstart/student.gguf"
