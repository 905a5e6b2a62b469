"""docs/deploy.md: its example works, its numbers are those of the manifests, and what it points to is there."""

import os
import re
from pathlib import Path

import pytest

from tests.deploy import manifests
from tests.deploy.manifests import DEPLOY, kustomize, parse

PAGE = DEPLOY.parent / "docs" / "deploy.md"
needs_kubectl = pytest.mark.skipif(manifests.kubectl() is None, reason="no kubectl here to render the manifests with")


@needs_kubectl
def test_the_example_overlay(tmp_path: Path):
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    root = os.path.relpath(DEPLOY.parent, os.path.realpath(tmp_path))
    rendered = kustomize(tmp_path, example.replace("path/to/em-inf-server", root))
    (node,) = rendered.nodes()
    assert node.server["image"] == "registry.example.com/em-inf-server:0.1.0-cuda"
    assert {each["metadata"].get("namespace") for each in rendered} == {"llm"}
    assert rendered.of("ScaledObject") and rendered.of("ServiceMonitor")
    args = parse(rendered.arguments(node))
    assert (args.model_tag, args.max_model_len, args.max_num_seqs) == ("Qwen/Qwen2.5-7B-Instruct", 16384, 128)
    assert args.em_inf_default.threshold == 0.3


@needs_kubectl
def test_the_drains_table():
    table = PAGE.read_text().split("## Upgrade and drain")[1].split("\n\n")[2]
    told = [int(re.findall(r"\d+", line.split("|")[2])[0]) for line in table.splitlines()[2:]]
    (node,) = manifests.render("cpu-demo").nodes()
    before = int(node.server["lifecycle"]["preStop"]["exec"]["command"][1])
    timeout = parse(manifests.render("cpu-demo").arguments(node)).shutdown_timeout
    grace = node.spec["terminationGracePeriodSeconds"]
    assert told == [before, timeout, grace - before - timeout, grace]


def test_what_the_page_links_to_is_there():
    links = re.findall(r"\]\((?!https:)([^)#]+)", PAGE.read_text())
    assert len(links) > 10
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
