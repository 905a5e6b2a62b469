"""EM-FT and EM-RL: minimise entropy in a model's weights, on the model's own unlabeled outputs (arXiv 2505.15134).

`em-train sample | ft | rl`; `em-serve` serves the result. Built on the trainers of transformers and TRL.
"""
