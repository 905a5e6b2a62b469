"""The Kubernetes manifests, rendered by kubectl: objects, pods, and the arguments of em-serve in each pod."""

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
# Name -> (overlay, components): every overlay, and every component on at least one, combined as an operator would.
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
    """A pod of a workload: of a Deployment, or the leader or a worker of a LeaderWorkerSet's group."""

    workload: Object
    template: Object
    rank: int  # in its group; 0 for a leader and for a Deployment's pod
    size: int  # pods in the group

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def server(self) -> Object:
        """The only container."""
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels, with the one that LeaderWorkerSet adds."""
        labels = dict(self.template["metadata"]["labels"])
        if self.workload["kind"] == "LeaderWorkerSet":
            labels["leaderworkerset.sigs.k8s.io/name"] = self.workload["metadata"]["name"]
        return labels

    @property
    def gpus(self) -> int:
        """The limit of nvidia.com/gpu, 0 if there is none."""
        return int(self.server["resources"].get("limits", {}).get("nvidia.com/gpu", 0))


class Manifests(list[Object]):
    """The objects that kustomize renders."""

    def of(self, kind: str) -> list[Object]:
        """Return the objects of a kind."""
        return [each for each in self if each["kind"] == kind]

    def one(self, kind: str) -> Object:
        """Return the only object of a kind.

        Raises:
            ValueError: if there is none, or more than one.
        """
        (only,) = self.of(kind)
        return only

    def nodes(self) -> list[Node]:
        """Return one node for each pod that runs the server, replicas not counted."""
        nodes = [Node(each, each["spec"]["template"], 0, 1) for each in self.of("Deployment")]
        for each in self.of("LeaderWorkerSet"):
            group = each["spec"]["leaderWorkerTemplate"]
            nodes.append(Node(each, group["leaderTemplate"], 0, group["size"]))
            nodes += [Node(each, group["workerTemplate"], rank, group["size"]) for rank in range(1, group["size"])]
        assert nodes
        return nodes

    def environment(self, node: Node) -> dict[str, str]:
        """Return the variables that `$(NAME)` can refer to: the ConfigMap's, and LeaderWorkerSet's for a group."""
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
        """Return em-serve's arguments with variables replaced as kubelet does: unknown ones stay as they are."""
        variables = self.environment(node)

        def value(match: re.Match[str]) -> str:
            return variables.get(match[1], match[0])

        return [re.sub(r"\$\((\w+)\)", value, argument) for argument in node.server["args"]]


def kubectl() -> str | None:
    """Return the path of kubectl, None if it is not installed."""
    return shutil.which("kubectl")


@functools.cache
def render(case: str) -> Manifests:
    """Render a case of CASES as an operator's own overlay that adds components."""
    overlay, components = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(os.path.relpath(KUBERNETES, os.path.realpath(folder)))  # kustomize takes no absolute paths
        wanted = {
            "resources": [str(here / "overlays" / overlay)],
            "components": [str(here / "components" / each) for each in components],
        }
        return kustomize(Path(folder), yaml.safe_dump(wanted))


def kustomize(folder: Path, kustomization: str) -> Manifests:
    """Return the objects that `kubectl apply -k FOLDER` would send, with this text as the folder's kustomization."""
    (folder / "kustomization.yaml").write_text(kustomization)
    command = [kubectl() or "kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return Manifests(yaml.safe_load_all(done.stdout))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse arguments with em-serve's own parser and validation, and stop before it starts an engine."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from server.cli import serve

    key = {"EM_INF_STATISTICS_KEY": "x" * 32}  # from the Secret
    with (
        mock.patch.dict(os.environ, key),
        mock.patch("server.guards.current_platform") as platform,
        mock.patch("server.guards.read_model"),  # no hub is asked
        mock.patch("vllm.logger.configure_logging_from_args"),  # the logs of other tests stay as they are
        mock.patch.object(ServeSubcommand, "cmd") as start,
    ):
        platform.is_cpu.return_value = False  # the pods have GPUs; this machine's memory is not theirs
        serve(arguments)
    (namespace,) = start.call_args.args
    assert isinstance(namespace, argparse.Namespace)
    return namespace


def find(thing: Any, key: str) -> Iterator[Any]:
    """Yield all values of `key` in nested mappings and lists."""
    if isinstance(thing, Mapping):
        for name, value in thing.items():
            if name == key:
                yield value
            yield from find(value, key)
    elif isinstance(thing, list):
        for value in thing:
            yield from find(value, key)


def closed(schema: Any) -> Any:
    """Return the schema with `additionalProperties` false in every object that names its properties."""
    if isinstance(schema, Mapping):
        inner = {key: closed(value) for key, value in schema.items()}
        return {"additionalProperties": False} | inner if isinstance(schema.get("properties"), Mapping) else inner
    return [closed(each) for each in schema] if isinstance(schema, list) else schema
