"""The folder to take home, and its way into other runtimes."""
