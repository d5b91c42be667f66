"""Samplers as tables of numbers; `table.py` says how."""
