"""Low-rank compression of projection layers on protein embeddings."""
