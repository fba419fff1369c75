"""FASTA in, ESM-2 vectors out: sequences, weights, the fused forward, the resumable store."""
