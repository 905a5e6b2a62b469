"""The report: one page that needs no other file, with every problem of the run on top."""

import math
import re
from html.parser import HTMLParser

from loadtest import plots
from loadtest.calibrate import Calibration
from loadtest.report import write_html
from tests.loadtest.example import config, many, results, stage

HOSTILE = '<script>alert(1)</script> "&\' id="x'
VOID = {"meta", "link", "br", "img", "input", "hr"}
REFERENCES = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "resource", "rdf:resource"}


class Page(HTMLParser):
    """The tags, ids, references and texts of a page; fails if a tag is closed that is not open."""

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
    """Return the page's text, and the page parsed."""
    write_html(of, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    return text, Page(text)


def test_the_page_is_complete_and_needs_no_other_file(tmp_path):
    of = many()
    text, found = page(of, tmp_path)
    assert {f"{number}  {name}" for number, name in enumerate(plots.config_names(of), 1)} <= set(found.texts)
    assert found.tags.count("svg") == 7, "Pareto of three loads, latency, accuracy, tokens, entropies"
    assert len(set(found.ids)) == len(found.ids)
    for reference in found.references:
        assert reference.startswith("#") and reference[1:] in found.ids
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text).replace(of.run.base_url, "")
    assert not re.search(r"https?://|@import|<script|<link", without_names)


def test_equal_results_make_equal_pages(tmp_path):
    assert page(many(), tmp_path)[0] == page(many(), tmp_path)[0]


def test_names_are_escaped(tmp_path):
    bad = config(HOSTILE, 5.0, 0.5, entropies=[0.1, 0.2])
    of = results(
        bad, config("_b $\\frac$", 6.0, 0.6), config(HOSTILE, 2.0, 0.5, load="closed 1"), name=HOSTILE, failed=[HOSTILE]
    )
    of.stages[0].errors[HOSTILE] = 2
    of.stages[0].problems[HOSTILE] = 2
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


def test_problems_come_before_the_headlines(tmp_path):
    one = config("a", 5.0, 0.5)
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


def test_a_run_without_problems_has_no_alarms(tmp_path):
    assert "alarms" not in page(results(config("a", 5.0, 0.5)), tmp_path)[1].ids


def test_a_temperature_that_was_not_matched_is_an_alarm_and_one_that_was_is_none(tmp_path):
    for within, incomplete in ((True, 0), (False, 3)):
        found = Calibration(0.5, 1.0 if within else 1.2, 1.0, passes=3, incomplete=incomplete).summary()
        of = results(config("a", 5.0, 0.5), calibration={"a": found})
        text, parsed = page(of, tmp_path)
        assert ("alarms" in parsed.ids) is not within
        assert ("a: the entropy at its temperature is 1.2, not within 3% of 1, as it should be" in text) is not within
        assert ("a: 3 replies by which its temperature was matched were not complete" in text) is not within
        row = parsed.texts.index("within tolerance")
        assert ("yes" if within else "no") in parsed.texts[row : row + 4]
        assert type(of.calibration["a"]["within_tolerance"]) is bool


def test_a_figure_that_was_not_measured_is_a_dash(tmp_path):
    bare = config("a", 5.0, None, e2e_p50=math.nan, ttft_p50=None, cost_per_correct=None)
    text, found = page(results(bare, stages=[]), tmp_path)
    assert not re.search(r">\s*(None|nan)\s*<", text)
    assert found.texts.count("\u2013") >= 5
    assert found.tags.count("svg") == 1, "only tokens can be drawn"


def test_empty_results_make_a_page(tmp_path):
    assert page(results(), tmp_path)[1].tags.count("svg") == 0
