"""The Numba CPU backend: kernels, and what launches them (`launch`)."""
