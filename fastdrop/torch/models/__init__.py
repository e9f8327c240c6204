"""Changes to models that exist: `enable`, `convert`, `fuse`, `fold_scaling`, and how they find what drops."""
