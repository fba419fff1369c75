"""Layers of your own model: found, watched, replaced, fine-tuned, compared."""
