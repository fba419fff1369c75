"""MLflow and what a run carries; nothing outside knows it."""
