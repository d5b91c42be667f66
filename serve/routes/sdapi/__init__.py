"""The API of the AUTOMATIC1111 web UI: its endpoints, and how each of its fields is handled."""
