"""Layers of models that exist, rebuilt from fused functions: `fuse.fuse` and `fuse.unfuse`."""
