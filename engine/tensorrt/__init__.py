"""Components on TensorRT and on TensorRT for RTX, one code path for both."""
