"""The server on Ray Serve: an ingress before replicas that each hold the engines."""
