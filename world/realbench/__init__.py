"""The bench of the small world: prompts in a short and a long form, and a photograph of each."""
