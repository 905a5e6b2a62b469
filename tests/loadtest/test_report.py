"""The page, the CSV and the JSON of results, and the plots on the page."""

import csv
import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from loadtest import plots
from loadtest.report import headlines, read_json, write_csv, write_html, write_json
from loadtest.results import StageResult
from tests.loadtest.example import arm, comparison, interval, many, results, stage

HOSTILE = '<script>alert(1)</script> "&\' id="x'
VOID = {"meta", "link", "br", "img", "input", "hr"}
REFERENCES = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "resource", "rdf:resource"}


class Page(HTMLParser):
    """What a page has; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            self.references += [value] * (name in REFERENCES)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
            assert not name.startswith("on")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def page(of, tmp_path):
    """The text of the page, and what is on it."""
    write_html(of, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    return text, Page(text)


def test_the_page_is_whole_and_alone(tmp_path):
    of = many()
    text, found = page(of, tmp_path)
    assert {f"{number}  {name}" for number, name in enumerate(plots.arm_names(of), 1)} <= set(found.texts)
    assert found.tags.count("svg") == 7, "Pareto of three loads, latency, accuracy, tokens, entropies"
    assert len(set(found.ids)) == len(found.ids)
    for reference in found.references:
        assert reference.startswith("#") and reference[1:] in found.ids
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text).replace(of.run.base_url, "")
    assert not re.search(r"https?://|@import|<script|<link", without_names)


def test_the_page_is_the_same_each_time(tmp_path):
    assert page(many(), tmp_path)[0] == page(many(), tmp_path)[0]


def test_names_from_outside_are_text(tmp_path):
    bad = arm(HOSTILE, 5.0, 0.5, entropies=[0.1, 0.2])
    of = results(
        bad, arm("_b $\\frac$", 6.0, 0.6), arm(HOSTILE, 2.0, 0.5, load="closed 1"), name=HOSTILE, failed=[HOSTILE]
    )
    of.stages[0].errors[HOSTILE] = 2
    of.stages[0].warnings.append(HOSTILE)
    of.run.server[HOSTILE] = {HOSTILE: HOSTILE}
    of.scenario[HOSTILE] = HOSTILE
    text, found = page(of, tmp_path)
    assert "script" not in found.tags
    assert "<script" not in text
    assert f"1  {HOSTILE}" in found.texts
    assert len(set(found.ids)) == len(found.ids)
    drawn = Page(plots.pareto(of, "closed 8") or "").texts
    assert any(one.startswith("1  <script>alert(1)</script>") for one in drawn)
    assert "2  _b $\\frac$" in drawn


def test_what_is_invalid_is_said_first(tmp_path):
    one = arm("a", 5.0, 0.5)
    bad = stage(one, 1, invalid=["31 % of questions failed"], errors={"HTTP 500": 31}, warnings=["usage is odd"])
    text, found = page(results(one, stages=[stage(one), bad], failed=["too many errors"]), tmp_path)
    for alarm in (
        "The run failed: too many errors",
        "Invalid: 31 % of questions failed (a, closed 8, repetition 2)",
        "Warning: usage is odd (a, closed 8, repetition 2)",
    ):
        assert alarm in found.texts
        assert text.index(alarm) < text.index('id="headline"')
    assert text.count('<tr class="invalid">') == 1
    assert {"HTTP 500", "31"} <= set(found.texts)


def test_a_quiet_run_has_no_alarms(tmp_path):
    assert "alarms" not in page(results(arm("a", 5.0, 0.5)), tmp_path)[1].ids


def test_what_is_not_known_is_a_dash(tmp_path):
    bare = arm("a", 5.0, None, e2e_p50=math.nan, ttft_p50=None, cost_per_correct=None)
    text, found = page(results(bare, stages=[]), tmp_path)
    assert not re.search(r">\s*(None|nan)\s*<", text)
    assert found.texts.count("\u2013") >= 5
    assert found.tags.count("svg") == 1, "only tokens can be drawn"


def test_results_of_nothing_make_a_page(tmp_path):
    assert page(results(), tmp_path)[1].tags.count("svg") == 0


def test_the_headline_is_of_arms_as_accurate_as_a_vote():
    vote, better, worse = arm("vote", 2.0, 0.6), arm("better", 10.0, 0.62), arm("worse", 20.0, 0.59)
    arms = [{"name": "vote", "vote": {"n": 4}}, {"name": "better"}, {"name": "worse"}]
    of = results(worse, better, vote, scenario={"arms": arms}, comparisons=[comparison(better, vote)])
    [(title, lines)] = headlines(of)
    assert title == "At no lower accuracy than vote (0.6), under closed 8"
    assert lines == [
        "better: 5 times the answers per second (10 against 2), accuracy 0.62; the difference, paired by question, "
        "is +0.020 (+0.000 to +0.040)"
    ]


@pytest.mark.parametrize(
    "vote", [{"body": {"strategy": {"type": "self_consistency", "n": 8}}}, {"body": {}, "vote": {"n": 8}}]
)
def test_a_headline_says_where_a_fall_is_not_excluded(vote):
    of = results(arm("a", 10.0, 0.6), arm("sc", 2.0, 0.6), scenario={"arms": {"a": None, "sc": vote}})
    [(_, [line])] = headlines(of)
    assert line.startswith("a: 5 times")
    assert line.endswith("so that a fall is not excluded")


def test_a_headline_where_no_arm_is_as_accurate():
    of = results(arm("sc", 2.0, 0.6), arm("a", 10.0, 0.5), scenario={"arms": {"sc": {"vote": {"n": 2}}, "a": None}})
    assert headlines(of)[0][1] == ["None of the other arms."]


def test_without_votes_or_answers_the_headline_is_of_the_reference():
    of = results(arm("a", 10.0, None), arm("b", 5.0, None))
    assert headlines(of) == [
        (
            "Beside a, under closed 8; accuracy was not measured",
            ["b: 0.5 times the answers per second (5 against 10)"],
        )
    ]


def test_the_pareto_front_leaves_out_what_another_beats():
    points = [(1.0, 0.6), (2.0, 0.5), (2.0, 0.55), (1.5, 0.5), (3.0, 0.4)]
    assert plots.pareto_front(points) == [(3.0, 0.4), (2.0, 0.55), (1.0, 0.6)]


def test_plots_of_nothing_are_none():
    of = results(arm("a", 5.0, None, output_tokens_per_second=interval(math.nan)))
    assert plots.pareto(of, "closed 8") is None
    assert plots.accuracy_by_arm(of, "closed 8") is None
    assert plots.entropy_histograms(of, "closed 8") is None
    assert plots.tokens(of, "closed 8") is None
    assert plots.latency_against_throughput(of) is None, "one load"


def test_the_csv_has_each_stage(tmp_path):
    one = arm('a, "b"', 5.0, 0.5, ttft_p50=None)
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


def test_json_comes_back_as_it_was(tmp_path):
    write_json(many(), tmp_path / "results.json")
    assert read_json(tmp_path / "results.json") == many()


def test_json_without_a_number_is_json_and_comes_back(tmp_path):
    of = results(arm("a", 5.0, 0.5, answers_per_second=interval(math.nan), entropies=[math.inf]))
    write_json(of, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    back = read_json(tmp_path / "results.json").arms[0]
    assert math.isnan(back.answers_per_second.value)
    assert back.entropies == [math.inf]


def test_what_cannot_be_read_is_said(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=r"results.json: No such file"):
        read_json(path)
    write_json(results(arm("a", 5.0, 0.5)), path)
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
def test_a_full_disk_loses_nothing(write, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("what was there")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(results(arm("a", 5.0, None)), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
