"""What torch calls stand on: torch's private names, seeds, and the kernels on plain tensors."""
