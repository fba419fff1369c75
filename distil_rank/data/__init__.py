"""Embeddings as training data: file formats, leak-free splits, the LightningDataModule."""
