"""What both sides must agree on; never torch."""
