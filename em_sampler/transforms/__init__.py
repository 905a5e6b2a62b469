"""The transform of a batch of logits: its contract, the reference and three implementations."""
