"""Models' layers made of fused functions, and back."""
