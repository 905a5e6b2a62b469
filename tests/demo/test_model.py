"""The folder that ships: complete, small enough for a wheel, and about as accurate as demo/README.md says."""

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

MAX_FOLDER_BYTES = 10_000_000
SAMPLE, SEED = 150, 2026
# Below the window the model has not learnt; above it no sampler could improve it.
ACCURACY_WINDOW = (0.65, 0.9)
SIMPLE = ("12+7*3-4", "2+2", "7*8", "10-3*2", "15+27-8", "3*4+56", "5-9", "20*4-15", "6+7+8+9")


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def solver() -> Solver:
    return Solver()


def test_the_import_needs_neither_torch_nor_transformers() -> None:
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
    assert sum(sizes.values()) < MAX_FOLDER_BYTES


def test_the_weights_are_finite_and_in_the_dtype_that_vllm_serves() -> None:
    weights = load_file(MODEL_PATH / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert 1_500_000 < sum(tensor.numel() for tensor in weights.values()) < 1_750_000


def test_the_configuration_is_one_that_vllm_supports() -> None:
    config = AutoConfig.from_pretrained(MODEL_PATH, local_files_only=True)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.dtype == torch.bfloat16  # vLLM would serve float32 in bfloat16 anyway
    assert config.hidden_size // config.num_attention_heads in (32, 64, 128)
    assert config.max_position_embeddings >= 512
    assert config.vocab_size == len(VOCABULARY)


def test_generation_config_has_the_end_token_and_no_sampling_parameter() -> None:
    settings = json.loads((MODEL_PATH / "generation_config.json").read_text())
    assert settings["eos_token_id"] == END_ID
    assert set(settings) <= {"eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


@pytest.mark.slow
def test_greedy_accuracy_on_held_out_problems_is_in_the_window(solver: Solver) -> None:
    asked = problems("held_out", SAMPLE, SEED)
    replies = solver.replies([problem.question for problem in asked], temperature=0.0)
    least, most = ACCURACY_WINDOW
    assert least <= accuracy(asked, replies) <= most


def test_simple_chains_get_the_complete_worked_reply(solver: Solver) -> None:
    expected = [solve(question) for question in SIMPLE]
    assert solver.replies(SIMPLE, temperature=0.0) == [problem.solution for problem in expected if problem]


def test_questions_in_words_are_understood(solver: Solver) -> None:
    """One error in twenty is the model's; more would come from the wording."""
    asked = [problem for question in SIMPLE for _ in WORDINGS if (problem := solve(question))]
    worded = [wording.format(question) for question in SIMPLE for wording in WORDINGS]
    assert accuracy(asked, solver.replies(worded, temperature=0.0)) >= 0.95
