#!/usr/bin/env bash
# Every command says what it does, its keys with defaults, and an example.
source "$(dirname "$0")/common.sh"
"$distill" --help >help.txt
"$distill" --version | grep -qE '^distill [0-9]+\.[0-9]+' || fail "--version"
for command in $(awk '/^  [a-z]/ {print $1}' help.txt); do
    "$distill" "$command" --help >command.txt 2>err.txt || fail "$command --help: exit $?"
    grep -qi example command.txt || fail "$command --help has no example"
    [ -s err.txt ] && fail "$command --help writes to stderr"
done
[ "$(awk '/^  [a-z]/' help.txt | wc -l)" -ge 10 ] || fail "fewer than ten commands"
"$distill" --config-reference >reference.md
while IFS= read -r row; do grep -qxF -- "$row" "$source_root/README.md" || fail "README's table of keys lacks, or has otherwise: $row"; done <reference.md
[ "$(grep -c '^| `' reference.md)" -ge 90 ] || fail "--config-reference lists $(grep -c '^| `' reference.md) keys"
expect_exit 2 'unknown command' "$distill" distil
"$distill" >/dev/null 2>&1 && fail "no command at all is no error"
finish
