"""ESM-2 in int8 on a CPU: calibration, rounded weights, and the encoder that computes with them."""
