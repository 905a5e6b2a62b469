"""The time of the transform and what it is compared with: `python -m benchmarks.transform`."""
