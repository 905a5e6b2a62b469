"""What tests, benchmarks and examples share: servers as child processes, and a stub of a GPU's driver. It is not shipped."""
