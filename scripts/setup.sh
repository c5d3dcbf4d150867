#!/usr/bin/env bash
# Installs what building distill needs on Debian or Ubuntu, if it is not there. Other scripts source this.
set -euo pipefail

packages=(gcc g++ make pkg-config meson ninja-build libhdf5-dev libopenblas-openmp-dev libjansson-dev libyaml-dev libpcre2-dev
          libutf8proc-dev libprotobuf-c-dev protobuf-c-compiler libssl-dev)

install_packages() {
    local missing=() p
    for p in "$@"; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p"); done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || { echo "setup: this script knows apt only; install the equivalents of: ${missing[*]}" >&2; exit 2; }
    local sudo=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "setup: run as root, or install first: ${missing[*]}" >&2; exit 2; }
        sudo=sudo
    fi
    echo "setup: installing ${missing[*]}"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# configure BUILD_DIR [meson options...]: configures once, or again when the options changed
configure() {
    local dir=$1
    shift
    if [ -f "$dir/build.ninja" ]; then meson configure "$dir" "$@" >/dev/null; else meson setup "$dir" "$@" >/dev/null || { tail -30 "$dir/meson-logs/meson-log.txt" >&2; exit 1; }; fi
}
