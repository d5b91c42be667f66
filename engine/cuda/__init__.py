"""CUDA without a framework: the driver, and kernels compiled at run time."""
