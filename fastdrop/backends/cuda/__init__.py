"""The parts of the CUDA backend: the words kernels are written in, their bodies, the compiler, the driver."""
