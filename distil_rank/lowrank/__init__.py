"""The mathematics, on torch alone: moments, solvers, the low-rank layer and its guard."""
