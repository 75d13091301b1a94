"""Image policies: encode, velocity, decode."""
