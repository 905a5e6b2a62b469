"""The OpenAI-compatible server: stock vLLM's server with the fields `em_inf` and `strategy` on its requests."""
