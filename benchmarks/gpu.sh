#!/bin/sh
# Everything that must be measured on a CUDA device, in one run: agreement with the reference, the transform's time, and,
# if vLLM is installed, the server's rate with the plugin on and off on a 7B-class model with dummy weights.
# If TRL is installed, em-train and the memory of its loss too.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
EM_TEST_DEVICE=cuda "$python" -m pytest -q tests/em_sampler/transforms/test_golden.py \
    tests/em_sampler/transforms/test_implementations.py tests/em_sampler/transforms/test_dispatch.py \
    tests/em_sampler/transforms/test_triton_cuda.py \
    tests/em_sampler/stats/test_recorder.py::test_a_buffer_takes_a_step_to_the_host
"$python" -m benchmarks.transform --device cuda "$@"
if "$python" -c 'import vllm' 2>/dev/null; then VLLM_GPU_SYNC_CHECK=error "$python" -m benchmarks.serving --model 7b; fi
if "$python" -c 'import trl' 2>/dev/null; then
    "$python" -m pytest -q tests/em_train # trainers use a GPU if there is one, and vLLM for rollouts
    "$python" -m benchmarks.training.entropy_loss --tokens 8192
fi
