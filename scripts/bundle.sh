#!/usr/bin/env bash
# A finished build to run on another machine, one that lacks the libraries distill is built with (a GPU node without root, say): programs, tests and those libraries.
#
#   scripts/bundle.sh BUILD_DIR FILE.tar.xz      there:  tar xf FILE.tar.xz && scripts/gpu.sh bundle/build bundle/lib      or  LD_LIBRARY_PATH=bundle/lib bundle/build/distill ...
#
# Left out, because the other machine has to have its own: the C library and what belongs to it, the driver, and CUDA's libraries. The other machine's C library must not be older.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
build=$1 out=$2
[ -x "$build/train/distill" ] || { echo "bundle: there is no $build/train/distill; build first" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bundle/build/tests" "$work/bundle/lib"
programs=("$build/train/distill")
for test in "$build"/tests/test_kernels_* "$build"/tests/test_train_steps; do [ -f "$test" ] && [ -x "$test" ] && programs+=("$test"); done
for program in "${programs[@]}"; do
    [[ $program = */tests/* ]] && to=$work/bundle/build/tests || to=$work/bundle/build
    strip -o "$to/${program##*/}" "$program"
done
ldd "${programs[@]}" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|ld-linux[^/]*|libnvidia[^/]*|libcuda|libcudart|libcublas(Lt)?|libcudnn[^/]*|libstdc\+\+|libgcc_s)\.so' |
    while read -r library; do cp -L "$library" "$work/bundle/lib/"; done
# every test holds the kernels once more: a dictionary longer than a program finds them again
tar -C "$work" -cf - bundle | xz -T1 --lzma2=preset=2,dict=64MiB >"$out"
echo "$out: $(stat -c %s "$out" | awk '{ printf "%.1f MB", $1 / 1e6 }'), ${#programs[@]} programs, $(ls "$work/bundle/lib" | wc -l) libraries"
