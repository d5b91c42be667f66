"""`serve run sdrt.fleet:app`, the earlier name of `sdrt.serve.ray.app:app`."""

from .serve.ray.app import app

__all__ = ["app"]
