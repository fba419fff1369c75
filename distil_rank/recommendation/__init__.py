"""The cheapest pipeline that keeps a task's function."""
