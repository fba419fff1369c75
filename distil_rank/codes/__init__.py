"""Encoders and stores of codes: a few bytes for each protein, and search among them."""
