"""The Numba CPU backend: `launch` has its primitives, the other modules its kernels."""
