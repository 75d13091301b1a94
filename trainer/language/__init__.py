"""The language policy: a model that rewrites the user's prompt before the image policy paints it."""
