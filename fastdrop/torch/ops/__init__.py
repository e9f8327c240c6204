"""The ops ``torch.ops.fastdrop.*`` that compilers, transforms and tracers see."""
