"""Export of a bundle as a model for the Triton Inference Server."""
