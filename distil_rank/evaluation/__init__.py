"""What is retained: representations on labelled tasks, and a student beside the baselines on held-out rows."""
