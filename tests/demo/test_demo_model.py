"""The folder that ships: small enough for a wheel, complete, and right about as often as the README says."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from demo import MODEL_PATH
from demo.conversations import WORDINGS
from demo.evaluate import Solver, accuracy
from demo.problems import problems, solve
from demo.tokenizer import END_ID, VOCABULARY

LARGEST_FOLDER = 10_000_000  # bytes
SAMPLE, SEED = 150, 2026
# A right share below is a model that has not learnt; above it, nothing is left for a sampler to win.
ACCURACY_WINDOW = (0.65, 0.9)
SIMPLE = ("12+7*3-4", "2+2", "7*8", "10-3*2", "15+27-8", "3*4+56", "5-9", "20*4-15", "6+7+8+9")


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def solver() -> Solver:
    return Solver()


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, demo; print(demo.MODEL_PATH); assert not {'torch', 'transformers'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(MODEL_PATH)


def test_the_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(sizes.values()) < LARGEST_FOLDER


def test_the_weights_are_finite_and_of_the_dtype_that_is_served() -> None:
    weights = load_file(MODEL_PATH / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert 1_500_000 < sum(tensor.numel() for tensor in weights.values()) < 1_750_000


def test_the_configuration_suits_vllm() -> None:
    config = AutoConfig.from_pretrained(MODEL_PATH, local_files_only=True)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.dtype == torch.bfloat16  # float32 would be served in bfloat16 all the same
    assert config.hidden_size // config.num_attention_heads in (32, 64, 128)
    assert config.max_position_embeddings >= 512
    assert config.vocab_size == len(VOCABULARY)


def test_generation_stops_at_the_end_of_turn_and_names_no_sampling_parameter() -> None:
    settings = json.loads((MODEL_PATH / "generation_config.json").read_text())
    assert settings["eos_token_id"] == END_ID
    assert set(settings) <= {"eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


def test_greedy_accuracy_on_held_out_problems_is_in_the_window(solver: Solver) -> None:
    asked = problems("held_out", SAMPLE, SEED)
    replies = solver.replies([problem.question for problem in asked], temperature=0.0)
    least, most = ACCURACY_WINDOW
    assert least <= accuracy(asked, replies) <= most


def test_simple_chains_are_worked_out_in_full(solver: Solver) -> None:
    expected = [solve(question) for question in SIMPLE]
    assert solver.replies(SIMPLE, temperature=0.0) == [problem.solution for problem in expected if problem]


def test_questions_in_words_are_understood(solver: Solver) -> None:
    """As well as bare chains are: a slip in twenty is the model's, more would be the wording's."""
    asked = [problem for question in SIMPLE for _ in WORDINGS if (problem := solve(question))]
    worded = [wording.format(question) for question in SIMPLE for wording in WORDINGS]
    assert accuracy(asked, solver.replies(worded, temperature=0.0)) >= 0.95
