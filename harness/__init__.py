"""Starts em-serve and stock vLLM as child processes for tests, benchmarks and examples. It is not shipped."""
