"""GRPO on whatever can be sampled and has log-probabilities."""
