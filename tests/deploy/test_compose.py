"""The files of deploy/compose, checked against the published schema, each other and the image."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.deploy.dockerfile import DOCKERFILE, ROOT

BIN = Path(sys.executable).parent
FOLDER = ROOT / "deploy/compose"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((FOLDER / "gpu.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
PROMTOOL = shutil.which("promtool", path=BIN) or shutil.which("promtool")


def grafana(name: str) -> Any:
    """Return a provisioning file of Grafana, parsed."""
    return yaml.safe_load((FOLDER / "grafana" / name).read_text())


def mounts(service: str) -> dict[str, Path | None]:
    """Return what a service mounts at each path: a file of this repository, or None for a volume."""
    pairs = [volume.split(":")[:2] for volume in SERVICES[service]["volumes"]]
    return {target: (FOLDER / source).resolve() if source.startswith(".") else None for source, target in pairs}


def seconds(text: str) -> int:
    """Parse a duration of compose, such as `140s`."""
    return int(re.fullmatch(r"(\d+)s", text).group(1))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["compose.yaml", "gpu.yaml"])
def test_schema(name: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", FOLDER / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_mounted_files_exist_and_are_read_only() -> None:
    files = [file for service in SERVICES for file in mounts(service).values() if file]
    assert len(files) == 5
    assert not [file for file in files if not file.is_file()]
    sources = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert {source for source in sources if not source.startswith(".")} == set(COMPOSE["volumes"])
    assert all(
        volume.endswith(":ro")
        for service in SERVICES.values()
        for volume in service["volumes"]
        if volume.startswith(".")
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened_and_its_image_is_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["mem_limit"] and 0 < (service.get("pids_limit") or 0) <= 4096
    for tmpfs in service.get("tmpfs", []):
        options = tmpfs.split(":")[1].split(",")
        assert "noexec" in options and options[0].startswith("size=")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    if name == "server":
        assert service["image"] == f"em-inf-server:{service['build']['target']}"
        assert service["build"]["target"] in DOCKERFILE.stages
        assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    else:
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("server", [SERVICES["server"], GPU["services"]["server"]], ids=["cpu", "gpu"])
def test_the_server_is_reachable_and_drains_before_it_is_killed(server: dict[str, Any]) -> None:
    drain = int(server["command"][server["command"].index("--shutdown-timeout") + 1])
    assert drain == 120
    assert server["command"][server["command"].index("--host") + 1] == "0.0.0.0"
    assert seconds(SERVICES["server"]["stop_grace_period"]) >= drain + 15  # an idle server takes up to 11 s to exit


def test_the_folders_that_the_server_writes_to_are_writable() -> None:
    environment = DOCKERFILE.environment("cpu")
    assert {environment["HOME"], environment["HF_HOME"]} == set(mounts("server"))
    assert SERVICES["server"]["tmpfs"][0].split(":")[0] == "/tmp"
    assert SERVICES["server"]["shm_size"] == "1gb"
    assert f":{DOCKERFILE.last('cpu', 'EXPOSE').text}" in SERVICES["server"]["ports"][0]


def test_the_gpu_file_changes_the_image_and_reserves_as_many_gpus_as_it_uses() -> None:
    server = GPU["services"]["server"]
    assert set(GPU["services"]) == {"server"}
    assert server["image"] == "em-inf-server:cuda"
    assert server["build"]["target"] == "cuda"
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == server["command"][server["command"].index("--tensor-parallel-size") + 1]
    assert server["command"][0].startswith("${MODEL:?")


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed: see scripts/test-tools.sh")
def test_promtool_accepts_the_files_as_they_are_mounted(tmp_path: Path) -> None:
    configured = next(flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--config.file="))
    for target, file in mounts("prometheus").items():
        if file:
            (tmp_path / target[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / target[1:])
    command = [PROMTOOL, "check", "config", tmp_path / configured.split("=/")[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rule", done.stdout), "promtool read no rules"


def test_services_use_each_others_ports() -> None:
    ports = {name: service["ports"][0].split(":")[-1] for name, service in SERVICES.items()}
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{ports['server']}"]}]
    (source,) = grafana("datasource.yaml")["datasources"]
    url = urlsplit(source["url"])
    assert (url.hostname, str(url.port)) == ("prometheus", ports["prometheus"])
    for name in ("prometheus", "grafana"):
        assert urlsplit(SERVICES[name]["healthcheck"]["test"][-1]).netloc == f"127.0.0.1:{ports[name]}"
    assert SERVICES["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"


def test_grafana_is_provisioned_from_the_mounted_files() -> None:
    (provider,) = grafana("dashboards.yaml")["providers"]
    dashboards = [Path(target) for target, file in mounts("grafana").items() if file and file.suffix == ".json"]
    assert [str(dashboard.parent) for dashboard in dashboards] == [provider["options"]["path"]]
    provisioning = {
        Path(target).parent for target, file in mounts("grafana").items() if file and file.suffix == ".yaml"
    }
    assert provisioning == {Path("/etc/grafana/provisioning") / kind for kind in ("datasources", "dashboards")}
