"""Dropout as modules."""
