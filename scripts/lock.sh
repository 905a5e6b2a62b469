#!/bin/sh
# lock.sh [--upgrade]: resolve requirements/ from pyproject.toml, with the uv that the lock pins. Each of vLLM's builds is
# resolved once, development tools included, and written to two files: BUILD.lock for serving, all that an image installs, and
# BUILD-dev.lock for the rest. Pins that still fit are kept; --upgrade moves all of them.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compile() {
    .venv/bin/uv pip compile pyproject.toml --quiet --no-header --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url "$@" >/dev/null
}

# blocks NAMES LOCK [not]: print the packages of LOCK that are in NAMES (with `not`: that are not), with their hashes
blocks() {
    awk -v only="${3:-}" 'BEGIN { print "# Made by `make lock`." }
        { name = $1; sub(/==.*/, "", name) }
        NR == FNR { listed[name]; next }
        /^[a-z0-9]/ { on = (name in listed) == (only != "not") }
        on' "$1" "$2"
}

upgrade=${1:-}
# lock BUILD EXCLUDED ARGUMENT...: write BUILD.lock without the package EXCLUDED, and BUILD-dev.lock; ARGUMENTs go to uv
lock() {
    build=$1 excluded=$2 files=requirements/$1 && shift 2
    cat "$files.lock" "$files-dev.lock" >"$folder/all" # uv keeps the pins that it finds in its output file
    compile --extra "$build" --extra dev -o "$folder/all" ${upgrade:+"$upgrade"} "$@"
    cp "$folder/all" "$folder/serving"
    compile --extra "$build" -o "$folder/serving" "$@"
    grep '^[a-z0-9]' "$folder/serving" | grep -v "^$excluded==" >"$folder/names"
    blocks "$folder/names" "$folder/all" >"$files.lock"
    blocks "$folder/names" "$folder/all" not >"$files-dev.lock"
}

# xgrammar requires Triton: 1 GB, and vLLM's CPU build cannot use it. So it is for tests alone.
lock cpu triton requirements/cpu.in --excludes requirements/cpu-excludes.txt
lock cuda nothing
for lock in requirements/cuda.lock requirements/cuda-dev.lock; do
    sed -i '1i # Resolved, but never yet installed: it has been made on machines without a GPU.' $lock
done
