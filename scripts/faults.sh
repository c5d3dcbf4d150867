#!/usr/bin/env bash
# The fault tests alone, with what was tried: scripts/faults.sh [--long]
# --long: every call of every sweep, a thousand kills of dump and train, an hour of fuzzing for every reader (several hours in all).
# tests/FAULTS.md says which fault is tried where.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
long=0
case ${1:-} in
    '') ;;
    --long) long=1 ;;
    *) echo "faults.sh: unknown option $1" >&2; exit 2 ;;
esac
install_packages "${packages[@]}" libcriterion-dev
configure build -Dtests=true
ninja -C build
export DISTILL_LONG_TESTS=$long
tests=(faults/sweep cli/faults cli/kill cli/resume cli/writers cli/verify cli/policies cli/import cli/errors data/shard_faults data/shard_writers data/shard_scrub data/shard data/safetensors data/tokenizer
       data/model_config data/corpus data/gguf data/loader base/json base/file train/checkpoint train/spike train/targets train/train train/export train/config)
status=0
meson test -C build --no-rebuild --print-errorlogs --timeout-multiplier $([ $long = 1 ] && echo 60 || echo 1) "${tests[@]}" || status=1
grep -hE 'tried +[0-9]+|[0-9]+ (faults|kills|flips)|none lost|^killed:' build/meson-logs/testlog.txt || true
if [ $long = 1 ]; then scripts/fuzz.sh 3600 || status=1; fi
exit $status
