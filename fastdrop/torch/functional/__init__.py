"""Dropout of tensors, as functions."""
