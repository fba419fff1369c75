"""The mathematics, on torch alone: moments, solvers, the low-rank layer, within-class whitening, encoders."""
