"""The comparison on held-out rows, and how it is shown: JSON, Markdown, terminal, pictures."""
