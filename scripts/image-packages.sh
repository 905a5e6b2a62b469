#!/bin/sh
# image-packages.sh VENV BUILD [dev]: make the virtual environment VENV and install the packages that requirements/ pin for
# BUILD (cpu or cuda); with `dev`, the development tools too. A step of the Dockerfile and of scripts/install.sh. PYTHON
# chooses the interpreter of a new environment (default: python3).
set -eu
cd "$(dirname "$0")/.."
venv=$1 build=$2 dev=${3:-}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps "$@"; }

[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"
locks="-r requirements/$build.lock"
[ -z "$dev" ] || locks="$locks -r requirements/$build-dev.lock"
# shellcheck disable=SC2086 # $locks is several arguments
pip --require-hashes --only-binary :all: $locks

if [ "$build" = cpu ]; then
    # pip finds this wheel only if it is configured with an index that has it; uv knows PyTorch's own index.
    pip --require-hashes --only-binary :all: -r requirements/torch-cpu.txt || {
        echo "image-packages: asking PyTorch's own index instead" >&2
        tools=$(mktemp -d)
        trap 'rm -rf "$tools"' EXIT
        scripts/pinned.sh requirements/cpu-dev.lock uv >"$tools/uv.txt"
        pip --require-hashes --only-binary :all: --target "$tools" -r "$tools/uv.txt"
        "$tools/bin/uv" pip install --python "$venv/bin/python" --torch-backend=cpu --no-deps \
            --require-hashes --only-binary :all: -r requirements/torch-cpu.txt
    }
fi
