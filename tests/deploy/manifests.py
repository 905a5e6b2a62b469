"""What the manifests become: rendered by kubectl, as pods, and as the arguments that em-serve is started with."""

import argparse
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# Every overlay, and every component on one. An operator uses these together.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu-demo": ("cpu-demo", ()),
    "single-gpu": ("single-gpu", ()),
    "tensor-parallel": ("tensor-parallel", ()),
    "multi-node": ("multi-node", ()),
    "cpu-demo, watched, with a key": ("cpu-demo", ("api-key", "monitoring")),
    "existing claim": ("cpu-demo", ("existing-claim",)),
    "model cache": ("cpu-demo", ("model-cache",)),
    "keda": ("single-gpu", ("monitoring", "keda", "no-surge")),
    "hpa": ("tensor-parallel", ("monitoring", "hpa")),
    "multi-node, watched": ("multi-node", ("monitoring",)),
}
Object = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A pod that a workload makes: one of a Deployment's, or a group's leader or worker."""

    workload: Object
    template: Object
    rank: int  # in its group
    size: int  # of the group

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def server(self) -> Object:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def gpus(self) -> int:
        return int(self.server["resources"].get("limits", {}).get("nvidia.com/gpu", 0))


class Manifests(list[Object]):
    """The objects of one case."""

    def of(self, kind: str) -> list[Object]:
        return [each for each in self if each["kind"] == kind]

    def one(self, kind: str) -> Object:
        (only,) = self.of(kind)
        return only

    def nodes(self) -> list[Node]:
        """Every kind of pod that runs the server."""
        nodes = [Node(each, each["spec"]["template"], 0, 1) for each in self.of("Deployment")]
        for each in self.of("LeaderWorkerSet"):
            group = each["spec"]["leaderWorkerTemplate"]
            nodes.append(Node(each, group["leaderTemplate"], 0, group["size"]))
            nodes += [Node(each, group["workerTemplate"], rank, group["size"]) for rank in range(1, group["size"])]
        assert nodes
        return nodes

    def environment(self, node: Node) -> dict[str, str]:
        """The variables that `$(NAME)` can refer to, as far as the manifests tell."""
        variables: dict[str, str] = {}
        for source in node.server.get("envFrom", []):
            name = source["configMapRef"]["name"]
            (found,) = (each for each in self.of("ConfigMap") if each["metadata"]["name"] == name)
            variables |= found["data"]
        if node.workload["kind"] == "LeaderWorkerSet":
            variables |= {
                "LWS_GROUP_SIZE": str(node.size),
                "LWS_WORKER_INDEX": str(node.rank),
                "LWS_LEADER_ADDRESS": "group-0.group.default",
            }
        return variables

    def arguments(self, node: Node) -> list[str]:
        """em-serve's arguments, as kubelet would make them: it leaves what it does not know as it is."""
        variables = self.environment(node)

        def value(match: re.Match[str]) -> str:
            return variables.get(match[1], match[0])

        return [re.sub(r"\$\((\w+)\)", value, argument) for argument in node.server["args"]]


def kubectl() -> str | None:
    """Its path, where there is one."""
    return shutil.which("kubectl")


@functools.cache
def render(case: str) -> Manifests:
    """A case, as an operator's overlay that adds components would make it."""
    overlay, components = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(os.path.relpath(KUBERNETES, os.path.realpath(folder)))  # kustomize takes no absolute paths
        wanted = {
            "resources": [str(here / "overlays" / overlay)],
            "components": [str(here / "components" / each) for each in components],
        }
        return kustomize(Path(folder), yaml.safe_dump(wanted))


def kustomize(folder: Path, kustomization: str) -> Manifests:
    """What `kubectl apply -k FOLDER` would send, with this as the folder's kustomization."""
    (folder / "kustomization.yaml").write_text(kustomization)
    command = [kubectl() or "kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return Manifests(yaml.safe_load_all(done.stdout))


def parse(arguments: list[str]) -> argparse.Namespace:
    """em-serve's own reading of its arguments, as far as it goes before it starts an engine."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from server.cli import serve

    with mock.patch.dict(os.environ), mock.patch.object(ServeSubcommand, "cmd") as start:
        serve(arguments)
    (namespace,) = start.call_args.args
    assert isinstance(namespace, argparse.Namespace)
    return namespace


def find(thing: Any, key: str) -> Iterator[Any]:
    """All values of `key`, however deep."""
    if isinstance(thing, Mapping):
        for name, value in thing.items():
            if name == key:
                yield value
            yield from find(value, key)
    elif isinstance(thing, list):
        for value in thing:
            yield from find(value, key)


def closed(schema: Any) -> Any:
    """The schema with every field refused that it does not name."""
    if isinstance(schema, Mapping):
        inner = {key: closed(value) for key, value in schema.items()}
        return {"additionalProperties": False} | inner if isinstance(schema.get("properties"), Mapping) else inner
    return [closed(each) for each in schema] if isinstance(schema, list) else schema
