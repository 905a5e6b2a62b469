#!/bin/sh
# Everything that has to be measured on a CUDA device, in one go: agreement with the CPU, then time.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
EM_TEST_DEVICE=cuda "$python" -m pytest -q tests/em_sampler/test_golden.py \
    tests/em_sampler/test_telemetry.py::test_a_stage_takes_a_step_to_the_host
"$python" -m benchmarks.transform --device cuda "$@"
