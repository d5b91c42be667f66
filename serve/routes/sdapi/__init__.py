"""The API of the AUTOMATIC1111 web UI: its routes, and what they make of its fields."""
