"""The small real world: real photographs, and models trained here, so that everything runs without a model hub."""
