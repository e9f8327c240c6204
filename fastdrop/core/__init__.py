"""What a mask is: cells, bits, thresholds, the kinds of dropout. NumPy only."""
