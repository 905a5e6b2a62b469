#!/bin/sh
# image-project.sh PYTHON BUILD: installs this project into PYTHON's environment, where vLLM is already, and of its
# requirements those that are not met there, as requirements/BUILD.lock pins them. A step of the Dockerfile.
set -eu
cd "$(dirname "$0")/.."
python=$1 build=$2
export PIP_BREAK_SYSTEM_PACKAGES=1 # vLLM's image has no virtual environment: its own packages are the system's

pip() { "$python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

# unmet: the names of our requirements that are missing here, or have another version than we need
unmet() {
    "$python" -c '
import tomllib
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement

for requirement in map(Requirement, tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]):
    try:
        met = requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        met = False
    if not met:
        print(requirement.name)'
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
missing=$(unmet)
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # one argument for each name
    scripts/pinned.sh "requirements/$build.lock" $missing >"$folder/missing.txt"
    pip install -qq --no-deps --require-hashes --only-binary :all: -r "$folder/missing.txt"
    [ -z "$(unmet)" ] || { echo "image-project: still unmet: $(unmet)" >&2; exit 1; }
fi
cp -R . "$folder/src" # where building leaves what it made
pip install -qq --no-deps --no-build-isolation "$folder/src"
cd / # where it is the installed project that Python finds
"$python" -c 'from em_sampler.vllm_plugin.version import check_vllm_version; check_vllm_version()'
[ "$build" != cpu ] || pip uninstall -qq --yes pip # the environment is ours: nothing is left to install with
