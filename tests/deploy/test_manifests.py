"""The Kubernetes manifests: valid, consistent with each other and with em-serve. Needs kubectl, but no cluster."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from em_sampler.stats.curve import KEY_ENV
from tests.deploy import manifests
from tests.deploy.manifests import CASES, DEPLOY, KUBERNETES, Manifests, Node, Object, closed, find, kustomize, parse

SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = ("1.29", "1.37")  # of Kubernetes: the oldest that docs/deploy.md supports, and the newest with a schema
EXIT_MARGIN_S = 15  # for the processes to exit after the last request
SECRET_KEYS = {"api-key", "hub-token", "statistics-key"}

needs_kubectl = pytest.mark.skipif(
    manifests.kubectl() is None, reason="kubectl is not installed: it renders the manifests"
)
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def rendered(case: str) -> Manifests:
    return manifests.render(case)


def seconds(probe: Object) -> int:
    """Return how long a probe may fail, in seconds."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def selects(labels: Mapping[str, str], node: Node) -> bool:
    """Return if a selector with these labels matches the pod."""
    return labels.items() <= node.labels.items()


def schema(name: str) -> Any:
    """Return a schema of tests/deploy/schemas that refuses fields it does not name."""
    return closed(yaml.safe_load((SCHEMAS / f"{name}.yaml").read_text()))


def test_the_cases_cover_every_overlay_and_component():
    folders = {each.parent.name for each in KUBERNETES.glob("*/*/kustomization.yaml")}
    used = {name for overlay, components in CASES.values() for name in (overlay, *components)}
    assert folders - used == {"gpu", "leader-worker"}  # parts of overlays


@needs_kubectl
@every_case
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(rendered: Manifests, version: str):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for each in rendered:
        if (SCHEMAS / f"{each['kind'].lower()}.yaml").exists():
            jsonschema.validate(each, schema(each["kind"].lower()))
        else:
            kubernetes_validate.validate(each, version, strict=True)
    for node in rendered.nodes():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": node.template["metadata"], "spec": node.spec}
        kubernetes_validate.validate(pod, version, strict=True)


@needs_kubectl
@every_case
def test_em_serve_accepts_its_arguments_and_they_fit_the_pod(rendered: Manifests):
    for node in rendered.nodes():
        arguments = rendered.arguments(node)
        assert not any("$(" in argument for argument in arguments), arguments
        args = parse(arguments)
        ports = [port["containerPort"] for port in node.server.get("ports", [])]
        assert ports == ([] if args.headless else [args.port])
        assert args.headless == (node.rank > 0)
        assert (args.nnodes, args.node_rank) == (node.size, node.rank)
        assert args.tensor_parallel_size * args.pipeline_parallel_size == max(1, node.gpus) * node.size
        assert args.tensor_parallel_size == max(1, node.gpus)  # tensor parallelism stays within a machine
        assert (args.model_tag == rendered.environment(node).get("MODEL")) or node.gpus == 0
        if node.size > 1:
            assert args.master_addr == rendered.environment(node)["LWS_LEADER_ADDRESS"]
            assert args.em_inf_statistics_address == f"{args.master_addr}:8600"
            (key,) = (each for each in node.server["env"] if each["name"] == KEY_ENV)
            assert key["valueFrom"]["secretKeyRef"] == {"name": "em-inf-server", "key": "statistics-key"}


@needs_kubectl
@every_case
def test_the_grace_period_covers_the_drain(rendered: Manifests):
    leaders = [node for node in rendered.nodes() if node.rank == 0]
    timeouts = {parse(rendered.arguments(node)).shutdown_timeout for node in rendered.nodes()}
    (timeout,) = timeouts
    assert timeout >= 60
    for node in rendered.nodes():
        command, delay = node.server["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        # A worker exits as soon as it gets SIGTERM, so its preStop must last until the leader has drained.
        drained = int(delay) + timeout if node.rank == 0 else int(delay)
        assert node.spec["terminationGracePeriodSeconds"] >= drained + EXIT_MARGIN_S
        if node.rank > 0:
            (leader,) = (each for each in leaders if each.workload is node.workload)
            assert int(delay) >= int(leader.server["lifecycle"]["preStop"]["exec"]["command"][1]) + timeout


@needs_kubectl
@every_case
def test_probes_and_ports_match_the_server(rendered: Manifests):
    for node in rendered.nodes():
        server = node.server
        probes = {name: server.get(f"{name}Probe") for name in ("startup", "readiness", "liveness")}
        if node.rank > 0:
            assert not any(probes.values()) and "ports" not in server  # a worker has no HTTP server
            continue
        paths = {name: (probe["httpGet"]["path"], probe["httpGet"]["port"]) for name, probe in probes.items()}
        assert paths == {
            "startup": ("/health/ready", "http"),
            "readiness": ("/health/ready", "http"),
            "liveness": ("/health/live", "http"),
        }
        assert [port["name"] for port in server["ports"]] == ["http"]
        # Weights are downloaded, which takes long; and the rollout must not fail before the startup probe does.
        assert seconds(probes["startup"]) >= (30 * 60 if node.gpus else 60)
        if node.workload["kind"] == "Deployment":
            assert node.workload["spec"].get("progressDeadlineSeconds", 600) > seconds(probes["startup"])
        assert seconds(probes["readiness"]) <= 10 < seconds(probes["liveness"])
    (port,) = rendered.one("Service")["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")
    policy = rendered.one("NetworkPolicy")["spec"]
    assert [rule["ports"] for rule in policy["ingress"] if "ports" in rule] == [[{"port": "http"}]]
    for monitor in rendered.of("ServiceMonitor"):
        assert [(each["port"], each["path"]) for each in monitor["spec"]["endpoints"]] == [("http", "/metrics")]
        service = rendered.one("Service")["metadata"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["labels"].items()
        assert f'job="{service["name"]}"' in (KUBERNETES / "components/keda/scaledobject.yaml").read_text()


@needs_kubectl
@every_case
def test_selectors_find_their_pods_and_no_others(rendered: Manifests):
    nodes = rendered.nodes()
    service = rendered.one("Service")["spec"]["selector"]
    assert [selects(service, node) for node in nodes] == [node.rank == 0 for node in nodes]
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        labels = rendered.one(kind)["spec"][path]["matchLabels"]
        assert all(selects(labels, node) for node in nodes), kind
    for node in nodes:
        if node.workload["kind"] == "Deployment":
            assert selects(node.workload["spec"]["selector"]["matchLabels"], node)
        else:  # LeaderWorkerSet creates a headless Service with the name of the group
            assert node.workload["metadata"]["name"] != rendered.one("Service")["metadata"]["name"]
        if node.rank == 0:
            assert all(
                selects(each["labelSelector"]["matchLabels"], node) for each in node.spec["topologySpreadConstraints"]
            )
    group = [rule for rule in rendered.one("NetworkPolicy")["spec"]["ingress"] if "ports" not in rule]
    if any(node.size > 1 for node in nodes):  # members of a group reach each other on any port, and nobody else does
        ((peers,),) = (rule["from"] for rule in group)
        assert set(peers) == {"podSelector"}
        members = peers["podSelector"]["matchLabels"]
        assert all(selects(members, node) for node in nodes)
        assert "leaderworkerset.sigs.k8s.io/name" in members  # a Deployment beside the group is not in it
    else:
        assert not group


@needs_kubectl
@every_case
def test_only_labelled_clients_and_prometheus_reach_the_port(rendered: Manifests):
    (rule,) = (rule for rule in rendered.one("NetworkPolicy")["spec"]["ingress"] if "ports" in rule)
    client, monitoring = {"em-inf-server/client": "true"}, {"kubernetes.io/metadata.name": "monitoring"}
    assert rule["from"] == [
        {"podSelector": {"matchLabels": client}},
        {"namespaceSelector": {"matchLabels": client}},
        {  # both in one entry: Prometheus' pods, not its namespace
            "namespaceSelector": {"matchLabels": monitoring},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
        },
    ]


@needs_kubectl
def test_the_policy_of_a_group_follows_its_name(tmp_path: Path):
    overlay = os.path.relpath(KUBERNETES / "overlays/multi-node", os.path.realpath(tmp_path))
    renamed = kustomize(tmp_path, f"nameSuffix: -b\nresources: [{overlay}]\n")
    name = renamed.one("LeaderWorkerSet")["metadata"]["name"]
    policy = renamed.one("NetworkPolicy")["spec"]
    assert set(find(policy, "leaderworkerset.sigs.k8s.io/name")) == {name} == {"em-inf-server-group-b"}


@needs_kubectl
@every_case
def test_references_exist_and_no_secret_is_defined(rendered: Manifests):
    assert not rendered.of("Secret")
    existing = {(each["kind"], each["metadata"]["name"]) for each in rendered}
    for node in rendered.nodes():
        spec = node.spec
        assert ("ServiceAccount", spec["serviceAccountName"]) in existing
        claims = {each["claimName"] for each in find(spec, "persistentVolumeClaim")}
        owned = {name for kind, name in existing if kind == "PersistentVolumeClaim"}
        assert claims == owned or (
            claims == {"models"} and not owned
        )  # the second is the claim of existing-claim, which the operator creates
        assert {mount["name"] for mount in node.server["volumeMounts"]} == {
            volume["name"] for volume in spec["volumes"]
        }
        for secret in find(spec, "secretKeyRef"):
            assert secret["name"] == "em-inf-server" and secret["key"] in SECRET_KEYS
            assert secret.get("optional", False) == (secret["key"] == "hub-token")  # without api-key, no server starts
    for text in (path.read_text() for path in DEPLOY.rglob("*.yaml")):
        assert "stringData" not in text and "kind: Secret" not in text


@needs_kubectl
@every_case
def test_images_are_the_projects_own(rendered: Manifests):
    for node in rendered.nodes():
        name, tag = node.server["image"].split(":")
        assert (name, tag) == ("em-inf-server", "cuda" if node.gpus else "cpu")
        assert "command" not in node.server  # so that the entrypoint, em-serve, runs and receives the signals


@needs_kubectl
@every_case
def test_pods_are_hardened_and_have_the_volumes_they_write_to(rendered: Manifests):
    account = rendered.one("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for node in rendered.nodes():
        pod, server = node.spec["securityContext"], node.server["securityContext"]
        assert node.spec["automountServiceAccountToken"] is False
        assert pod["runAsNonRoot"] and (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]) == (10001, 10001, 10001)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert server["readOnlyRootFilesystem"] and not server["allowPrivilegeEscalation"]
        assert server["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in node.server["volumeMounts"]}
        assert set(mounts) == {"/models", "/dev/shm", "/tmp", "/home/em"}
        volumes = {volume["name"]: volume for volume in node.spec["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        resources = node.server["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]  # memory must not be overcommitted
        assert "cpu" in resources["requests"] and "cpu" not in resources["limits"]
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]
        assert shm == (f"{2 * node.gpus}Gi" if node.gpus else "1Gi")
        folders = [each["emptyDir"] for each in volumes.values() if "emptyDir" in each]
        on_disk = [each for each in folders if "medium" not in each]
        sizes = [int(each["sizeLimit"].removesuffix("Gi")) for each in on_disk]
        limit = int(resources["limits"]["ephemeral-storage"].removesuffix("Gi"))
        assert sum(sizes) < limit and "ephemeral-storage" in resources["requests"]


@needs_kubectl
@pytest.mark.parametrize("case", ["keda", "hpa"])
def test_autoscaling_lets_pods_drain_and_uses_existing_metrics(rendered: Manifests, case: str):
    deployment = rendered.one("Deployment")
    assert "replicas" not in deployment["spec"]  # otherwise each `kubectl apply` would reset it
    autoscaler = rendered.one("ScaledObject" if case == "keda" else "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (down,) = find(autoscaler, "scaleDown")
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert down["stabilizationWindowSeconds"] > grace
    assert [(each["type"], each["value"], each["periodSeconds"] > grace) for each in down["policies"]] == [
        ("Pods", 1, True)
    ]

    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = Path(vllm.origin).with_name("v1").joinpath("metrics", "loggers.py").read_text()
    rules = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    asked = list(find(autoscaler, "query")) if case == "keda" else [rule["seriesQuery"] for rule in rules]
    metrics = [query.split("(")[-1].split("{")[0] for query in asked]
    assert metrics == ["vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    assert all(f'name="{metric}"' in source for metric in metrics)
    if case == "hpa":
        assert [each["metric"]["name"] for each in find(autoscaler, "pods")] == [rule["name"]["as"] for rule in rules]


@needs_kubectl
@pytest.mark.parametrize("case", ["keda"])
def test_rules_and_dashboard_are_copies_of_deploy_monitoring(rendered: Manifests):
    rules = yaml.safe_load((DEPLOY / "monitoring/rules.yaml").read_text())
    assert rendered.one("PrometheusRule")["spec"] == rules, "run components/monitoring/prometheusrule.sh"
    (dashboard,) = (each for each in rendered.of("ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"])
    ((_, text),) = dashboard["data"].items()
    assert json.loads(text) == json.loads((DEPLOY / "monitoring/dashboard.json").read_text())
    assert len(json.dumps(dashboard)) < 262144  # bytes, the limit of the annotation that `kubectl apply` writes


def test_the_values_of_the_production_stack_fit_the_chart_and_the_image():
    values = yaml.safe_load((DEPLOY / "production-stack/values.yaml").read_text())
    jsonschema.validate(values, schema("production-stack"))
    engine = values["servingEngineSpec"]
    (model,) = engine["modelSpec"]
    assert (model["repository"], model["tag"]) == ("em-inf-server", "cuda")
    mounts = {mount["mountPath"] for mount in model["extraVolumeMounts"]}
    assert {"/tmp", "/home/em", "/usr/local/sbin/vllm"} <= mounts
    assert {mount["name"] for mount in model["extraVolumeMounts"]} == {each["name"] for each in model["extraVolumes"]}
    assert engine["containerSecurityContext"]["readOnlyRootFilesystem"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", values["routerSpec"]["tag"])
    assert all(each["emptyDir"]["sizeLimit"] for each in model["extraVolumes"] if "emptyDir" in each)
    assert engine["vllmApiKey"] == {"secretName": "em-inf-server", "secretKey": "api-key"}
    assert [engine[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")] == [
        "/health/ready",
        "/health/ready",
        "/health/live",
    ]


def test_the_charts_fixed_command_starts_em_serve(tmp_path: Path):
    """Run the template's `vllm serve MODEL ...` with the ConfigMap's `vllm` first on the PATH."""
    values = yaml.safe_load((DEPLOY / "production-stack/values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    config, port = model["vllmConfig"], str(values["servingEngineSpec"]["containerPort"])
    command = ["vllm", "serve", model["modelURL"], "--host", "0.0.0.0", "--port", port, "--enable-prefix-caching"]
    command += ["--max-model-len", str(config["maxModelLen"])]
    command += ["--tensor-parallel-size", str(config["tensorParallelSize"]), *config["extraArgs"]]
    config_map = yaml.safe_load((DEPLOY / "production-stack/em-serve.yaml").read_text())
    (volume,) = (each for each in model["extraVolumes"] if "configMap" in each)
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    for name, text in {
        "vllm": config_map["data"]["vllm"],
        "em-serve": f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(volume["configMap"]["defaultMode"])
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True)
    args = parse(json.loads(started.stdout))
    assert (args.model_tag, args.port, args.max_model_len) == (model["modelURL"], int(port), config["maxModelLen"])
    assert 0 < args.shutdown_timeout <= 30 - 10  # the chart keeps Kubernetes' default grace period of 30 s
    refused = subprocess.run(["vllm", "bench"], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 2 and "only serves" in refused.stderr
