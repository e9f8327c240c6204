"""The CUDA backend: `launch` has its primitives, `mask`, `pointwise`, `norm` and `softmax` the kernels."""
