#!/bin/sh
# gpu.sh [PHASE...]: all that must be measured on a CUDA device, in phases of less than ten minutes, each useful alone.
#   wheels    download into wheels/ what a machine without a package registry may lack; run it on one that has a registry
#   check     versions, a first launch of every kernel, the tests on the device, compute-sanitizer
#   ours      the transform and eager torch at all sizes, and the time of each kernel
#   rest      others, serving and training:
#   others      the transform beside torch.compile and the released method
#   serving     tokens/s of the server, plugin on and off, 7B-class model with dummy weights; if vLLM is installed
#   training    em-train, and the memory of its loss; if TRL is installed
# Without a phase: check, ours and rest. A step that fails or takes too long stops nothing: the last line lists such
# steps, and the exit status is 1. From the environment:
#   OUT       folder of the results (build/gpu). Each is written as soon as it is there; at most eight files in a phase
#   PYTHON    .venv/bin/python if it is there, else python3
#   DEVICE    cuda. With cpu, tiny sizes and Triton's interpreter, to rehearse: DEVICE=cpu sh benchmarks/gpu.sh
#   PHASE_S   seconds for a phase (570): raise it where no command ends after ten minutes
# WHEELS_PYTHON (3.12) is the Python that `wheels` downloads for. If wheels/ is there, the phases install it into a
# temporary folder.
set -u
cd "$(dirname "$0")/.." || exit
out=${OUT:-build/gpu} device=${DEVICE:-cuda} phase_s=${PHASE_S:-570}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: run a command, at most so long and not beyond the end of the phase. SIGINT comes first,
# so that Python stops servers and prints what it has.
step() {
    name=$1 limit=$2
    shift 2
    left=$((phase_end - $(date +%s)))
    [ "$limit" -le "$left" ] || limit=$left
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    if [ "$limit" -lt 1 ]; then
        echo "no time is left in this phase" | tee -a "$log"
        failed="$failed $name(not-run)"
        return
    fi
    started=$(date +%s) lines=$(wc -l <"$log")
    # in the foreground, where Ctrl-C reaches it too
    timeout --foreground -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    tail -n "+$((lines + 1))" "$log" | tail -n 40
    echo "== $name: status $status after $(($(date +%s) - started)) s" | tee -a "$log"
    case $status in
    0) ;;
    124 | 137) failed="$failed $name(over-$limit-s)" ;;
    *) failed="$failed $name" ;;
    esac
}

# has MODULE: whether Python can import it. A broken one counts as missing.
has() { timeout 60 "$PYTHON" -c "import $1" >/dev/null 2>&1; }

wheels() { # the versions are those of the lock
    names='pydantic pydantic-core annotated-types typing-inspection pyzmq'
    wanted=$(for name in $names; do sed -n "s/^\($name==[^ ;]*\).*/\1/p" requirements/cuda.lock; done)
    mkdir -p wheels
    # shellcheck disable=SC2086 # a list
    "$PYTHON" -m pip download --no-deps --only-binary=:all: --implementation cp \
        --python-version "${WHEELS_PYTHON:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --dest wheels $wanted || failed="$failed wheels"
}

check() {
    step versions 60 "$PYTHON" -c "
import sys, importlib.metadata as m, torch
for name in 'torch triton numpy numba pydantic pyzmq pytest transformers vllm trl'.split():
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, 'is not installed')
print(sys.version)
print(torch.cuda.get_device_properties(0) if '$device' == 'cuda' else 'no card: $device')"
    command -v nvidia-smi >/dev/null && step card 30 nvidia-smi
    step first-launch 120 "$PYTHON" -m benchmarks.transform.first_launch --device "$device" --vocab "$vocab"
    step tests 300 env EM_TEST_DEVICE="$device" PYTEST_ADDOPTS="$pytest_flags" "$PYTHON" -m pytest -q \
        --continue-on-collection-errors \
        tests/em_sampler/transforms/test_golden.py tests/em_sampler/transforms/test_implementations.py \
        tests/em_sampler/transforms/test_triton_cuda.py tests/em_sampler/transforms/test_large_batches.py \
        tests/em_sampler/transforms/test_dispatch.py
    step recorder 60 env EM_TEST_DEVICE="$device" "$PYTHON" -m pytest -q \
        tests/em_sampler/stats/test_recorder.py::test_a_buffer_takes_a_step_to_the_host
    if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
        step sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$PYTHON" -m benchmarks.transform.first_launch --vocab 9001
    fi
}

ours() {
    step kernels 120 "$PYTHON" -m benchmarks.transform.kernels --device "$device" --vocab "$vocab" --out "$out/ours"
    # shellcheck disable=SC2086 # --quick, or nothing
    step ours 420 "$PYTHON" -m benchmarks.transform --device "$device" --arms ours,eager --out "$out/ours" $quick
}

others() {
    # shellcheck disable=SC2086 # --quick, or nothing
    step others 420 "$PYTHON" -m benchmarks.transform --device "$device" --arms ours,compiled,released \
        --rows "$others_rows" --vocab "$vocab" --out "$out/others" $quick
}

serving() {
    if [ "$device" = cuda ] && has vllm; then
        step serving "$phase_s" env VLLM_GPU_SYNC_CHECK=error "$PYTHON" -m benchmarks.serving --model 7b --out "$out/serving"
    else
        echo "serving: left out, without vLLM and a card" | tee -a "$log"
    fi
}

training() { # trainers use a GPU if there is one, and vLLM for rollouts
    if [ "$device" = cuda ] && has trl; then
        step loss 200 "$PYTHON" -m benchmarks.training.entropy_loss --tokens 8192
        step em-train "$phase_s" "$PYTHON" -m pytest -q tests/em_train
    else
        echo "training: left out, without TRL and a card" | tee -a "$log"
    fi
}

# phase NAME FUNCTION...: run the steps of functions, with one log and one end.
phase() {
    log=$out/$1.log phase_end=$(($(date +%s) + phase_s))
    shift
    : >"$log"
    for each in "$@"; do "$each"; done
}

failed=
if [ "$*" = wheels ]; then
    wheels
    [ -z "$failed" ]
    exit
fi
[ $# -gt 0 ] || set -- check ours rest
for name in "$@"; do
    case $name in
    check | ours | rest | others | serving | training) ;;
    *) echo "gpu.sh: no phase '$name'; see the top of $0" >&2 && exit 2 ;;
    esac
done

mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
if [ -d wheels ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$scratch/site" wheels/*.whl || failed="$failed wheels"
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "$device" = cuda ]; then
    vocab=151936 others_rows=1,16,64,256 quick='' pytest_flags=''
    has xdist && pytest_flags='-n 8'
else
    vocab=2000 others_rows=1,5 quick=--quick pytest_flags="-m 'not slow' -k 'triton or eager_masked or buffer'"
    export TRITON_INTERPRET=1
fi
for name in "$@"; do
    case $name in
    rest) phase rest others serving training ;;
    *) phase "$name" "$name" ;;
    esac
done
printf '\nresults: %s\nfailed:%s\n' "$out" "${failed:- nothing}"
[ -z "$failed" ]
