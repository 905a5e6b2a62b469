#!/usr/bin/env bash
# test-triton.sh: unpack the releases of Triton that the kernels are tested with, beside the installed one, into .venv/triton:
# 190 MB each to download, once. Where the package index is out of reach it says so, and the tests that need them are
# skipped. `make test-all` runs it while the tests with an engine run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
[ "$(uname -sm)" = "Linux x86_64" ] || exit 0
for release in $("$python" -m harness.stub_driver); do
    folder=.venv/triton/$release
    rm -rf "$folder.new"
    if "$python" -m pip --disable-pip-version-check install --quiet --retries 1 --no-deps --no-compile \
        --target "$folder.new" "triton==$release"; then
        rm -rf "$folder".new/triton/backends/{amd/lib,nvidia/lib/cupti*} # half of it: profiling, and AMD's GPUs
        mv "$folder.new" "$folder"
    else
        rm -rf "$folder.new"
        echo "test-triton.sh: could not fetch Triton $release: THE TESTS THAT NEED IT ARE SKIPPED" >&2
    fi
done
