"""Using a rewriter: several ways to say a prompt, painted and judged, within so many forward passes."""

WORLD = "http://127.0.0.1:8000"  # where `make serve` has the small world's rewards
