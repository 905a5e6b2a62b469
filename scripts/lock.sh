#!/bin/sh
# Resolves requirements/ from pyproject.toml, with the uv that the lock pins. Each of vLLM's builds is resolved once, dev
# tools and all, and written to two files: BUILD.lock, what serving needs, which is all that an image has, and
# BUILD-dev.lock, the rest. Pins that still fit stay; `make lock ARGS=--upgrade` moves them all.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compile() {
    .venv/bin/uv pip compile pyproject.toml --quiet --no-header --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url "$@" >/dev/null
}

# blocks NAMES LOCK: those packages of LOCK that are (or with `not`, are not) among NAMES, with their hashes
blocks() {
    awk -v only="${3:-}" 'BEGIN { print "# Made by `make lock`." }
        { name = $1; sub(/==.*/, "", name) }
        NR == FNR { listed[name]; next }
        /^[a-z0-9]/ { on = (name in listed) == (only != "not") }
        on' "$1" "$2"
}

upgrade=${1:-}
# lock BUILD NOT_SERVING ARGUMENTS...
lock() {
    build=$1 without=$2 files=requirements/$1 && shift 2
    cat "$files.lock" "$files-dev.lock" >"$folder/all" # where uv finds the pins to keep
    compile --extra "$build" --extra dev -o "$folder/all" ${upgrade:+"$upgrade"} "$@"
    cp "$folder/all" "$folder/serving"
    compile --extra "$build" -o "$folder/serving" "$@"
    grep '^[a-z0-9]' "$folder/serving" | grep -v "^$without==" >"$folder/names"
    blocks "$folder/names" "$folder/all" >"$files.lock"
    blocks "$folder/names" "$folder/all" not >"$files-dev.lock"
}

# xgrammar asks for Triton. vLLM's CPU build cannot use it, and it is a gigabyte.
lock cpu triton requirements/cpu.in --excludes requirements/cpu-excludes.txt
lock cuda nothing
for lock in requirements/cuda.lock requirements/cuda-dev.lock; do
    sed -i '1i # Resolved, but never yet installed: it has been made on machines without a GPU.' $lock
done
