"""In-flight batching: requests of any sampler and length share the evaluations of one model."""
