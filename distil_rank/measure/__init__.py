"""Measurements: fidelity, bootstrap intervals, latency."""
