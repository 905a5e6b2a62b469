"""What EM-INF and its stats cost a server: `python -m benchmarks.serving`."""
