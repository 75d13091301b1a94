"""One recipe per shipped file; `python -m world.make` runs them all."""
