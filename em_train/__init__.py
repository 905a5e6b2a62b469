"""EM-FT and EM-RL: entropy minimised in the weights, on a model's own unlabeled outputs (arXiv 2505.15134).

`em-train sample | ft | rl`; what they write is what `em-serve` serves. Built on transformers' and TRL's trainers.
"""
