"""Checkpoint to bundle: torch modules, ONNX graphs, parity. Knows torch, transformers, onnx."""
