"""What is measured: fidelity, bootstrap intervals, latency."""
