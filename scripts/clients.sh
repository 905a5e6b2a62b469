#!/bin/sh
# clients.sh [ARGUMENT...]: install the client libraries that requirements/clients.txt and tests/clients/package-lock.json pin into
# build/clients, and run tests/clients with the ARGUMENTs. guidellm needs torch: it gets the CPU build that this project installs.
set -eu
cd "$(dirname "$0")/.."
folder=build/clients
want=$(cat requirements/clients.txt tests/clients/package-lock.json | cksum)
command -v npm >/dev/null || { echo "clients: npm is not installed (Node.js 20 or newer)" >&2; exit 1; }

if [ "$(cat $folder/installed 2>/dev/null)" != "$want" ]; then
    mkdir -p $folder
    .venv/bin/python -m venv --clear $folder/venv
    .venv/bin/uv pip install --quiet --python $folder/venv/bin/python --no-deps -r requirements/clients.txt
    # As scripts/image-packages.sh does: by pip if it knows an index with this wheel, else by uv, which knows PyTorch's own.
    $folder/venv/bin/python -m pip install -qq --no-deps -r requirements/torch-cpu.txt 2>/dev/null ||
        .venv/bin/uv pip install --quiet --python $folder/venv/bin/python --torch-backend=cpu --no-deps \
            -r requirements/torch-cpu.txt
    cp tests/clients/package.json tests/clients/package-lock.json $folder/
    npm ci --prefix $folder --no-audit --no-fund
    echo "$want" >$folder/installed
fi
cp tests/clients/calls.mjs $folder/ # node looks for modules beside the file
exec .venv/bin/python -m tests.clients "$@"
