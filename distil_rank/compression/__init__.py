"""Layers of your own model replaced by low-rank ones: inputs captured, solved, saved, exported."""
