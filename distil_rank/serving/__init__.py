"""Sequences in, codes or vectors out: as an MLflow model that a server answers from."""
