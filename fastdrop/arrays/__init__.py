"""The NumPy API: the ops of `fastdrop`, on arrays in memory and on a GPU. `masking.py` shows how an op works."""
