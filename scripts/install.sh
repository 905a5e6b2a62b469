#!/bin/sh
# install.sh: install the packages that requirements/*.lock pin into .venv, and this project in editable form. Does nothing if
# .venv is up to date. BUILD=cpu or BUILD=cuda chooses vLLM's build; the default is the build that .venv has, or else CUDA if
# an NVIDIA driver answers, or else CPU.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/installed # one line: the build, and a checksum of the files that it depends on

die() { echo "install: $*" >&2; exit 1; }

have=$(cat $stamp 2>/dev/null || true)
build=${BUILD:-${have%% *}}
[ -n "$build" ] || if nvidia-smi >/dev/null 2>&1; then build=cuda; else build=cpu; fi
lock=requirements/$build.lock
[ -f "$lock" ] || die "BUILD must be cpu or cuda, not '$build'"
want="$build $(cat pyproject.toml "$lock" "requirements/$build-dev.lock" requirements/torch-cpu.txt \
    scripts/install.sh scripts/image-packages.sh | cksum)"
[ "$have" != "$want" ] || exit 0

case $(uname -sm) in
"Linux x86_64" | "Linux aarch64") ;;
*) die "vLLM has wheels for Linux on x86_64 and aarch64 only: use a container or a virtual machine" ;;
esac
case $have in
"" | "$build "*) ;;
*) rm -rf .venv ;; # the two builds share file names, so one must not be installed over the other
esac
if [ ! -x .venv/bin/pip ]; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null ||
        die "vLLM needs Python 3.11 to 3.14; $PYTHON is $("$PYTHON" -V 2>/dev/null || echo missing). Try make PYTHON=python3.12"
    "$PYTHON" -m venv .venv
fi
if [ "$build" = cpu ]; then
    .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        die "vLLM on the CPU needs libnuma: run apt-get install libnuma1, or install your system's package of it"
    command -v g++ >/dev/null || echo "install: g++ is not installed: torch.compile will fail at run time" >&2
fi

echo "$build (unfinished)" >$stamp
echo "install: vLLM ($build) and the other packages of requirements/$build*.lock, into .venv; a few minutes, once"
scripts/image-packages.sh .venv "$build" dev
.venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation -e .
echo "$want" >$stamp
