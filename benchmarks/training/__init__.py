"""What em-train does to the demo model's accuracy, and to memory: `python -m benchmarks.training`."""
