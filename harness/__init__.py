"""What tests, benchmarks and examples share: servers as child processes, a stub of Triton's driver. Not shipped."""
