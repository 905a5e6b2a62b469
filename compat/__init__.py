"""Checks that vLLM's sources still have what this project uses of them: `python -m compat`, docs/vllm-surface.md."""
