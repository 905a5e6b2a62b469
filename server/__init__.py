"""The OpenAI-compatible face: stock vLLM's server with `em_inf` on its requests."""
