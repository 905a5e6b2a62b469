"""The load test on the demo model, and how far its load generator can be trusted: `python -m benchmarks.loadtest`."""
