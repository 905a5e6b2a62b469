"""The requests of the serving benchmark: its configs differ in EM-INF alone."""

from benchmarks import real_models
from benchmarks.serving import dummy_model
from benchmarks.serving.configs import CONFIGS, MODELS, ON, PLAIN, prompts_of, request_bodies
from em_sampler.params import EMInfParams, parse_params


def test_configs_differ_in_nothing_but_em_inf():
    prompts = prompts_of("demo", 3)
    requests = {name: request_bodies("demo", config, prompts, 16, 0) for name, config in CONFIGS.items()}
    for name, config in CONFIGS.items():
        assert [body.pop("em_inf", None) is None for body in requests[name]] == [config.em_inf is None] * 3
    assert all(each == requests[PLAIN] for each in requests.values())


def test_on_is_the_published_defaults_without_stats():
    (body,) = request_bodies("demo", CONFIGS[ON], [[1]], 16, 0)
    assert parse_params(body["em_inf"]) == EMInfParams()


def test_seeds_are_distinct_within_and_across_rounds():
    bodies = [body for number in range(-1, 3) for body in request_bodies("demo", CONFIGS[ON], [[1]] * 4, 16, number)]
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds)


def test_every_model_has_a_folder_or_random_weights() -> None:
    assert {"demo", *real_models.MODELS, *dummy_model.SIZES} == {*MODELS}
