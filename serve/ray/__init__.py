"""The server on Ray Serve: an ingress in front of replicas that each hold the engines."""
