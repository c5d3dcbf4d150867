#!/usr/bin/env bash
# The whole path on a CPU, on real text, in minutes: builds distill, trains a small teacher, streams its logits into shards, distils a student with a
# tenth of its parameters from them, trains the same student on the text alone as the control, compares the three and draws the learning curves.
#
#   scripts/quickstart.sh [TEXT...]      TEXT: files or directories of text, any language, UTF-8 or Latin-1, gzip or not; 2 MB or more is best
#
# Without TEXT it takes the Linux manual pages; where they cannot be downloaded, the licences and documentation under /usr/share.
# Needs Debian or Ubuntu and two cores; installs what is missing. Everything it makes is in quickstart/: run it again to go on after an interruption,
# rm -r quickstart to start over.
set -euo pipefail
usage() { sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; }
texts=()
for text in "$@"; do
    case $text in
    -h | --help) usage; exit ;;
    -*) echo "quickstart: $text: unknown option; see scripts/quickstart.sh --help" >&2; exit 2 ;;
    esac
    [ -e "$text" ] || { echo "quickstart: $text: there is no such file or directory" >&2; exit 2; }
    texts+=("$(realpath -- "$text")")
done
cd "$(dirname "$0")/.."
source scripts/setup.sh
distill=build/train/distill
configs=configs/quickstart
started=$SECONDS
say() { printf '\n\033[1m== %s\033[0m  (%dm%02ds)\n' "$*" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
run() { printf '$ %s\n' "$*"; "$@"; }

mkdir -p quickstart
exec 9>quickstart/lock
flock -n 9 || { echo "quickstart: another quickstart is at work in $PWD/quickstart; wait for it" >&2; exit 2; }

# Downloaded and unpacked, not installed: small images leave manual pages out when they install.
manual_pages() {
    rm -rf quickstart/package && mkdir -p quickstart/package && cd quickstart/package
    local get=(timeout 60 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 download manpages manpages-dev)
    "${get[@]}" 2>/dev/null || { timeout 90 apt-get update -qq 2>/dev/null && "${get[@]}" 2>/dev/null; } || return
    for f in *.deb; do dpkg-deb -x "$f" . || return; done
    find usr/share/man -type l -delete                     # one page under many names
    gzip -dqr usr/share/man/man[1-9]
}

# What there is of it differs from machine to machine; licences and copyright files are on all.
installed_prose() {
    find /usr/share/common-licenses -type f
    find /usr/share/doc -name copyright
    find /usr/share/doc -type f \( -iname 'readme*' -o -iname 'news*' -o -iname 'faq*' -o -iname '*.txt' -o -iname '*.txt.gz' -o -iname '*.md' -o -iname '*.md.gz' -o -iname '*.rst' -o -iname '*.rst.gz' \)
    find /usr/share/perl /usr/share/perl5 /usr/lib/*/perl -name '*.pod' -o -name '*.pm'
    find /usr/share/man/man[1-9] -type f
}

take_text() {
    rm -rf quickstart/text.part quickstart/text.from
    if [ ${#texts[@]} -gt 0 ]; then
        echo "yours: ${texts[*]}"
        perl scripts/plain_text.pl quickstart/text.part "${texts[@]}"
    elif (manual_pages); then
        echo "the Linux manual pages: Debian's packages manpages and manpages-dev, downloaded and unpacked, not installed"
        perl scripts/plain_text.pl quickstart/text.part --prose quickstart/package/usr/share/man
    else
        echo "the manual pages cannot be downloaded here (apt-get download manpages manpages-dev fails), so: the prose installed on this machine,"
        echo "licences, copyright files and documentation under /usr/share/common-licenses, doc, perl and man"
        { installed_prose 2>/dev/null || true; } | perl scripts/plain_text.pl quickstart/text.part --prose --most 12e6 -
    fi
    rm -rf quickstart/package
    local bytes
    bytes=$(find quickstart/text.part -name '*.txt' -exec cat {} + | wc -c)
    if [ "$bytes" -lt 400000 ]; then
        rm -rf quickstart/text.part
        echo "quickstart: that is $((bytes / 1000)) kB of text; two models cannot be told apart on less than 400 kB. Name more files: scripts/quickstart.sh FILE_OR_DIRECTORY..." >&2
        exit 2
    fi
    [ "$bytes" -ge 1500000 ] || echo "note       with less than 1.5 MB the teacher reads little more than its student does: expect a small difference"
    printf '%s\n' "${texts[@]}" >quickstart/text.part/.taken_from      # hidden: no document
    mv quickstart/text.part quickstart/text
}

say "1/7 build"
install_packages "${packages[@]}"
configure build
ninja -C build train/distill | tail -1

say "2/7 text"
if [ ! -d quickstart/text ]; then take_text
elif [ ${#texts[@]} -gt 0 ] && [ "$(printf '%s\n' "${texts[@]}")" != "$(cat quickstart/text/.taken_from)" ]; then
    echo "quickstart: quickstart/ holds a run on other text ($(paste -sd' ' quickstart/text/.taken_from)); rm -r quickstart to start over with yours" >&2
    exit 2
else echo "quickstart/text is there: $(find quickstart/text -name '*.txt' | wc -l) documents"
fi
# For the samples. Words of the text itself when it is the user's.
if [ -n "$(cat quickstart/text/.taken_from)" ]; then prompt=$(head -qn1 quickstart/text/0000[0-4]?.txt | awk 'NF > 4 && !n++ { print $1, $2, $3, $4 }')
else prompt="The function returns"; fi

say "3/7 a tokenizer for it"
[ -e quickstart/tokenizer/tokenizer.json ] || run $distill tokenizer-train $configs/teacher.yaml

say "4/7 a teacher, trained from scratch on all of the text but what is held out"
if [ ! -d quickstart/teacher ]; then
    run $distill train $configs/teacher.yaml --resume
    run $distill export $configs/teacher.yaml
fi

say "5/7 the teacher's logits into shards"
run $distill teacher-dump $configs/distill.yaml
run $distill inspect quickstart/logits

say "6/7 the student from the shards; and the control, the same student from the same rows and as many steps, without the teacher"
if [ ! -d quickstart/student ]; then
    run $distill train $configs/distill.yaml --resume
    run $distill export $configs/distill.yaml
fi
if [ ! -d quickstart/control ]; then
    control=(--set run.dir=quickstart/control-run --set objective.kd_weight=0 --set objective.ce_weight=1)
    run $distill train $configs/distill.yaml --resume "${control[@]}"
    run $distill export $configs/distill.yaml "${control[@]}" --set export.path=quickstart/control
fi

say "7/7 the result"
for model in teacher student control; do
    printf '%s goes on from "%s":\n' "$model" "${prompt:-The}"
    $distill generate $configs/distill.yaml --set generate.model=quickstart/$model --prompt "${prompt:-The}" 2>quickstart/generate.log || { cat quickstart/generate.log >&2; exit 1; }
    printf '\n\n'
done
run $distill eval $configs/distill.yaml --set eval.max_rows=0 --set eval.json=quickstart/eval.json --model distilled=quickstart/student --model control=quickstart/control
scripts/plot_curves.sh quickstart/teacher-run distilled=quickstart/student-run control=quickstart/control-run >quickstart/curves.svg.part
mv quickstart/curves.svg.part quickstart/curves.svg

cat <<END

$PWD/quickstart/
  student/      the distilled model, a Hugging Face directory that transformers and vLLM read; teacher/ and control/ likewise
  curves.svg    loss of student and control on 40 held-out rows over the steps, and the teacher's; open it in a browser
  eval.json     the table above
  logits/       the teacher's targets: HDF5 shards, see data/FORMAT.md
  *-run/        metrics.jsonl, TensorBoard events, checkpoints
As GGUF, for llama.cpp:  $distill export $configs/distill.yaml --set export.model=quickstart/student --set export.format=gguf --set export.dtype=f16 --set export.path=quickstart/student.gguf
END
printf '\ndone in %dm%02ds\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
