"""Tests of the transform with its kernels on the emulator, as the Triton of the machine with a GPU compiles them."""

import subprocess
import sys

import pytest

from harness import stub_driver
from tests.ptx.__main__ import EMULATED

FOLDER = "tests/em_sampler/transforms"
GOLDEN = 5, 6, 23, 30  # 6 is SGD, 23 one-hot, 30 has tied tops; each has a row of adaptive temperature too
GOLDEN_CASES = [
    f"test_golden.py::test_every_implementation_matches_the_golden_cases[{case}-triton_cuda]" for case in GOLDEN
]
CASES = [
    *GOLDEN_CASES,
    # Two chunks, and too many particles for the narrow program.
    "test_golden.py::test_every_implementation_matches_the_golden_cases[0-triton_cuda]",
    "test_triton_cuda.py::test_repeats_are_equal_to_the_bit",
    *(
        f"test_triton_cuda.py::test_tied_tops_match_the_reference_over_64_steps[{gap_and_ties}]"
        for gap_and_ties in ("0.0-2", "0.0-3", "0.0-10", "0.001-3")
    ),
    "test_triton_cuda.py::test_near_ties_among_many_heavy_logits_match_the_reference",
    "test_triton_cuda.py::test_a_large_batch_is_transformed_in_groups",
    "test_implementations.py::test_rows_may_lie_apart_in_memory[601-704-triton_cuda]",
    "test_implementations.py::test_rows_may_lie_apart_in_memory[608-701-triton_cuda]",
    *(
        f"test_truncation.py::test_adversarial_rows_match_the_reference[5-{method}-triton_cuda]"
        for method in ("top_h", "p_less, normalized", "top_n_sigma")
    ),
    # Each chunk has fewer slots for heavy logits than a program has threads.
    "test_implementations.py::test_all_sizes_match_the_reference[151936-1-triton_cuda]",
]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "cases"), [("0", CASES), ("1", GOLDEN_CASES), ("2", GOLDEN_CASES)])
def test_on_the_emulator(seed: str, cases: list[str]) -> None:
    """With other seeds, what a GPU approximates comes out otherwise: tied tops once depended on it."""
    if not stub_driver.is_here(EMULATED):
        pytest.skip(f"Triton {EMULATED} is not here: scripts/test-triton.sh fetches it")
    command = [sys.executable, "-m", "tests.ptx", "--seed", seed, "--", *(f"{FOLDER}/{case}" for case in cases)]
    done = subprocess.run(command, cwd=stub_driver.ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
