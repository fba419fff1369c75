"""Teachers and students with Lightning, from one teacher to the finished experiment."""
