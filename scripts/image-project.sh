#!/bin/sh
# image-project.sh PYTHON BUILD: install this project into PYTHON's environment, which has vLLM, and those of its requirements
# that the environment does not meet, at the versions that requirements/BUILD.lock pins. A step of the Dockerfile.
set -eu
cd "$(dirname "$0")/.."
python=$1 build=$2
export PIP_BREAK_SYSTEM_PACKAGES=1 # vLLM's image has no virtual environment: its packages are in the system's Python

pip() { "$python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

# unmet: print the names of the requirements for serving that are missing here, or have a version that does not fit
unmet() {
    "$python" -c '
import tomllib
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + project.get("optional-dependencies", {}).get("serve", [])
for requirement in map(Requirement, needed):
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
    # shellcheck disable=SC2086 # $missing is one argument per name
    scripts/pinned.sh "requirements/$build.lock" $missing >"$folder/missing.txt"
    pip install -qq --no-deps --require-hashes --only-binary :all: -r "$folder/missing.txt"
    [ -z "$(unmet)" ] || { echo "image-project: not met by $build.lock: $(unmet)" >&2; exit 1; }
fi
cp -R . "$folder/src" # a build writes into its source folder
sed -i '/^em-loadtest = /d; /^em-train = /d' "$folder/src/pyproject.toml" # an image that serves has neither
pip install -qq --no-deps --no-build-isolation "$folder/src"
cd / # so that Python imports the installed project, not the source
"$python" -c 'from em_sampler.vllm_plugin.version import check_vllm_version; check_vllm_version()'
"$python" "$folder/src/scripts/image-notices.py" "$("$python" -c 'import sys; print(sys.prefix)')/THIRD-PARTY-NOTICES"
[ "$build" != cpu ] || pip uninstall -qq --yes pip # this environment is ours: leave no installer in the image
