"""A file an API: what it takes and what it answers."""
