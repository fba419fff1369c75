"""Labelled tasks: what embeddings are for, and how well different representations of them do it."""
