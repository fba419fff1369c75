"""Layers of your own model: selected, observed, replaced, fine-tuned, compared."""
