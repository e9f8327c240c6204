"""The NumPy API: arrays in memory, and on a GPU those of CuPy and Numba."""
