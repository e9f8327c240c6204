"""Tools for models with dropout: `audit`, Monte Carlo prediction, and the scheduler of drop probabilities."""
