"""Changes to models that exist: whose dropouts they call, and what is fused with them."""
