"""Components on torch: the fallback on GPUs that TensorRT does not serve."""
