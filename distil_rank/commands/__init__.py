"""What each command does, end to end, as one MLflow run."""
