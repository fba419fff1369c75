"""The cheapest pipeline that retains a task's function."""
