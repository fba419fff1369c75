"""Results as rows and pictures: to the terminal, Markdown, JSON and PNG."""
