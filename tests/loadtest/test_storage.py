"""Results on disk: JSON and CSV, their errors, and a full disk."""

import csv
import json
import math
import os

import pytest

from loadtest.report import write_html
from loadtest.results import StageResult
from loadtest.storage import read_json, write_csv, write_json
from tests.loadtest.example import config, interval, many, results, stage


def test_the_csv_has_each_stage(tmp_path):
    one = config('a, "b"', 5.0, 0.5, ttft_p50=None)
    of = results(one, stages=[stage(one, 0, errors={"HTTP 500": 2}), stage(one, 1, invalid=["late"])])
    write_csv(of, tmp_path / "stages.csv")
    with (tmp_path / "stages.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first)[:5] == ["arm", "load", "offered", "open_loop", "repetition"]
    assert len(first) == len(StageResult.model_fields) - 1 + 4 * 6
    assert first["arm"] == 'a, "b"'
    assert json.loads(first["errors"]) == {"HTTP 500": 2}
    assert json.loads(second["invalid"]) == ["late"]
    assert float(first["latency_e2e_p99"]) == of.stages[0].latency.e2e.p99
    assert first["latency_ttft_p50"] == first["latency_itl_count"] == first["goodput"] == ""


def test_the_csv_of_no_stages_is_its_header(tmp_path):
    write_csv(results(), tmp_path / "stages.csv")
    assert (tmp_path / "stages.csv").read_text().count("\n") == 1


def test_json_round_trip(tmp_path):
    write_json(many(), tmp_path / "results.json")
    assert read_json(tmp_path / "results.json") == many()


def test_files_keep_the_names_that_fields_had_first(tmp_path):
    write_json(results(config("a", 5.0, 0.5), config("b", 5.0, 0.5)), tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"arm", "offered", "items", "lag_p99"} <= content["stages"][0].keys()
    assert {"arm", "offered"} <= content["arms"][0].keys()
    assert content["comparisons"][0]["arm"] == "b"
    assert not {"config", "configs", "target_load", "questions", "scheduling_delay_p99"} & {
        *content,
        *content["stages"][0],
        *content["arms"][0],
        *content["comparisons"][0],
    }


def test_nan_and_infinity_are_valid_json_and_round_trip(tmp_path):
    of = results(config("a", 5.0, 0.5, answers_per_second=interval(math.nan), entropies=[math.inf]))
    write_json(of, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    back = read_json(tmp_path / "results.json").configs[0]
    assert math.isnan(back.answers_per_second.value)
    assert back.entropies == [math.inf]


def test_errors_of_reading_name_the_file_and_why(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=r"results.json: No such file"):
        read_json(path)
    write_json(results(config("a", 5.0, 0.5)), path)
    text = path.read_text()
    for content, why in {
        text[: len(text) // 2]: "results.json: not JSON, or not all of it",
        text.replace('"schema_version": 1', '"schema_version": 7'): "results.json: schema_version 7; this reads 1",
        "[]": "results.json: not the results of a load test",
        text.replace('"repetitions": 3', '"repetitions": "many"'): r"results.json: arms\.0\.repetitions: ",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            read_json(path)


@pytest.mark.parametrize("write", [write_json, write_csv, write_html])
def test_a_full_disk_leaves_the_existing_file(write, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("what was there")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(results(config("a", 5.0, None)), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
