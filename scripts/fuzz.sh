#!/usr/bin/env bash
# Runs every libFuzzer target for SECONDS (default 15): scripts/fuzz.sh [SECONDS [NAME]]. A crash leaves its input in build-fuzz/ and fails.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
seconds=${1:-15} only=${2:-}
install_packages "${packages[@]}" clang llvm libomp-dev
[ -f build-fuzz/build.ninja ] || CC=clang meson setup build-fuzz -Dfuzz=true -Dtests=false -Dcuda=disabled -Dbuildtype=debugoptimized -Db_lundef=false >/dev/null || { tail -20 build-fuzz/meson-logs/meson-log.txt; rm -rf build-fuzz; exit 1; }
ninja -C build-fuzz >build-fuzz/ninja.log 2>&1 || { tail -60 build-fuzz/ninja.log; exit 1; }
status=0
for target in build-fuzz/tests/fuzz/fuzz_*; do
    [ -x "$target" ] && [ -f "$target" ] || continue
    name=$(basename "$target")
    [ -z "$only" ] || [ "$name" = "$only" ] || continue
    corpus=build-fuzz/corpus/$name
    mkdir -p "$corpus"
    seeds=tests/seeds/$name
    if FUZZ_SEEDS=$corpus "$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -artifact_prefix="build-fuzz/$name-" -print_final_stats=1 \
        "$corpus" $([ -d "$seeds" ] && echo "$seeds") >"build-fuzz/$name.log" 2>&1; then
        echo "$name: $(grep -o 'stat::number_of_executed_units: *[0-9]*' "build-fuzz/$name.log" | grep -o '[0-9]*$') inputs, no fault"
    else
        echo "$name: FAULT, see build-fuzz/$name.log" && tail -25 "build-fuzz/$name.log"
        status=1
    fi
done
exit $status
