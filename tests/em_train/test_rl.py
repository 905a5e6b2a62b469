"""EM-RL: rewards and RLOO's advantages against cases calculated by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from em_train import rl as module
from em_train.rl import ConfidenceTrainer, rewards
from tests.em_train.support import curve, rl, train, write_prompts

LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]])
ENTROPIES = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("kind", "reduce", "wanted"),
    [
        ("token", "sum", [-0.6, -0.4]),
        ("token", "mean", [-0.2, -0.4]),
        ("sequence", "sum", [-6.0, -0.5]),
        ("sequence", "mean", [-2.0, -0.5]),
    ],
)
def test_rewards_by_hand(kind: Any, reduce: Any, wanted: list[float]):
    """The second output has one token; its other columns are padding."""
    assert rewards(kind, reduce, LOGPROBS, ENTROPIES, [3, 1]) == pytest.approx(wanted)


class Spy:
    """Records what RLOO makes of each generation, and the rewards; can replace the rewards by `given`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, given: list[float] | None = None) -> None:
        self.inputs: list[Any] = []
        self.rewards: list[list[float]] = []
        generate, reward = ConfidenceTrainer._generate_and_score_completions, module.rewards

        def generated(trainer: Any, inputs: Any) -> Any:
            self.inputs.append(generate(trainer, inputs))
            return self.inputs[-1]

        def rewarded(*arguments: Any) -> list[float]:
            self.rewards.append(reward(*arguments) if given is None else given)
            return self.rewards[-1]

        monkeypatch.setattr(ConfidenceTrainer, "_generate_and_score_completions", generated)
        monkeypatch.setattr(module, "rewards", rewarded)


def test_the_advantage_compares_with_the_other_outputs_to_the_same_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = [1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0]
    spy = Spy(monkeypatch, given)
    train(rl(prompts=str(write_prompts(tmp_path / "p", 4)), out=tmp_path / "o", beta=0.0))
    by_hand = [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3, -4 / 3, -4 / 3, -4 / 3, 4.0]
    assert spy.inputs[0]["advantages"].tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("reward", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_the_reward_is_the_policys_own_confidence(reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Recomputed from the untrained model's logits, in float64, for the first generation."""
    from transformers import AutoModelForCausalLM

    spy = Spy(monkeypatch)
    settings = rl(prompts=str(write_prompts(tmp_path / "p", 4)), out=tmp_path / "o", reward=reward, generations=2)
    report = train(settings)
    batch = spy.inputs[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float64).eval()
    with torch.no_grad():
        logp = (
            model(input_ids=ids, attention_mask=mask)
            .logits[:, :-1]
            .log_softmax(-1)[:, -batch["completion_ids"].shape[1] :]
        )
    chosen = logp.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    values = (logp.exp() * logp).sum(-1) if reward == "token" else chosen
    wanted = (values * batch["completion_mask"]).sum(-1).tolist()
    assert spy.rewards[0] == pytest.approx(wanted, abs=1e-3)
    assert max(wanted) - min(wanted) > 0.1, "equal rewards would prove little"
    assert curve(report, f"rewards/{reward}_sum/mean")[0] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)


@pytest.mark.slow
def test_the_labelled_reference_rewards_right_answers(tmp_path: Path):
    report = train(rl(prompts=str(write_prompts(tmp_path / "p", 4)), out=tmp_path / "o", reward="correct"))
    assert all(0 < share <= 1 for share in curve(report, "rewards/correct/mean"))


def test_the_kl_of_an_adapter_is_to_the_model_without_it(tmp_path: Path):
    """The KL is 0 before the first step, and not after it."""
    settings = rl(prompts=str(write_prompts(tmp_path / "p", 4)), out=tmp_path / "o", lora_rank=4, learning_rate=1e-2)
    report = train(settings)
    first, second = curve(report, "kl")
    assert first == 0 and abs(second) > 1e-6
    assert (settings.out / "adapter_model.safetensors").is_file()
