"""What both runners' processors have in common: when there is nothing to do, limits, and which rank records stats."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from em_sampler.stats.transport import SOCKET_DIR_ENV
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from tests.em_sampler.vllm_plugin.support import asking, config, context, states, update, v1, v2


def test_nothing_is_done_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method in the batch, or greedy requests only: the logits are not read."""
    first, second = v1(), v2()

    def fail(*_: object) -> None:
        raise AssertionError("the transform was called")

    monkeypatch.setattr(first, "transform", fail)
    monkeypatch.setattr(second, "transform", fail)
    untouched: Any = object()
    plain, greedy = asking(0), asking(5, temperature=0.0)
    first.update_state(update([], [(0, plain), (1, greedy)], [], 2))
    assert first.apply(untouched) is untouched
    second.add_request(0, plain)
    second.add_request(1, greedy)
    second.add_request(2, asking(5))  # in a slot, but not in this step's batch
    second.apply_staged_writes()
    assert second.apply(untouched, context([0, 1], [0, 1])) is untouched


@pytest.mark.parametrize("extra_args", [{"em_inf_threshold": 0.2}, {"em_inf": True}, {"em_inf_steps": 4}])
def test_the_limit_holds_for_defaults_too(monkeypatch: pytest.MonkeyPatch, extra_args: dict[str, Any]) -> None:
    """The worker would use the default of 5 steps: on a route that does not lower it, the request is rejected."""
    sampling_params = SamplingParams(extra_args=extra_args)
    EMInfLogitsProcessor.validate_params(sampling_params)
    monkeypatch.setattr(EMInfLogitsProcessor, "max_steps", 3)
    with pytest.raises(VLLMValidationError, match=r"^em_inf[._]steps: .*from 0 up to 3"):
        EMInfLogitsProcessor.validate_params(sampling_params)
    EMInfLogitsProcessor.validate_params(SamplingParams(extra_args={"em_inf_steps": 3}))


@pytest.mark.parametrize(
    ("extra_args", "field"),
    [
        ({"em_inf_stats": "tokens"}, "em_inf_stats"),
        ({"em_inf": {"stats": "tokens"}}, "em_inf.stats"),
        ({"em_inf_steps": 9}, "em_inf_steps"),
        ({"em_inf": {"steps": 9}}, "em_inf.steps"),
        ({"em_inf_steps": 65}, "em_inf_steps"),
        ({"em_inf": 2}, "em_inf"),
    ],
)
def test_an_error_names_the_field_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch, extra_args: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(EMInfLogitsProcessor, "max_steps", 8)
    with pytest.raises(VLLMValidationError, match=f"^{field}: got ") as caught:
        EMInfLogitsProcessor.validate_params(SamplingParams(extra_args=extra_args))
    assert caught.value.parameter == f"body.vllm_xargs.{field}"


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize(
    ("rank", "size", "records"), [(0, 1, True), (0, 2, True), (1, 2, False), (2, 2, True), (3, 2, False), (3, 4, False)]
)
def test_the_first_rank_of_a_group_records_for_all(
    runner: str, rank: int, size: int, records: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank samples the same tokens; `rank` counts over the pipeline's stages too."""
    monkeypatch.setenv(SOCKET_DIR_ENV, str(tmp_path))
    asked = asking(1, number=1)
    if runner == "v1":
        first = v1(rank, size)
        first.update_state(update([], [(0, asked)], [], 1))
        recorder = first.recorder
    else:
        second = v2(rank, size)
        second.add_request(0, asked)
        recorder = second.recorder
    assert (recorder.start_step() is not None) is records


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_records_where_each_samples_its_own_requests(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET_DIR_ENV, str(tmp_path))
    settings = config(rank, tensor_parallel_size=2)
    settings.parallel_config.enable_batch_sharded_sampling = True
    processor = EMInfLogitsProcessor(settings, states())
    processor.add_request(0, asking(1, number=1))
    assert processor.recorder.start_step() is not None
