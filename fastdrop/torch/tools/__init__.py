"""What looks at models or runs them: audit, Monte Carlo prediction, the scheduler."""
