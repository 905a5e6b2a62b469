"""docs/deploy.md: its example works, its drain times are those of the manifests, and its links exist."""

import os
import re
from pathlib import Path

import pytest

from tests.deploy import manifests
from tests.deploy.manifests import DEPLOY, kustomize, parse

PAGE = DEPLOY.parent / "docs" / "deploy.md"
needs_kubectl = pytest.mark.skipif(
    manifests.kubectl() is None, reason="kubectl is not installed: it renders the manifests"
)


@needs_kubectl
def test_the_example_overlay_renders_with_its_settings(tmp_path: Path):
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    root = os.path.relpath(DEPLOY.parent, os.path.realpath(tmp_path))
    rendered = kustomize(tmp_path, example.replace("path/to/em-inf-server", root))
    (node,) = rendered.nodes()
    assert node.server["image"] == "registry.example.com/em-inf-server:5f3c2a1-cuda"
    assert {each["metadata"].get("namespace") for each in rendered} == {"llm"}
    assert rendered.of("ScaledObject") and rendered.of("ServiceMonitor")
    args = parse(rendered.arguments(node))
    assert (args.model_tag, args.max_model_len, args.max_num_seqs) == ("Qwen/Qwen2.5-7B-Instruct", 16384, 128)
    assert args.em_inf_default.threshold == 0.3


@needs_kubectl
def test_the_drain_table_matches_the_manifests():
    table = PAGE.read_text().split("## Upgrade and drain")[1].split("\n\n")[2]
    stated = [int(re.findall(r"\d+", line.split("|")[2])[0]) for line in table.splitlines()[2:]]
    (node,) = manifests.render("cpu-demo").nodes()
    before = int(node.server["lifecycle"]["preStop"]["exec"]["command"][1])
    timeout = parse(manifests.render("cpu-demo").arguments(node)).shutdown_timeout
    grace = node.spec["terminationGracePeriodSeconds"]
    assert stated == [before, timeout, grace - before - timeout, grace]


def test_links_exist():
    links = re.findall(r"\]\((?!https:)([^)#]+)", PAGE.read_text())
    assert len(links) > 10
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
