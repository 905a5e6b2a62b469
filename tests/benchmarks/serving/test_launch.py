"""The servers of the benchmarks get vLLM's variables from the harness, not from whoever runs them, but for one."""

from harness import launch


def test_of_vllms_variables_only_its_check_for_waits_reaches_the_servers(monkeypatch):
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "OTHER")
    environment = launch.environment()
    assert environment["VLLM_GPU_SYNC_CHECK"] == "error"
    assert "VLLM_ATTENTION_BACKEND" not in environment
