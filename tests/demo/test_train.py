"""The training script: which tokens count in the loss, the schedule, the seed, and the folder that it writes."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from demo.conversations import training_stream
from demo.tokenizer import END_ID, PAD_ID, build_tokenizer
from demo.train import (
    BATCH_SIZE,
    IGNORED,
    PEAK_LEARNING_RATE,
    WARMUP_STEPS,
    Batch,
    batches,
    build_model,
    build_optimizer,
    learning_rate,
    loss_of,
    save,
    train,
)

BATCHES = list(islice(batches(seed=3), 70))  # more than one pool


def test_a_target_is_the_next_token() -> None:
    for tokens, targets in BATCHES:
        following = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=PAD_ID)
        following[following == PAD_ID] = END_ID  # a conversation's last token is a target only
        counted = targets != IGNORED
        assert counted.any()
        assert torch.equal(targets[counted], following[counted])


def test_only_replies_and_their_end_count_in_the_loss() -> None:
    tokenizer = build_tokenizer()
    replies = {
        turn.text
        for turns in islice(training_stream(seed=3), 70 * BATCH_SIZE)
        for turn in turns
        if turn.role == "assistant"
    }
    for _, targets in BATCHES[:10]:
        for row in targets.tolist():
            learnt = [token for token in row if token != IGNORED]
            assert learnt[-1] == END_ID
            for reply in str(tokenizer.decode(learnt)).split("<|im_end|>")[:-1]:
                assert reply in replies


def test_padding_is_never_a_target_and_rare() -> None:
    for tokens, targets in BATCHES:
        assert not (targets == PAD_ID).any()
        assert (targets[tokens == PAD_ID] == IGNORED).all()
    padded = sum(int((tokens == PAD_ID).sum()) for tokens, _ in BATCHES)
    assert padded < 0.1 * sum(tokens.numel() for tokens, _ in BATCHES)


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = build_model()
    batch = BATCHES[0]
    wider = Batch(
        torch.nn.functional.pad(batch.tokens, (0, 9), value=PAD_ID),
        torch.nn.functional.pad(batch.targets, (0, 9), value=IGNORED),
    )
    assert loss_of(model, wider).item() == pytest.approx(loss_of(model, batch).item(), rel=1e-3)


def test_the_rate_rises_to_its_peak_and_falls_to_a_small_share() -> None:
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(PEAK_LEARNING_RATE)
    assert rates[:WARMUP_STEPS] == sorted(rates[:WARMUP_STEPS])
    assert rates[WARMUP_STEPS:] == sorted(rates[WARMUP_STEPS:], reverse=True)
    assert 0 < rates[-1] < 0.03 * PEAK_LEARNING_RATE


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on 4 conversations a step, in place of 32: an eighth of the time."""
    monkeypatch.setattr("demo.train.BATCH_SIZE", 4)


@pytest.mark.usefixtures("small_batches")
def test_training_is_seeded() -> None:
    first, again, other = (train(steps=2, seed=seed) for seed in (1, 1, 2))
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_saved_folder_has_what_a_server_needs(tmp_path: Path) -> None:
    save(build_model(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == END_ID
    assert (tmp_path / "tokenizer.json").exists() and (tmp_path / "model.safetensors").exists()


def test_optimizer_steps_lower_the_loss_on_their_batch() -> None:
    torch.manual_seed(1)
    model = build_model()
    optimizer = build_optimizer(model)
    batch = Batch(*(tensor[:2] for tensor in BATCHES[0]))
    losses = []
    for _ in range(4):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(1)
    untrained, trained = build_model(), train(steps=12, seed=1)
    with torch.inference_mode():
        before, after = (float(loss_of(model, BATCHES[0])) for model in (untrained, trained))
    assert after < before - 0.3
