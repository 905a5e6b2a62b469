#!/bin/sh
# Resolves requirements/cpu.lock and cuda.lock from pyproject.toml, with the uv that the lock pins. Pins that still fit
# stay; `make lock ARGS=--upgrade` moves them all.
set -eu
cd "$(dirname "$0")/.."

compile() {
    .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
        --no-emit-index-url --custom-compile-command "make lock" "$@" >/dev/null
}

compile --extra cpu requirements/cpu.in --excludes requirements/cpu-excludes.txt -o requirements/cpu.lock "$@"
compile --extra cuda -o requirements/cuda.lock "$@"
sed -i '1i # Resolved, but never yet installed: it has been made on machines without a GPU.' requirements/cuda.lock
