"""What runs in vLLM's own interpreter."""
