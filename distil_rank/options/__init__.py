"""What each command can be told: one frozen object a command, checked before any work."""
