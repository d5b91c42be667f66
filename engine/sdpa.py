"""Components on PyTorch with its fused attention: for GPUs that nothing else serves.

Knows torch. The ONNX graph of the bundle stays the only description of a component: it is read
with onnx and its nodes run as torch operations, weights taken from the same safetensors file.
"""
